"""The KL penalty on small models."""

from __future__ import annotations

import reference
import torch
from batches import response

COEF = 0.3


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
