"""Arithmetic on all scored parameters' tensors at once.

An adapter has many small tensors. On a fast GPU a step waits for kernels to be launched, not for their arithmetic. The
functions that torch's optimizers use launch one kernel for dozens of tensors. Their names are private in torch, and are
used in this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


_LARGE = 2**20  # numbers in a tensor


def fingerprint(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Sums of the bits, of some tensors at a time: exact, in any precision."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = []
    for start in range(0, len(parameters), 32):
        alike: dict[Any, list[torch.Tensor]] = {}
        for p in parameters[start : start + 32]:
            alike.setdefault((p.device, p.dtype), []).append(p.contiguous().view(bits[p.element_size()]).flatten())
        for some in alike.values():
            small = [x for x in some if x.numel() < _LARGE]  # joined, for one kernel; large ones would be copied
            parts = [x.sum() for x in some if x.numel() >= _LARGE] + ([torch.cat(small).sum()] if small else [])
            sums.append(torch.stack(parts).sum())
    return torch.stack([some.to(sums[0].device) for some in sums])
