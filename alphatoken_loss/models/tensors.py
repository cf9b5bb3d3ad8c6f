"""Arithmetic on all scored parameters' tensors at once.

An adapter's tensors are small and many. On a fast GPU a step waits for its kernels to be launched, not for their
arithmetic, and what torch's optimizers use launches one for dozens of tensors. The names are private in torch, and
are used in this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Named = Mapping[str, torch.Tensor]


def scaled(tensors: Named, factor: float | torch.Tensor) -> dict[str, torch.Tensor]:
    """factor * x; a factor that is a 0-dim tensor is not waited for, and may lie on another device."""
    if isinstance(factor, torch.Tensor) and len(devices := {x.device for x in tensors.values()}) > 1:
        there = {device: factor.to(device) for device in devices}
        return {name: x * there[x.device] for name, x in tensors.items()}
    return dict(zip(tensors, torch._foreach_mul(list(tensors.values()), factor), strict=True))


def added(tensors: Named, others: Named, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """x + factor * y, for the names of the first."""
    second = [others[name] for name in tensors]
    return dict(zip(tensors, torch._foreach_add(list(tensors.values()), second, alpha=factor), strict=True))


def divided(tensors: Named, others: Named) -> dict[str, torch.Tensor]:
    """x / y, for the names of the first."""
    return dict(
        zip(tensors, torch._foreach_div(list(tensors.values()), [others[name] for name in tensors]), strict=True)
    )


def length_of(tensors: Named) -> torch.Tensor:
    """Euclidean length over all of them, a 0-dim tensor on the first one's device."""
    norms = torch._foreach_norm(list(tensors.values()))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def positive(total: torch.Tensor) -> torch.Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny)
