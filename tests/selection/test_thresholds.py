"""Which tokens are kept, given the values: thresholds by batch, branch and sequence."""

from __future__ import annotations

import math

import pytest
import torch
from batches import pair_batch, response, segments, sft_batch
from cases import found_values
from models import lora_model

from alphatoken_loss import AlphaTokenConfig
from alphatoken_loss.selection import thresholds


def groups_of(batch, scope):
    mask = response(batch)
    if scope == "sequence":
        owner = segments(batch)
        return [mask & (owner == i) for i in owner.unique() if i >= 0]
    if "labels" in batch:
        return [mask]
    half = torch.arange(mask.shape[0])[:, None] < mask.shape[0] // 2
    return [mask & half, mask & ~half]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("rho", [0.05, 0.25, 0.5, 0.77, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["right", "ragged", "packed", "stacked", "separate"])
def test_quantile_of_each_group(kind, rho, scope):
    batch = sft_batch(kind) if kind in ("right", "ragged", "packed") else pair_batch(kind)
    weights, values = found_values(lora_model("llama"), "llama", batch, rho=rho, threshold_scope=scope)
    kept = torch.zeros_like(weights)
    number = 0
    for group in groups_of(batch, scope):
        total = values.total[group].double()
        if total.numel() == 0:
            continue
        ordered = total.sort().values
        place = (1 - rho) * (len(ordered) - 1)  # linear interpolation between order statistics
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        threshold = low + (high - low) * (place - math.floor(place))
        kept[group] = (total >= threshold - 1e-12 * total.abs().max()).float()
        number += 1
        share = float(kept[group].mean())
        assert rho - 1.0 / len(ordered) <= share <= rho + 1.0 / len(ordered)
    assert number == {("right", "sequence"): 3, ("ragged", "sequence"): 3, ("packed", "sequence"): 3}.get(
        (kind, scope), 6 if scope == "sequence" else 1 if kind in ("right", "ragged", "packed") else 2
    )
    assert torch.equal(weights, kept)


def test_everything_is_kept_at_one():
    for batch in (sft_batch("ragged"), pair_batch()):
        weights, _ = found_values(lora_model("llama"), "llama", batch, rho=1.0)
        assert torch.equal(weights, response(batch).float())


def test_the_best_token_is_always_kept():
    batch = sft_batch("right")
    weights, values = found_values(lora_model("llama"), "llama", batch, rho=1e-3)
    best = values.total.masked_fill(~response(batch), -torch.inf).argmax()
    assert float(weights.sum()) == 1 and float(weights.flatten()[best]) == 1


def test_a_lone_token_is_kept():
    batch = sft_batch("right")
    batch["labels"][:, :-3] = -100
    batch["labels"][1:] = -100
    batch["labels"][0, -2:] = -100
    assert int(response(batch).sum()) == 1
    weights, _ = found_values(lora_model("llama"), "llama", batch, rho=0.5)
    assert torch.equal(weights, response(batch).float())


def test_ties_are_kept_together():
    """Two equal sequences have equal values: both or neither of their tokens are kept."""
    batch = {key: value[:1].repeat(2, 1) for key, value in sft_batch("none").items()}
    for rho in (0.2, 0.5, 0.8):
        weights, _ = found_values(lora_model("llama"), "llama", batch, rho=rho)
        assert torch.equal(weights[0], weights[1])
        assert 0 < float(weights.sum()) < float(response(batch).sum())


def test_branches_have_their_own_thresholds():
    """With rejected values far below the chosen ones, one threshold would keep a single branch."""
    batch = pair_batch()
    weights, values = found_values(lora_model("llama"), "llama", batch, rho=0.5)
    mask = response(batch)
    for half in (slice(0, 3), slice(3, 6)):
        kept, number = float(weights[half].sum()), float(mask[half].sum())
        assert kept == math.ceil(number / 2) or kept == math.floor(number / 2) + 1 * (number % 2 == 1)
    assert torch.isfinite(values.total).all()


def smoothed_by_hand(total, groups, owner, reach):
    """One token after the other, in float64."""
    out, total = torch.zeros(total.shape, dtype=torch.float64), total.double()
    for group in groups:
        mean = float(total[group].abs().mean()) if group.any() else 0.0
        for row, place in group.nonzero().tolist():
            summed = weights = 0.0
            for other in range(max(place - reach, 0), min(place + reach + 1, total.shape[1])):
                if group[row, other] and owner[row, other] == owner[row, place]:
                    weight, value = reach + 1 - abs(other - place), float(total[row, other])
                    summed += weight * value / (abs(value) + (mean or 1.0))
                    weights += weight
            out[row, place] = summed / weights
    return out


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("reach", [1, 3, 50])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("kind", ["right", "left", "ragged", "packed", "stacked"])
def test_smoothed_values_choose(kind, scope, reach, seed):
    batch = pair_batch(kind, seed=seed) if kind == "stacked" else sft_batch(kind, seed=seed)
    options = {"rho": 0.5, "threshold_scope": scope, "seed": seed}
    weights, values = found_values(lora_model("llama", seed=seed), "llama", batch, smoothing=reach, **options)
    plain, unchanged = found_values(lora_model("llama", seed=seed), "llama", batch, **options)
    assert torch.equal(values.total, unchanged.total)  # what is reported is not smoothed
    groups, owner = groups_of(batch, scope), segments(batch) if kind != "stacked" else torch.zeros_like(weights)
    smooth, kept = smoothed_by_hand(values.total, groups, owner, reach), torch.zeros_like(weights)
    for group in (group for group in groups if group.any()):
        kept[group] = (smooth[group] >= smooth[group].quantile(0.5) - 1e-9).float()
    assert torch.equal(weights, kept)
    assert kind == "ragged" or reach == 50 or not torch.equal(weights, plain)  # ragged ones have no neighbours


@pytest.mark.parametrize("threshold", ["zero", "soft"])
def test_smoothing_under_other_thresholds(threshold):
    batch = sft_batch("right")
    weights, values = found_values(lora_model("llama"), "llama", batch, threshold=threshold, smoothing=2)
    smooth = smoothed_by_hand(values.total, groups_of(batch, "batch"), segments(batch), 2)
    spread = smooth[response(batch)].square().mean().sqrt()
    expected = (smooth >= 0) if threshold == "zero" else (smooth / spread).sigmoid()
    assert torch.allclose(weights.double(), expected.double() * response(batch), atol=1e-6)


def test_smoothed_values_know_no_scale_and_values_of_zero_stay():
    torch.manual_seed(0)
    values, groups = torch.randn(3, 9, dtype=torch.float64), torch.tensor([[0] * 9, [0] * 9, [1] * 7 + [-1] * 2])
    rows = torch.arange(3)[:, None].expand(3, 9)
    found = thresholds.smoothed(values, groups, rows, reach=2)
    assert torch.allclose(found, thresholds.smoothed(values * 1e-7, groups, rows, reach=2))
    assert float(found.abs().max()) < 1 and not found[2, 7:].any()
    assert torch.equal(thresholds.smoothed(0 * values, groups, rows, reach=2), 0 * values)
    alone = thresholds.smoothed(values[:, :1], groups[:, :1], rows[:, :1], reach=2)
    assert torch.equal(alone.sign(), values[:, :1].sign())


@pytest.mark.parametrize(("given", "message"), [
    ({"smoothing": -1}, "smoothing is -1; it must be an integer of at least 0"),
    ({"smoothing": 1.5}, "smoothing is 1.5; it must be an integer"),
    ({"smoothing": 2, "threshold_scope": "pair"}, "pairs are kept whole or not"),
])  # fmt: skip
def test_smoothing_that_is_none(given, message):
    with pytest.raises(ValueError, match=message):
        AlphaTokenConfig(**given)
