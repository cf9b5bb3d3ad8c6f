"""Areas and ranks against explicit counting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from worlds.measures import areas, auc, draws, interval, spearman


def counted(scores, positive, weights):
    """The area by comparing every positive with every negative."""
    won = pairs = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive):
            weight = weights[i] * weights[j]
            pairs += weight
            won += weight * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
    return won / pairs


@pytest.mark.parametrize("seed", range(5))
def test_area_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(float) if seed % 2 else rng.normal(size=40)  # many ties, or none
    positive = rng.random(40) < 0.3
    weights = rng.integers(0, 4, 40).astype(float)
    assert auc(scores, positive, weights) == pytest.approx(counted(scores, positive, weights), abs=1e-12)
    found = auc(scores, positive)
    test = stats.mannwhitneyu(scores[positive], scores[~positive])
    assert found == pytest.approx(test.statistic / (positive.sum() * (~positive).sum()), abs=1e-12)
    # A weight is how often an item stands there.
    times = weights.astype(int)
    repeated = auc(np.repeat(scores, times), np.repeat(positive, times))
    assert auc(scores, positive, weights) == pytest.approx(repeated, abs=1e-12)
    assert auc(-scores, positive) == pytest.approx(1 - found, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_area_in_strata_counts_their_own_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, positive, strata = rng.normal(size=60), rng.random(60) < 0.4, rng.integers(0, 5, 60)
    weights = rng.integers(0, 3, 60).astype(float)
    won = pairs = 0.0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive & (strata == strata[i])):
            pairs += weights[i] * weights[j]
            won += weights[i] * weights[j] * (scores[i] > scores[j])
    assert auc(scores, positive, weights, strata) == pytest.approx(won / pairs, abs=1e-12)
    several = areas(scores, positive, [np.ones(60), weights], strata)
    assert several.tolist() == [auc(scores, positive, strata=strata), auc(scores, positive, weights, strata)]
    # What the strata order says nothing.
    assert auc(strata.astype(float), positive, strata=strata) == pytest.approx(0.5, abs=1e-12)


def test_area_of_one_kind_alone_is_not_defined():
    assert np.isnan(auc(np.arange(3.0), np.array([True] * 3)))
    assert auc(np.arange(4.0), np.array([False, False, True, True])) == 1.0


def test_a_bootstrap_draws_whole_groups():
    groups = np.array([7, 7, 3, 3, 3, 9])
    drawn = np.array(list(draws(groups, 2000, seed=1)))
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 2] == drawn[:, 4]).all()
    assert set(drawn[:, [0, 2, 5]].sum(1)) == {3.0}, "as many groups as there are"
    assert drawn.mean(0) == pytest.approx(np.ones(6), abs=0.06)
    assert interval(np.array([*range(101), np.nan])) == pytest.approx([2.5, 97.5])


@pytest.mark.parametrize("seed", range(3))
def test_rank_correlation_is_scipys(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 9, 30), rng.normal(size=30)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))
    rows = spearman(np.stack([a, -a, np.ones(30)]), np.stack([b, b, b]))
    assert rows[:2] == pytest.approx([spearman(a, b), -spearman(a, b)], abs=1e-12) and np.isnan(rows[2])
