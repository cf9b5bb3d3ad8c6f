"""Linears that are trained themselves: dense target and drift, no adapters."""

from __future__ import annotations

import copy

import cases
import pytest
import reference
import torch
from batches import response, sft_batch
from cases import compare
from checks import TOL64, assert_close, assert_same_grads, grads_of
from models import FAMILIES, base_model

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, alphatoken_weights, target_gradient

K = 2


def trained_model(family, seed=0):
    """All linears of all blocks trainable and moved; embeddings, norms, biases and head frozen."""
    model = base_model(family, seed=seed)
    start = copy.deepcopy(model)
    linears = {f"{FAMILIES[family].blocks.format(i)}.{x}.weight" for i in range(3) for x in FAMILIES[family].linears}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in linears)
            if name in linears:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, start.requires_grad_(False)


def setting(model, family):
    layers = reference.plain_layers(model, FAMILIES[family], K)
    generator = torch.Generator().manual_seed(5)
    fisher = {}
    for layer in layers:
        shape = dict(model.named_parameters())[f"{layer.name}.weight"].shape
        shape = shape[::-1] if family == "gpt2" else shape
        fisher[layer.name] = torch.randn(shape, generator=generator, dtype=torch.float64).exp()
    names = [f"{layer.name}.weight" for layer in layers]
    return fisher, names


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_values(family):
    model, start = trained_model(family)
    batch = sft_batch("right")
    fisher, names = setting(model, family)
    target = reference.target_gradient(model, cases.validation(), names)
    expected = reference.full_values(
        model, start, family, batch, target=target, fisher=fisher, k=K, window=cases.WINDOW
    )
    config = AlphaTokenConfig(num_layers=K, causal_window=cases.WINDOW)
    weights, values = alphatoken_weights(
        model,
        start,
        batch,
        target=cases.validation(),
        fisher=Fisher.from_diagonals(fisher),
        config=config,
        return_values=True,
    )
    compare(values, expected, batch, TOL64)
    assert torch.equal(weights, reference.keep(expected.total, batch, 0.5).float())
    found = target_gradient(model, cases.validation(), config=config)
    assert set(found.gradients) == set(names)
    for name in names:
        assert_close(found.gradients[name], target[name], TOL64, name)


def test_gate():
    model, start = trained_model("llama")
    batch = sft_batch("right")
    fisher, names = setting(model, "llama")
    target = reference.target_gradient(model, cases.validation(), names)
    values = reference.full_values(model, start, "llama", batch, target=target, fisher=fisher, k=K, window=cases.WINDOW)
    mask = reference.keep(values.total, batch, 0.5)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    config = AlphaTokenConfig(num_layers=K, causal_window=cases.WINDOW)
    gate = AlphaToken(model, start, target=cases.validation(), fisher=Fisher.from_diagonals(fisher), config=config)
    with gate(batch):
        model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_a_reference_is_needed():
    """W - W_ref needs a W_ref: without a second model there is none, and the error says so."""
    model, _ = trained_model("llama")
    fisher, _ = setting(model, "llama")
    with pytest.raises(ValueError, match="ref_model"):
        alphatoken_weights(
            model,
            None,
            sft_batch("right"),
            target=cases.validation(),
            fisher=Fisher.from_diagonals(fisher),
            config=AlphaTokenConfig(num_layers=K),
        )
