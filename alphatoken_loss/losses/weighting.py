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
    """What a loss needs of an `AlphaToken`: called with a batch, it is a context that masks the forward inside it."""

    model: nn.Module
    ref_model: nn.Module | None
    kl: torch.Tensor | None
    columns: tuple[str, ...]

    def __call__(self, batch: Batch, **options: Any) -> AbstractContextManager[Any]: ...


Weights = torch.Tensor | Valuing | None


def valuing(model: nn.Module, batch: Batch, weights: Any, **options: Any) -> AbstractContextManager[Any]:
    """The context in which a loss runs its forward."""
    if weights is None:
        return nullcontext()
    if isinstance(weights, nn.Module) or not isinstance(weights, Valuing):
        raise TypeError(f"weights is a {type(weights).__name__}; it must be a tensor, an AlphaToken or None.")
    if unwrap(weights.model) is not unwrap(model):
        raise ValueError("The AlphaToken was made for another model object. Make one for this model.")
    return weights(batch, **options)


def columns_of(weights: Any) -> tuple[str, ...]:
    """The columns of a batch that the `AlphaToken` reads and the model does not."""
    return getattr(weights, "columns", ())


def checked_weights(
    weights: Any, batch: Batch, *, negative: bool = False, zeros: bool = True, what: str = "weights"
) -> torch.Tensor:
    """Check weights that will scale a gradient, and move them to the labels' device. The device is waited for once.

    Args:
        weights (`torch.Tensor`): `(B, T)` of any real dtype, one per label, unshifted. Where there is no label they are
            not read.
        negative (`bool`): allow weights below 0, which lower a token's probability.
        zeros (`bool`): allow a batch with labels whose weights are all 0.
        what (`str`): what an error calls them.

    Raises:
        TypeError: `weights` is no tensor.
        ValueError: the shape is not the labels', or values are not finite, negative or all 0.
    """
    if not isinstance(weights, torch.Tensor):
        raise TypeError(
            f"{what} is a {type(weights).__name__}; it must be a tensor of the labels' shape {batch.shape}."
        )
    if tuple(weights.shape) != batch.shape:
        raise ValueError(
            f"{what} have shape {tuple(weights.shape)} and the labels {batch.shape}; they must agree, one weight per "
            "label, unshifted."
        )
    if weights.is_complex():
        raise ValueError(f"{what} are complex; they must be real numbers.")
    weights = weights.detach().to(batch.labels.device)
    counted = batch.at_labels(weights.roll(-1, 1))
    flags = [counted.isfinite().all(), (counted >= 0).all(), (counted != 0).any(), batch.rows.any()]
    finite, positive, some, labelled = torch.stack(flags).tolist()
    if not finite:
        raise ValueError(f"{what} are not all finite. A token to be left out has weight 0, not nan.")
    if not (positive or negative):
        raise ValueError(
            f"{what} are below 0 for some labels (as low as {float(counted.min()):.3g}), which trains the model away "
            "from these tokens. If that is meant, say negative_weights=True; else clamp them at 0."
        )
    if labelled and not (some or zeros):
        raise ValueError(f"{what} are 0 for every label, so there is nothing to train on. Leave this batch out.")
    return weights
