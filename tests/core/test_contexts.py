"""The `AlphaToken` context when it is used otherwise than meant, or when a step in it fails."""

from __future__ import annotations

import cases
import pytest
import torch
from batches import pair_batch, sft_batch
from checks import grads_of
from models import lora_model
from state import differences, snapshot

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, dpo_loss, sft_loss

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


def sft_loss_beside(gate, other, batch):
    with gate(batch):
        sft_loss(other, batch).backward()


def test_strict_is_an_argument():
    model = lora_model("llama")
    gate = AlphaToken(model, target=cases.validation(), config=AlphaTokenConfig(stability_weight=0), strict=False)
    with pytest.warns(UserWarning, match="nothing was masked"), gate(sft_batch()):
        pass


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
