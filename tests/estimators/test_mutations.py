"""Plausible mistakes in the arithmetic, made on the reference: the comparison must notice each by far.

Where the value tests allow 1e-6 of the largest entry, a mistake must move the values by more than 1e-3 of it.
"""

from __future__ import annotations

import pytest
import reference
import torch
from batches import pair_batch, sft_batch
from cases import compare, expected_values, found_values
from checks import TOL64, error
from models import lora_model
from reference import Mistakes

ALL_TERMS = reference.TERMS
TARGETS = ("direct_target", "causal_target")
CAUSAL = ("causal_target", "causal_drift")
FACTOR = 1e-3


def notice(model, family, batch, mistakes, terms, **options):
    """The library agrees with the right reference and disagrees with the mistaken one in each of `terms`."""
    values = found_values(model, family, batch, **options)[1]
    compare(values, expected_values(model, family, batch, **options), batch, TOL64)
    wrong = expected_values(model, family, batch, mistakes=mistakes, **options)
    for term in (*terms, "total") if "grad_norm" not in terms else terms:
        found = error(getattr(wrong, term), getattr(values, term))
        assert found > FACTOR, f"{term} moves by only {found:.1e}"


MISTAKES = [
    pytest.param(Mistakes(row_shift=1), ALL_TERMS, id="rows one later"),
    pytest.param(Mistakes(row_shift=-1), ALL_TERMS, id="rows one earlier"),
    pytest.param(Mistakes(lose_scale=True), ALL_TERMS, id="scaling lost"),
    pytest.param(Mistakes(flip_sign=True), TARGETS, id="sign flipped"),
    pytest.param(Mistakes(sum_heads=True), CAUSAL, id="heads summed"),
    pytest.param(Mistakes(window=1), CAUSAL, id="window one too wide"),
    pytest.param(Mistakes(window=-1), CAUSAL, id="window one too narrow"),
    pytest.param(Mistakes(include_self=True), CAUSAL, id="position itself included"),
    pytest.param(Mistakes(transpose_attention=True), CAUSAL, id="attention transposed"),
]


@pytest.mark.parametrize(("mistakes", "terms"), MISTAKES)
@pytest.mark.parametrize("kind", ["right", "left", "packed", "stacked"])
def test_mistakes_are_noticed(kind, mistakes, terms):
    batch = pair_batch() if kind == "stacked" else sft_batch(kind)
    notice(lora_model("llama"), "llama", batch, mistakes, terms)


@pytest.mark.parametrize("kind", ["right", "stacked"])
def test_swapped_factors_are_noticed(kind):
    """Square factors, rank equal to the width, so that A and B can be taken for one another."""
    batch = pair_batch() if kind == "stacked" else sft_batch(kind)
    model = lora_model("llama", r=32, alpha=16.0, targets=["q_proj", "o_proj"])
    options = dict(window=0)
    values = found_values(model, "llama", batch, **options)[1]
    zero = ("causal_target", "causal_drift")
    compare(values, expected_values(model, "llama", batch, **options), batch, TOL64, zero=zero)
    wrong = expected_values(model, "llama", batch, mistakes=Mistakes(swap_a_and_b=True), **options)
    for term in ("direct_target", "direct_drift", "total"):
        assert error(getattr(wrong, term), getattr(values, term)) > FACTOR, term


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
def test_other_rows_of_a_fused_projection_are_noticed(family):
    notice(lora_model(family), family, sft_batch("right"), Mistakes(all_rows_of_fused=True), CAUSAL)


def test_weights_move_with_the_mistakes():
    """A shifted row changes not only numbers but which tokens are kept."""
    model, batch = lora_model("llama"), sft_batch("right")
    weights, _ = found_values(model, "llama", batch)
    wrong = expected_values(model, "llama", batch, mistakes=Mistakes(row_shift=1))
    assert not torch.equal(weights, reference.keep(wrong.total, batch, 0.5).float())


def test_a_lost_reference_adapter_is_noticed():
    """Drift measured from the base instead of from "ref"."""
    model = lora_model("llama", others=["ref"])
    batch = sft_batch("right")
    values = found_values(model, "llama", batch)[1]
    forgot = expected_values(model, "llama", batch, ref_model=model.get_base_model())
    assert error(values.direct_drift, forgot.direct_drift) > FACTOR
    assert error(values.direct_target, forgot.direct_target) < TOL64
