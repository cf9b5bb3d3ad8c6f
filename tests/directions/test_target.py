"""`target_gradient`: the ordinary gradient of the mean validation loss, over the scored adapters."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from batches import pair_batch, response, sft_batch, stacked
from checks import TOL64, TOL_NF4, assert_close
from models import FAMILIES, lora_model, nf4_lora_model

from alphatoken_loss import AlphaTokenConfig, target_gradient

CONFIG = AlphaTokenConfig(num_layers=2)


def check(model, family, batches, *, tol=TOL64, config=CONFIG, k=2, given=None, adapter="default"):
    names = cases.factor_names(model, family, k, adapter)
    expected = reference.target_gradient(model, batches, names)
    found = target_gradient(model, batches if given is None else given, config=config)
    assert set(found.gradients) == set(names)
    for name in names:
        assert not found.gradients[name].requires_grad
        assert_close(found.gradients[name], expected[name], tol, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    with reference.softmax_in_own_dtype():
        check(lora_model(family), family, [sft_batch("right", seed=1), sft_batch("none", seed=2)])


@pytest.mark.parametrize("kind", ["none", "right", "left", "ragged", "full", "packed"])
def test_batch_forms(kind):
    check(lora_model("llama"), "llama", [sft_batch(kind, seed=3)])


@pytest.mark.parametrize("seed", range(30, 34))
def test_any_number_of_batches_of_any_size(seed):
    """The mean is over tokens, not over batches."""
    kinds = ["right", "packed", "ragged", "full"][: seed - 29]
    check(lora_model("llama", seed=seed), "llama", [sft_batch(kind, seed=seed) for kind in kinds])


@pytest.mark.parametrize("k", [1, 3, "all"])
def test_blocks(k):
    config = AlphaTokenConfig(num_layers=k)
    check(lora_model("llama"), "llama", [sft_batch("right")], config=config, k=k)


def test_three_blocks_by_default():
    check(lora_model("llama", layers=4), "llama", [sft_batch("right")], config=None, k=3)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_nf4(family):
    check(nf4_lora_model(family), family, [sft_batch("left"), sft_batch("packed")], tol=TOL_NF4)


def test_a_generator_of_batches():
    batches = [sft_batch("right"), sft_batch("left", seed=1)]
    check(lora_model("llama"), "llama", batches, given=(batch for batch in batches))


def test_batches_without_answers_count_for_nothing():
    empty = sft_batch("right")
    empty["labels"] = torch.full_like(empty["labels"], -100)
    check(lora_model("llama"), "llama", [sft_batch("right", seed=1)], given=[empty, sft_batch("right", seed=1)])


def test_the_active_adapter_is_meant():
    model = lora_model("llama", others=["second"])
    model.set_adapter("second")
    check(model, "llama", [sft_batch("right")], adapter="second")


@pytest.mark.parametrize("kind", ["stacked", "separate", "separate_mask"])
def test_of_preference_batches_the_chosen_answers_count(kind):
    rows = stacked(pair_batch(kind))
    chosen = {key: value[:3] for key, value in rows.items()}
    assert int(response(chosen).sum()) == 14
    check(lora_model("llama"), "llama", [chosen], given=[pair_batch(kind)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    model = lora_model("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(model.train(), "llama", [sft_batch("right")])


def test_dropout_is_off():
    check(lora_model("llama", lora_dropout=0.5).train(), "llama", [sft_batch("right")])


def test_no_batches():
    with pytest.raises(ValueError, match="batch"):
        target_gradient(lora_model("llama"), [], config=CONFIG)


def test_no_answers():
    empty = sft_batch("right")
    empty["labels"] = torch.full_like(empty["labels"], -100)
    with pytest.raises(ValueError, match="response token"):
        target_gradient(lora_model("llama"), [empty], config=CONFIG)
