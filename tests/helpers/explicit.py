"""Exact token values, one backward per token, and the directions that tests value along."""

from __future__ import annotations

import contextlib

import cases
import reference
import torch
from batches import is_pairs, response, stacked
from models import FAMILIES
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@contextlib.contextmanager
def norms_in_own_dtype():
    """transformers' RMSNorm computes in float32 whatever it is given; here in float64, so that 1e-9 means something."""
    before = LlamaRMSNorm.forward

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        LlamaRMSNorm.forward = before


def directions(model, family, k, seed=0, adapter="default"):
    """(target, drift) of the tests' validation batches and Fisher, from the reference."""
    names = cases.factor_names(model, family, k, adapter)
    layers = reference.scored_layers(model, FAMILIES[family], k, adapter)
    target = reference.target_gradient(model, cases.validation(seed), names)
    return target, reference.drift_gradient(model, layers, cases.fisher_tensors(model, family, k, adapter, seed))


def per_token(model, batch, *each, beta=0.1, ref_model=None, work=None):
    """For each direction `(B, T)`: the inner product with every token's own gradient, one backward per token.

    For pairs the token's gradient is that of the DPO loss through its log-probability: -sign * omega * grad log p.
    """
    rows, mask = stacked(batch), response(batch)
    work = work or reference.frozen_copy(model)
    nll = reference.token_nll(work, rows)
    factor = torch.ones(len(mask), dtype=nll.dtype)
    if is_pairs(batch):
        s = reference.margins(nll.detach(), reference.reference_logps(model, batch, ref_model), beta)
        omega = (beta * torch.sigmoid(-s)).to(nll.dtype)
        factor = torch.cat([omega, -omega])
    parameters = dict(work.named_parameters())
    found = [torch.zeros(mask.shape, dtype=nll.dtype) for _ in each]
    for b, t in mask.nonzero().tolist():
        names = list(each[0])
        grads = torch.autograd.grad(nll[b, t], [parameters[n] for n in names], retain_graph=True, allow_unused=True)
        for out, direction in zip(found, each, strict=True):
            products = [(g * direction[n].to(g)).sum() for n, g in zip(names, grads, strict=True) if g is not None]
            out[b, t] = factor[b] * sum(products)
    return found
