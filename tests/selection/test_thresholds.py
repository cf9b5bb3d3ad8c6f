"""Which tokens are kept, given the values: thresholds by batch, branch and sequence."""

from __future__ import annotations

import math

import pytest
import torch
from batches import pair_batch, response, segments, sft_batch
from cases import found_values
from models import lora_model


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
