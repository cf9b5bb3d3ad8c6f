"""theta* on an ordinary copy of the model: torch's Adam, and the drift as autograd's gradient of 0.5 sum F dW^2."""

from __future__ import annotations

import cases
import reference
import torch
from batches import is_pairs, response, stacked
from models import FAMILIES

from alphatoken_loss import Fisher

FAMILY = "llama"


def given_fisher(model, k="all", seed=0):
    return Fisher.from_diagonals(cases.fisher_tensors(model, FAMILY, k, seed=seed))


def names_of(model, k="all", adapter="default"):
    return cases.factor_names(model, FAMILY, k, adapter)


def drift_energy(work, layers, fisher, start=None):
    """0.5 sum F dW^2, with a graph; `start` layers are what the reference has."""
    parameters = dict(work.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for i, layer in enumerate(layers):
        delta = layer.scale * parameters[layer.b] @ parameters[layer.a]
        if start is not None:
            delta = delta - start[i].scale * (parameters[start[i].b] @ parameters[start[i].a]).detach()
        total = total + 0.5 * (fisher[layer.name] * delta.square()).sum()
    return total


def validation_loss(work, ref_logps, batch, *, beta=0.1, likelihood=1.0):
    """Mean token loss; for pairs the mean DPO loss and the mean token loss of the chosen answers."""
    rows, mask = stacked(batch), response(batch)
    nll = reference.token_nll(work, rows)
    if not is_pairs(batch):
        return nll.sum() / mask.sum()
    half = len(mask) // 2
    dpo = reference.dpo_sum(ref_logps, beta)(nll) / half
    return dpo + likelihood * nll[:half].sum() / mask[:half].sum()


def explicit_path(model, batches, *, steps, rate, weight=1.5, k="all", seed=0, wrong="", **options):
    """theta* by name. `wrong` plants a mistake."""
    fisher = cases.fisher_tensors(model, FAMILY, k, seed=seed)
    refs = [reference.reference_logps(model, batch) if is_pairs(batch) else None for batch in batches]
    layers = reference.scored_layers(model, FAMILIES[FAMILY], k)
    work = reference.frozen_copy(model)
    has_ref = reference.reference_adapter(model) == "ref"
    start = reference.scored_layers(model, FAMILIES[FAMILY], k, "ref") if has_ref else None
    parameters = {name: dict(work.named_parameters())[name] for name in names_of(model, k)}
    optimizer = torch.optim.Adam(parameters.values(), lr=rate)
    for step in range(steps):
        i = step % len(batches) if wrong != "first batch" else 0
        loss = validation_loss(work, refs[i], batches[i], **options)
        if wrong == "drift":
            weight = -abs(weight)
        loss = loss + weight * drift_energy(work, layers, fisher, start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in parameters.items()}


def at(model, parameters):
    """An ordinary copy of the model at theta*."""
    work = reference.frozen_copy(model)
    own = dict(work.named_parameters())
    with torch.no_grad():
        for name, tensor in parameters.items():
            own[name].copy_(tensor)
    return work


def explicit_values(model, parameters, batch, *, wrong=""):
    """l_t(theta) - l_t(theta*) of two forwards, with the branch's sign."""
    rows = stacked(batch)
    with torch.no_grad():
        here, there = (
            reference.token_nll(work, rows) for work in (reference.frozen_copy(model), at(model, parameters))
        )
    values = there - here if wrong == "sign" else here - there
    if is_pairs(batch) and wrong != "branch":
        values[len(values) // 2 :] *= -1
    return values.roll(1, 1) if wrong == "shift" else values
