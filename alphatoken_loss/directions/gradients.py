"""Gradients of a batch's loss by an ordinary backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..losses.logps import token_logps
from ..models.changes import Changes
from ..models.modes import refuse_inference_mode, without_noise
from ..models.structure import unwrap


def loss_gradients(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], batch: Batch, *, first: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of a batch's summed token losses by an ordinary backward, `.grad` untouched; zeros where none comes.

    Args:
        first (`nn.Module`, *optional*): the block that the graph begins with; no parameter may lie before it.
    """

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)  # the context below puts it back

    refuse_inference_mode()
    inner = unwrap(model)
    with torch.set_grad_enabled(first is None), without_noise(inner):
        with Changes() as changes:
            if first is not None:
                changes.hook(first, begin, before=True)
            loss = -token_logps(inner, batch).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }
