"""The directions along which tokens are valued: toward the target, and back toward the reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..models import tensors
from ..models.sites import Scored
from ..models.tensors import accumulation_dtype
from .drift import drift as drift_of
from .fisher import Fisher
from .preconditioning import preconditioned
from .target import Target

Parts = dict[str, Mapping[str, torch.Tensor]]


def directions(
    scored: Scored,
    target: Target | None,
    fisher: Fisher | None,
    ref_model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Parts:
    """Part of the value, "target" and "drift", whichever there are -> parameter name -> its gradient, as the optimizer
    will scale it where one is given."""
    parts: Parts = {}
    if target is not None:
        target.check(scored)
        parts["target"] = target.gradients
    if fisher is not None:
        parts["drift"] = drift_of(fisher, scored, ref_model)
    parts = {
        name: {n: part[n].to(p.device, accumulation_dtype(p)) for n, p in scored.parameters.items()}
        for name, part in parts.items()
    }
    if optimizer is not None:
        parts.update(preconditioned(parts, scored.parameters, optimizer))
    return parts


def merged(parts: Parts, stability_weight: float) -> Parts:
    """One direction, "total" = target + stability_weight * drift; a part that is missing counts as zero."""
    total = parts.get("target")
    if "drift" in parts:
        drift = parts["drift"]
        total = (
            tensors.scaled(drift, stability_weight) if total is None else tensors.added(total, drift, stability_weight)
        )
    return {} if total is None else {"total": total}
