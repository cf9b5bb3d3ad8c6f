"""Areas under ROC curves with bootstrap intervals over groups, and rank correlation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray


def auc(scores: Array, positive: Array, weights: Array | None = None) -> float:
    """Probability that a positive's score is above a negative's, ties counting one half: the area under the ROC curve.

    Args:
        scores: `(N,)` floats.
        positive: `(N,)` bool.
        weights: `(N,)`, how often each counts (as a bootstrap draws it); by default once.

    Returns:
        NaN where either kind is missing.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    _, first = np.unique(scores[order], return_index=True)
    up, down = (np.add.reduceat(np.where(kind, weights, 0.0)[order], first) for kind in (positive, ~positive))
    below = np.cumsum(down) - down
    pairs = up.sum() * down.sum()
    return float((up * (below + down / 2)).sum() / pairs) if pairs > 0 else float("nan")


def auc_in_strata(scores: Array, positive: Array, strata: Array, weights: Array | None = None) -> float:
    """The same over pairs of one stratum alone, so that nothing the strata stand for can order a pair."""
    weights = np.ones(len(scores)) if weights is None else weights
    won = total = 0.0
    for stratum in np.unique(strata):
        inside = strata == stratum
        up = weights[inside & positive].sum()
        pairs = up * weights[inside & ~positive].sum()
        if pairs > 0:
            won += pairs * auc(scores[inside], positive[inside], weights[inside])
            total += pairs
    return won / total if total > 0 else float("nan")


def draws(groups: Array, count: int, seed: int = 0) -> Iterator[Array]:
    """Bootstrap draws of whole groups: for each, `(N,)` how often an item's group was drawn."""
    names, place = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        yield drawn[place].astype(float)


def interval(found: Array, level: float = 0.95) -> list[float]:
    """The middle `level` of a bootstrap's figures, without those that are not defined."""
    found = np.asarray(found, dtype=float)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) if len(found) else (np.nan, np.nan)
    return [float(low), float(high)]


def spearman(a: Array, b: Array) -> float:
    """Rank correlation with ties at their mean rank; NaN where either does not vary."""
    a, b = rankdata(a), rankdata(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
