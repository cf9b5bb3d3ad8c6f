"""Sums and rows of all processes of a distributed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def all_sum(tensors: list[torch.Tensor]) -> None:
    """Add tensors over all processes, in place; alone, nothing happens."""
    if _several():
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_counts(counts: Sequence[int], device: torch.device | None) -> list[int]:
    """The sums of numbers over all processes; alone, the numbers themselves, and no device is waited for."""
    if not _several():
        return list(counts)
    total = torch.tensor(counts, device=device)
    dist.all_reduce(total)
    return total.tolist()


def in_any(here: bool, device: torch.device | None) -> bool:
    """Whether it is so in any process; alone, in this one."""
    return all_counts([int(here)], device) != [0]


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, on the CPU; alone, its own."""
    if not _several():
        return rows.cpu()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, rows.cpu())
    return torch.cat(found)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
