"""Noise of a model's own: what a second forward draws is drawn again by the training forward."""

from __future__ import annotations

import cases
import pytest
import torch
from batches import sft_batch
from models import lora_model

from alphatoken_loss import AlphaToken, AlphaTokenConfig
from alphatoken_loss.models.modes import may_draw


class Noisy(torch.nn.Module):
    """A user's own module, of which nothing tells that it draws."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + 0.1 * torch.randn_like(hidden)


def with_noise():
    model = lora_model("llama")
    layers = model.get_base_model().model.layers
    layers[0].mlp = Noisy(layers[0].mlp)
    return model


def test_what_may_draw():
    assert not may_draw(lora_model("llama"))
    assert may_draw(with_noise())
    assert may_draw(lora_model("llama", lora_dropout=0.1))


@pytest.mark.parametrize("estimator", ["difference", "path"])
def test_a_step_draws_what_a_plain_one_draws(estimator):
    model, batch = with_noise(), sft_batch("right", seed=1)
    torch.manual_seed(5)
    plain = model(**batch, use_cache=False).loss
    after = torch.get_rng_state()
    options = {"path_steps": 1, "path_rate": 1e-2} if estimator == "path" else {}
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0, **options)
    gate = AlphaToken(model, target=cases.validation(), config=config)
    with gate(batch):
        torch.manual_seed(5)
        gated = model(**batch, use_cache=False).loss
        gated.backward()
    assert torch.equal(gated, plain)
    assert torch.equal(torch.get_rng_state(), after)
