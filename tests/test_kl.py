"""The KL to the reference: value and gradient of the formula on whole logits, beside any loss and past any gate."""

from __future__ import annotations

import pytest
import reference
import torch
from batches import response, sft_batch
from checks import TOL64, assert_close, assert_same_grads, grads_of
from models import lora_model
from test_gate import CHECKPOINTING, checkpointed, gate_for

from alphatoken_loss import sft_loss

COEF = 0.3
KINDS = ("none", "right", "left", "ragged", "full", "packed")
ESTIMATORS = ("ghost", "difference", "exact")


def kl_sum(model, batch, ref_model=None, *, reverse=False, shift=0, mask=None):
    """The plain formula on whole logits: sum over response tokens and vocabulary."""
    ref = reference.frozen_copy(model, reference.reference_adapter(model)) if ref_model is None else ref_model
    with torch.no_grad():
        wanted = reference.logits_of(ref, batch).log_softmax(-1)
    logp = reference.logits_of(model, batch).log_softmax(-1)
    p, q = (logp, wanted) if reverse else (wanted, logp)
    tokens = (p.exp() * (p - q)).sum(-1).roll(1 - shift, 1)  # the row before a label predicts it
    return tokens[response(batch) if mask is None else mask].sum()


def penalised(model, batch, *, mask=None, num_items=None, coef=COEF, kl=None, ref_model=None):
    """Value and gradients: masked (or whole) mean loss, and coef times the mean KL."""
    work = reference.frozen_copy(model)
    mask = response(batch) if mask is None else mask
    count = float(response(batch).sum())
    penalty = (kl or kl_sum)(work, batch, ref_model)
    nll = reference.token_nll(work, batch)
    loss = (mask * nll).sum() / (num_items or mask.sum()) + coef * penalty / (num_items or count)
    plain = nll.sum() / (num_items or count) + coef * penalty / (num_items or count)
    return plain.detach(), loss.detach(), reference.gradients(work, loss)


def small_chunks(monkeypatch, rows=5):
    monkeypatch.setattr("alphatoken_loss.kl._ROWS", rows)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
def test_beside_the_loss(kind, weighted, seed, monkeypatch):
    small_chunks(monkeypatch)
    model, batch = lora_model("llama", seed=seed), sft_batch(kind, seed=seed)
    mask = response(batch)
    if weighted:
        mask = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.5)
    _, value, grads = penalised(model, batch, mask=mask)
    loss = sft_loss(model, batch, mask.float() if weighted else None, kl_coef=COEF)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["left", "packed", "ragged"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_past_the_gate(estimator, kind, how, monkeypatch):
    """Masked loss gradient + whole KL gradient, and the weights of a run without it."""
    small_chunks(monkeypatch)
    model, batch = lora_model("llama"), sft_batch(kind)
    alphatoken = gate_for(model, estimator=estimator)
    sft_loss(model, batch, alphatoken).backward()
    weights = alphatoken.weights
    assert 0 < float(weights.sum()) < float(response(batch).sum())
    model.zero_grad()
    value, _, grads = penalised(model, batch, mask=weights.bool())
    checkpointed(model, how)
    loss = sft_loss(model, batch, alphatoken, kl_coef=COEF)
    loss.backward()
    assert torch.equal(alphatoken.weights, weights)
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)
