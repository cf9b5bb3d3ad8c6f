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


def mean_loss(work, group, *, beta=0.1, likelihood=1.0):
    """Of batches with their reference log-probabilities, as if they were one: the mean token loss; for pairs the mean
    DPO loss and the mean token loss of the chosen answers."""
    chosen = dpo = torch.zeros((), dtype=torch.float64)
    tokens = pairs = 0
    for batch, ref_logps in group:
        rows, mask = stacked(batch), response(batch)
        nll = reference.token_nll(work, rows)
        half = len(mask) // 2 if is_pairs(batch) else len(mask)
        chosen, tokens = chosen + nll[:half].sum(), tokens + mask[:half].sum()
        if is_pairs(batch):
            dpo, pairs = dpo + reference.dpo_sum(ref_logps, beta)(nll), pairs + half
    return dpo / pairs + likelihood * chosen / tokens if pairs else chosen / tokens


def in_groups(batches, least):
    """Neighbours together, until a group has `least` rows or pairs."""
    groups = [[]]
    for batch in batches:
        if sum(len(response(b)) // (1 + is_pairs(b)) for b in groups[-1]) >= least:
            groups.append([])
        groups[-1].append(batch)
    return groups


def explicit_path(model, batches, *, steps, rate, **options):
    """theta* by name."""
    *_, there = walk(model, batches, steps=steps, rate=rate, **options)
    return there


def walk(model, batches, *, steps, rate, weight=1.5, k="all", seed=0, wrong="", least=8, **options):
    """The parameters by name after each step; a step takes `least` rows. `wrong` plants a mistake."""
    fisher = cases.fisher_tensors(model, FAMILY, k, seed=seed)
    groups = in_groups(batches[:1] if wrong == "first batch" else batches, least)
    with_refs = [[(b, reference.reference_logps(model, b) if is_pairs(b) else None) for b in g] for g in groups]
    layers = reference.scored_layers(model, FAMILIES[FAMILY], k)
    work = reference.frozen_copy(model)
    has_ref = reference.reference_adapter(model) == "ref"
    start = reference.scored_layers(model, FAMILIES[FAMILY], k, "ref") if has_ref else None
    parameters = {name: dict(work.named_parameters())[name] for name in names_of(model, k)}
    optimizer = torch.optim.Adam(parameters.values(), lr=rate)
    for step in range(steps):
        loss = mean_loss(work, with_refs[step % len(groups)], **options)
        if wrong == "drift":
            weight = -abs(weight)
        loss = loss + weight * drift_energy(work, layers, fisher, start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {name: p.detach().clone() for name, p in parameters.items()}


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
