"""The `AlphaToken` context when it is used otherwise than meant, or when a step in it fails."""

from __future__ import annotations

import contextlib

import cases
import pytest
import torch
from batches import pair_batch, sft_batch
from checks import grads_of
from models import base_model, lora_model
from peft import LoraConfig
from state import differences, snapshot

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    sft_loss,
    target_gradient,
)

ESTIMATORS = ("ghost", "difference", "exact")


def gate_for(model, **config):
    options = {"num_layers": 2, **config}
    fisher = cases.fisher_tensors(model, "llama", options["num_layers"])
    return AlphaToken(
        model, target=cases.validation(), fisher=Fisher.from_diagonals(fisher), config=AlphaTokenConfig(**options)
    )


# ------------------------------------------------------------------------------------- nothing masked


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_context_without_a_forward(estimator):
    model, other, batch = lora_model("llama"), lora_model("llama"), sft_batch("right")
    gate = gate_for(model, estimator=estimator)
    with pytest.raises(RuntimeError, match=r"nothing was masked.*strict=False"), gate(batch), torch.no_grad():
        model(**batch)
    with pytest.raises(RuntimeError, match="nothing was masked"), gate(batch):
        other(**batch).loss.backward()
    with pytest.raises(RuntimeError, match="nothing was masked"):
        sft_loss_beside(gate, other, batch)
    gate.strict = False
    with pytest.warns(UserWarning, match="nothing was masked"), gate(batch):
        pass
    with gate(batch):  # and the next one works
        model(**batch).loss.backward()
    assert 0 < float(gate.weights.sum()) < float((batch["labels"] != -100).sum())


@pytest.mark.parametrize("strict", [True, False])
def test_grad_inside_a_context_that_was_entered_without_it(strict):
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model)
    gate.strict, before = strict, snapshot(model)
    with torch.no_grad(), gate(batch):
        model(**batch)  # nothing to mask
    told = pytest.raises(RuntimeError, match="entered without grad") if strict else pytest.warns(match="without grad")
    with told, torch.no_grad(), gate(batch), torch.enable_grad():
        model(**batch)
    assert not differences(before, snapshot(model))


