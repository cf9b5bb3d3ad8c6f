"""Gradients of a batch's loss: by an ordinary backward, or a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..losses.logps import token_logps
from ..models.changes import Changes
from ..models.modes import refuse_inference_mode, without_noise
from ..models.replay import capture_without_graph
from ..models.sites import Scored
from ..models.structure import runs_apart, unwrap

Loss = Callable[[nn.Module], torch.Tensor]  # runs a model, and returns a scalar


def loss_gradients(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], loss: Batch | Loss, *, first: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of a loss by an ordinary backward, which leaves `.grad` alone; zeros for a parameter that has none.

    Args:
        loss: a loss, or a batch for the sum of its token losses.
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
            value = loss(inner) if callable(loss) else -token_logps(inner, loss).sum()
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def scored_gradients(
    model: nn.Module, scored: Scored, batch: Batch, loss: Loss | None = None
) -> dict[str, torch.Tensor]:
    """Gradient, at the scored parameters, of a loss that runs the model on a batch (by default the sum of its token
    losses).

    The graph holds the scored blocks and what follows. Not so for a checkpointed model, whose memory is short: then
    the blocks are run again, one at a time.
    """
    short = any(getattr(block, "gradient_checkpointing", False) for block in scored.blocks)
    if scored.in_blocks and short and runs_apart(model):
        capture, rows = capture_without_graph(model, scored, batch, loss or (lambda m: -token_logps(m, batch).sum()))
        return capture.gradients(rows, scored.parameters)
    return loss_gradients(model, scored.parameters, loss or batch, first=scored.blocks[0] if scored.in_blocks else None)
