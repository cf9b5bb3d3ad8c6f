"""From a gradient at a hidden state and how that state changes to token values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..models.sites import Scored
from ..models.tensors import accumulation_dtype
from ..values import TokenValues


class NonFiniteRows(FloatingPointError):
    """The gradient at the last block's output is itself not finite: the loss overflowed, not the valuation."""


def not_finite(part: str) -> str:
    which = {"target": "target gradient", "drift": "drift"}.get(part, "target gradient or the drift")
    return f"The {which} is not finite. Look at the validation batches and the Fisher."


def values_of_changes(
    scored: Scored,
    batch: Batch,
    config: AlphaTokenConfig,
    parts: tuple[str, ...],
    rows: torch.Tensor,
    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor | float]],
) -> TokenValues:
    """Token values from the gradient at a hidden state and how that state changes along each direction.

    Args:
        rows (`torch.Tensor`): `(B, T, hidden)`.
        changes (`dict`): part -> the change `(B, T, hidden)` and the step that made it; one that is missing is zero.

    Raises:
        FloatingPointError: values are not finite.
    """
    dtype = accumulation_dtype(rows)
    rows = rows[:, -batch.shape[1] :].to(dtype)
    nothing = torch.zeros(batch.shape, dtype=dtype, device=rows.device)

    def term(part: str) -> torch.Tensor:
        if part not in changes:
            return nothing
        change, step = changes[part]
        return batch.at_labels((rows * change[:, -batch.shape[1] :].to(dtype)).sum(-1) / step)

    if "total" in parts:
        values = TokenValues(term("total"))
    else:
        adaptation, stability = term("target"), term("drift")
        values = TokenValues(adaptation + config.stability_weight * stability, adaptation, stability)
    if not values.total.isfinite().all():
        for name, parameter in scored.parameters.items():
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"The adapter weight {name} is not finite, so nothing can be valued. Lower the learning rate, clip "
                    "gradients, or go back to a checkpoint."
                )
        for part, (_, step) in changes.items():
            if not 0 < step < float("inf"):
                raise FloatingPointError(not_finite(part))
        if not rows[batch.rows].isfinite().all():
            raise NonFiniteRows("The gradient of the loss is not finite at the hidden state. Look at the loss.")
        raise FloatingPointError(
            "Token values are not finite: the hidden state overflows. Use bf16 instead of float16, or float32."
        )
    return values
