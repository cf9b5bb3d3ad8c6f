"""Areas under ROC curves with bootstrap intervals over groups, and rank correlation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray


def areas(scores: Array, positive: Array, draws: Iterable[Array], strata: Array | None = None) -> Array:
    """Areas under the ROC curve, one for each draw of weights: the probability that a positive's score is above a
    negative's, ties counting one half.

    Args:
        scores: `(N,)` floats.
        positive: `(N,)` bool.
        draws: of each `(N,)`, how often an item counts.
        strata: `(N,)`; where given, only pairs of one stratum count, so that nothing that it stands for orders them.

    Returns:
        `(D,)`, NaN where there is no pair.
    """
    strata = np.zeros(len(scores)) if strata is None else strata
    order = np.lexsort((scores, strata))
    above = np.diff(scores[order]) != 0
    apart = np.diff(strata[order]) != 0
    first = np.flatnonzero(np.r_[True, above | apart])  # of each run of ties
    begin = np.searchsorted(first, np.flatnonzero(np.r_[True, apart]))  # of each stratum, in runs
    runs = np.diff(np.r_[begin, len(first)])
    kinds = positive[order], ~positive[order]
    found = []
    for weights in draws:
        up, down = (np.add.reduceat(np.where(kind, weights[order], 0.0), first) for kind in kinds)
        ups, downs = np.add.reduceat(up, begin), np.add.reduceat(down, begin)
        below = np.cumsum(down) - down - np.repeat(np.cumsum(downs) - downs, runs)
        pairs = (ups * downs).sum()
        found.append((up * (below + down / 2)).sum() / pairs if pairs > 0 else np.nan)
    return np.array(found)


def auc(scores: Array, positive: Array, weights: Array | None = None, strata: Array | None = None) -> float:
    """One area of `areas`; by default every item counts once."""
    weights = np.ones(len(scores)) if weights is None else weights
    return float(areas(scores, positive, [weights], strata)[0])


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


def spearman(a: Array, b: Array) -> Array:
    """Rank correlation along the last axis, `(..., N)` -> `(...)`, with ties at their mean rank; NaN where either does
    not vary."""
    a, b = (rankdata(x, axis=-1) - (x.shape[-1] + 1) / 2 for x in (np.asarray(a), np.asarray(b)))
    norms = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.where(norms > 0, (a * b).sum(-1) / np.where(norms > 0, norms, 1), np.nan)[()]
