"""Sums over the processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_sum(tensors: list[torch.Tensor], count: int) -> int:
    """Add tensors, in place, and a count over all processes; alone, nothing happens."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    for tensor in tensors:
        dist.all_reduce(tensor)
    device = tensors[0].device if tensors else None
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)
