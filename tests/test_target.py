"""`target_gradient`: the ordinary gradient of the mean validation loss, over the scored adapters."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from batches import pair_batch, response, sft_batch, stacked
from checks import TOL64, TOL_NF4, assert_close
from models import FAMILIES, lora_model, nf4_lora_model

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Target, alphatoken_weights, dpo_loss, target_gradient
from alphatoken_loss import target as target_module
from alphatoken_loss.batches import read_batch

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


# ------------------------------------------------------------------------------------------ of the DPO loss

PAIRS = AlphaTokenConfig(num_layers=2, target_loss="dpo")


def dpo_target(model, batches, *, k=2, beta=0.1, ref_model=None):
    """The gradient of the mean DPO loss over all pairs of all batches, by an ordinary backward."""
    work, names = reference.frozen_copy(model), cases.factor_names(model, "llama", k)
    losses = []
    for batch in batches:
        rows = stacked(batch)
        start = reference.reference_logps(model, batch, ref_model)
        lengths = (rows["labels"] != -100).sum(1)
        losses.append(reference.pair_losses(reference.token_nll(work, rows), start, lengths, "sigmoid", beta, 0.0))
    gradients = reference.gradients(work, torch.cat(losses).mean())
    return {name: gradients[name] for name in names}


def check_dpo(found, expected, pairs, tol=TOL64):
    assert found.tokens == pairs
    assert set(found.gradients) == set(expected)
    for name, gradient in expected.items():
        assert_close(found.gradients[name], gradient, tol, name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["stacked", "stacked_left", "stacked_ref", "separate", "separate_mask"])
def test_dpo_loss(kind, seed, checkpointing):
    """Of batches of one and of three pairs; with another beta."""
    model = lora_model("llama", seed=seed)
    batches = [pair_batch(kind, seed), read_batch(pair_batch("stacked", seed + 5)).part(1, 2)]
    alone = {**batches[1].inputs, "labels": batches[1].labels}
    alone["completion_mask"] = (alone.pop("labels") != -100).long()
    expected = dpo_target(model, [batches[0], alone], beta=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    found = target_gradient(model, [batches[0], alone], config=PAIRS, beta=0.3)
    check_dpo(found, expected, 4)
    assert all(p.grad is None for p in model.parameters())


def test_dpo_loss_against_a_model_in_nf4():
    model, start = nf4_lora_model("llama"), nf4_lora_model("llama", seed=3)
    expected = dpo_target(model, [pair_batch()], ref_model=start)
    check_dpo(target_gradient(model, pair_batch(), config=PAIRS, ref_model=start), expected, 3, TOL_NF4)


@pytest.mark.parametrize("parts, decay", [(4, 0.5), (3, 0.25), (2, None)])
@pytest.mark.parametrize("estimator", ["ghost", "difference"])
def test_dpo_loss_in_a_loop(estimator, parts, decay, monkeypatch):
    """The target of every step by hand: all pairs at first, then a part a step into the running average; masks of that
    target; and the reference runs once over the validation pairs."""
    model = lora_model("llama")
    batches = [pair_batch("stacked", seed=7), pair_batch("separate", seed=8)]
    config = AlphaTokenConfig(
        estimator=estimator, num_layers=2, stability_weight=0, target_loss="dpo", target_parts=parts, target_decay=decay
    )
    asked = []
    original = target_module.reference_logps
    monkeypatch.setattr(target_module, "reference_logps", lambda *args: asked.append(1) or original(*args))
    monkeypatch.setattr("alphatoken_loss.preference.reference_logps", original)
    gate = AlphaToken(model, target=batches, config=config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    expected, pairs, beta = None, 0.0, 0.2
    each = [read_batch(batch).part(i, i + 1) for batch in batches for i in range(3)]
    each = [{**one.inputs, "completion_mask": (one.labels != -100).long()} for one in each]
    for step in range(5):
        batch = pair_batch("stacked", seed=20 + step)
        now = reference.frozen_copy(model)
        if step == 0 or decay is None:
            expected, pairs = dpo_target(now, each, beta=beta), 6.0
        else:
            held = pairs / parts if step == 1 else pairs
            turn = (step - 1) % parts
            mine = each[6 * turn // parts : 6 * (turn + 1) // parts]
            newer, kept, added = dpo_target(now, mine, beta=beta), decay * held, (1 - decay) * len(mine)
            expected = {n: (kept * g + added * newer[n]) / (kept + added) for n, g in expected.items()}
            pairs = kept + added
        options = {"config": config, "beta": beta}
        wanted = alphatoken_weights(now, None, batch, target=Target(expected, 1.0), **options)
        dpo_loss(model, None, batch, gate, beta=beta).backward()
        check_dpo(gate.target, expected, pytest.approx(pairs))
        assert torch.equal(gate.weights, wanted)
        optimizer.step()
        optimizer.zero_grad()
    assert len(asked) == 2


def test_another_target_than_the_chosen_answers():
    """The mistake that this option is there against would show."""
    model = lora_model("llama")
    one, other = (target_gradient(model, pair_batch(), config=config) for config in (PAIRS, CONFIG))
    flat, wrong = (torch.cat([g.flatten() for g in target.gradients.values()]) for target in (one, other))
    assert float(torch.cosine_similarity(flat, wrong, dim=0)) < 0.99


def test_dpo_loss_of_what_are_no_pairs():
    with pytest.raises(ValueError, match="where one with `completion_mask` is needed"):
        target_gradient(lora_model("llama"), [sft_batch("right")], config=PAIRS)
    with pytest.raises(ValueError, match="where one with `completion_mask` is needed"):
        AlphaToken(lora_model("llama"), target=[sft_batch("right")], config=PAIRS)
    with pytest.raises(ValueError, match="beta is 0"):
        target_gradient(lora_model("llama"), [pair_batch()], config=PAIRS, beta=0)
    with pytest.raises(ValueError, match="target_loss is 'ipo'"):
        AlphaTokenConfig(target_loss="ipo")
