"""Sums and rows of all processes of a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_sum(tensors: list[torch.Tensor], count: int) -> int:
    """Add tensors, in place, and a count over all processes; alone, nothing happens."""
    if not _several():
        return count
    for tensor in tensors:
        dist.all_reduce(tensor)
    device = tensors[0].device if tensors else None
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, on the CPU; alone, its own."""
    if not _several():
        return rows.cpu()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows.cpu())
    return torch.cat(found)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
