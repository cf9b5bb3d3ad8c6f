"""The directions that tokens are valued along: toward the target, and back toward the reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..models.sites import Scored
from ..models.tensors import accumulation_dtype
from .drift import drift
from .fisher import Fisher
from .preconditioning import preconditioned
from .target import Target

Parts = dict[str, Mapping[str, torch.Tensor]]


def check_target(target: object, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError for an optimizer without a target."""
    if target is None and optimizer is not None:
        raise ValueError(
            "An optimizer was given without a target. The other sequences of a batch, which stand in for one, are not "
            "preconditioned: pass target, or no optimizer."
        )


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
        parts["drift"] = drift(fisher, scored, ref_model)
    parts = {
        name: {n: part[n].to(p.device, accumulation_dtype(p)) for n, p in scored.parameters.items()}
        for name, part in parts.items()
    }
    if optimizer is not None:
        parts.update(preconditioned(parts, scored.parameters, optimizer))
    return parts
