"""What `sft_loss` and `dpo_loss` take as weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..batches.batch import Batch
from ..models.structure import unwrap


@runtime_checkable
class Valuing(Protocol):
    """An `AlphaToken`, as far as a loss knows it: entered with a batch, it masks the forward that runs inside."""

    model: nn.Module
    kl: torch.Tensor | None

    def __call__(self, batch: Batch, **options: Any) -> AbstractContextManager[Any]: ...


Weights = torch.Tensor | Valuing | None


def valuing(model: nn.Module, batch: Batch, weights: Any, **options: Any) -> AbstractContextManager[Any]:
    """The context that a loss runs its forward in."""
    if weights is None:
        return nullcontext()
    if isinstance(weights, nn.Module) or not isinstance(weights, Valuing):
        raise TypeError(f"weights is a {type(weights).__name__}; it must be a tensor, an AlphaToken or None.")
    if unwrap(weights.model) is not unwrap(model):
        raise ValueError("The AlphaToken was made for another model object. Make one for this model.")
    return weights(batch, **options)


def check_weights(weights: torch.Tensor, batch: Batch) -> None:
    if tuple(weights.shape) != batch.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} and the labels {batch.shape}; they must agree, one weight per "
            "label, unshifted."
        )