@pytest.mark.parametrize("how", ["switched", "frozen", "trained"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_other_parameters_are_scored_than_before(estimator, how):
    """What was estimated is estimated anew; what was given is an error that names it."""
    model, batch = lora_model("llama"), sft_batch("right")
    late = [p for name, p in model.named_parameters() if "layers.2" in name and p.requires_grad]
    if how == "switched":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.double()
    for p in late:
        p.requires_grad_(how != "trained")
    config = AlphaTokenConfig(estimator=estimator, num_layers=2)
    gate = AlphaToken(model, target=cases.validation(), config=config)
    fixed = AlphaToken(model, target=target_gradient(model, cases.validation(), config=config), config=config)
    for one in (gate, fixed):
        sft_loss(model, batch, one).backward()
    if how == "switched":
        model.set_adapter("other")
    for p in late:
        p.requires_grad_(how == "trained")
    model.zero_grad()
    sft_loss(model, batch, gate).backward()
    options = {"target": cases.validation(), "fisher": gate.fisher, "config": config}
    assert torch.equal(gate.weights, alphatoken_weights(model, None, batch, **options))
    if how != "frozen":
        with pytest.raises(ValueError, match=r"make it again|The Fisher (has|covers)"):
            sft_loss(model, batch, fixed).backward()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_target_the_same_is_checked(estimator):
    model, config = lora_model("llama"), AlphaTokenConfig(estimator=estimator, num_layers=2)
    gate = AlphaToken(model, base_model("llama", seed=5).requires_grad_(False), config=config)
    with pytest.raises(ValueError, match="is not the one that this model's adapter sits on"):
        sft_loss(model, sft_batch("right"), gate)
    gate = AlphaToken(model, config=config)
    for beta in (0.0, -0.1, float("nan"), float("inf"), "0.1"):
        with (
            pytest.raises(ValueError, match=r"beta is .*; it must be (positive|a number)"),
            gate(pair_batch(), beta=beta),
        ):
            pass


def test_without_a_target_steps_are_counted():
    model = lora_model("llama")
    gate = AlphaToken(model, config=AlphaTokenConfig(num_layers=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(3):
        sft_loss(model, sft_batch("right"), gate).backward()
        assert gate.metrics()["target_age"] == step
        optimizer.step()
    assert gate.state_dict()["age"] == gate.state_dict()["age"] == 3


def sft_loss_beside(gate, other, batch):
    with gate(batch):
        sft_loss(other, batch).backward()


def test_strict_is_an_argument():
    model = lora_model("llama")
    gate = AlphaToken(model, target=cases.validation(), config=AlphaTokenConfig(stability_weight=0), strict=False)
    with pytest.warns(UserWarning, match="nothing was masked"), gate(sft_batch()):
        pass


@pytest.mark.parametrize("strict", [True, False])
def test_a_call_without_with(strict):
    """Like a coroutine that is never awaited: a warning at that line, and an error where it goes on."""
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model)
    gate.strict = strict
    with pytest.warns(RuntimeWarning, match=r"context never entered.*Write `with alphatoken\(batch\):`") as told:
        gate(batch)
    assert [warning.filename for warning in told] == [__file__]
    if strict:
        with pytest.raises(RuntimeError, match="context never entered"):
            gate(batch)
    with contextlib.ExitStack() as stack:  # said once; and entered in other ways than by `with`
        context = gate(batch)
        assert stack.enter_context(context) is gate
        model(**batch).loss.backward()
    assert 0 < float(gate.weights.sum()) < float((batch["labels"] != -100).sum())


def test_where_there_is_nothing_to_mask_a_call_without_with_is_none(recwarn):
    model, batch = lora_model("llama"), sft_batch()
    off = AlphaToken(model, config=AlphaTokenConfig(rho=1.0))
    off(batch)
    gate = gate_for(model)
    with torch.no_grad():
        gate(batch)
    for each in (off, gate):
        with each(batch):
            model(**batch).loss.backward()
    assert not [warning for warning in recwarn if "never entered" in str(warning.message)]


def test_a_call_that_failed_is_no_context_left():
    gate = gate_for(lora_model("llama"))
    with pytest.raises(TypeError, match="unexpected keyword"):
        gate(sft_batch(), no_such_option=1)
    with pytest.raises(KeyError, match="mine"), gate(sft_batch()):
        raise KeyError("mine")


def test_the_bodys_own_error_comes_first():
    gate = gate_for(lora_model("llama"))
    with pytest.raises(KeyError, match="mine"), gate(sft_batch()):
        raise KeyError("mine")


# ------------------------------------------------------------------------------------------- nested contexts


def within_a_loss(model, gate, batch):
    sft_loss(model, batch, gate)


def within_itself(model, gate, batch):
    with gate(batch):
        model(**batch)


def within_another(model, gate, batch):
    with gate_for(model, estimator="difference")(batch):
        model(**batch)


@pytest.mark.parametrize("nested", [within_a_loss, within_itself, within_another])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_contexts_of_one_model_do_not_nest(estimator, nested):
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model, estimator=estimator)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"in an AlphaToken context already.*outside, or inside without it"):
        with gate(batch):
            nested(model, gate, batch)
    assert differences(before, snapshot(model), ignore=("torch generator",)) == []
    with gate(batch):
        model(**batch).loss.backward()
    with gate(batch):  # one after the other is what they are for
        model(**batch).loss.backward()


def test_a_pair_loss_within_a_context():
    model, batch = lora_model("llama"), pair_batch()
    gate = gate_for(model)
    with pytest.raises(RuntimeError, match="in an AlphaToken context already"), gate(batch):
        dpo_loss(model, None, batch, gate)


def test_contexts_of_two_models_nest():
    """Each masks its own: gradients are those of one after the other."""
    batch = sft_batch("right")
    together, apart = ([lora_model("llama", seed=seed) for seed in (0, 1)] for _ in range(2))
    gates = [gate_for(model) for model in together]
    with gates[0](batch), gates[1](batch):
        (together[0](**batch).loss + together[1](**batch).loss).backward()
    for model in apart:
        with gate_for(model)(batch):
            model(**batch).loss.backward()
    for one, other in zip(together, apart, strict=True):
        for name, gradient in grads_of(one).items():
            assert torch.equal(gradient, grads_of(other)[name]), name


# ------------------------------------------------------------------------------------------- steps that fail


@pytest.mark.parametrize("given", [False, True], ids=["valued", "weights"])
@pytest.mark.parametrize("place", ["loss", "after the backward"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_that_fails_is_not_counted(estimator, place, given):
    model, twin = lora_model("llama"), lora_model("llama")
    batch, other = sft_batch("right"), sft_batch("left", seed=1)
    gate, gate_of_twin = gate_for(model, estimator=estimator), gate_for(twin, estimator=estimator)
    options = {"weights": torch.ones_like(batch["labels"])} if given else {}
    for one, its_gate in ((model, gate), (twin, gate_of_twin)):
        with its_gate(batch, kl_coef=0.1) as step:
            (one(**batch).loss + step.kl).backward()
    weights, values = gate.weights, gate.values
    with pytest.raises(KeyError), gate(other, kl_coef=0.1, **options):
        loss = model(**other).loss
        if place != "loss":
            loss.backward()
        raise KeyError
    assert gate.weights is weights and gate.values is values
    found, wanted = gate.metrics(), gate_of_twin.metrics()
    ignored = ("seconds", "difference_rms")  # one differs anyway; the other is the last nudge's, whatever came of it
    assert {n: v for n, v in found.items() if n not in ignored} == {n: v for n, v in wanted.items() if n not in ignored}
    assert found["seconds"] > 0 and {"kept", "kl"} <= found.keys()


def test_figures_that_were_read_within_a_step_that_fails_are_not_counted_again():
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model)
    with gate(batch):
        model(**batch).loss.backward()
    with pytest.raises(KeyError), gate(batch):
        assert "kept" in gate.metrics()
        raise KeyError
    assert "kept" not in gate.metrics()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_share_of_nothing(estimator):
    """A batch without a response token adds nothing; alone it gives no share, not one of 0."""
    model, batch = lora_model("llama"), sft_batch("right")
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    gate = gate_for(model, estimator=estimator)
    with gate(empty):
        model(**batch).logits.sum().backward()
    assert not {"kept", "total"} & gate.metrics().keys()
    for each in (batch, empty):
        with gate(each):
            model(**batch).loss.backward()
    kept = gate.metrics()["kept"]
    with gate(batch):
        model(**batch).loss.backward()
    assert kept == gate.metrics()["kept"] > 0


@pytest.mark.parametrize("decay", [0.5, None])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_target_that_is_not_finite_is_dropped(estimator, decay):
    """Twice, with an error that names the target batches; then steps go on."""
    model, batch = lora_model("llama"), sft_batch("right")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    gate = gate_for(model, estimator=estimator, target_decay=decay)
    overflow = False

    def spoil(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden * float("inf") if overflow and hidden.shape[:2] != batch["labels"].shape else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.base_model.model.model.layers[1].register_forward_hook(spoil)
    for overflow in (False, True, True, False, False):
        optimizer.zero_grad()
        if overflow:
            error = pytest.raises(FloatingPointError, match=r"target's validation loss is not finite.*dropped")
            with error, gate(batch):
                model(**batch).loss.backward()
            assert gate.target is None
        else:
            with gate(batch):
                model(**batch).loss.backward()
            optimizer.step()
    for name, gradient in gate.target.gradients.items():
        assert bool(gradient.isfinite().all()), name
    assert 0 < float(gate.weights.sum()) < float((batch["labels"] != -100).sum())
