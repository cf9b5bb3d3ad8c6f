"""What the difference and exact estimators share: values from how a hidden state changes along each direction.

Let r_t be the gradient of the loss at the hidden state h_t, and dh_t the change of h_t when the scored parameters make
a step eps along a direction. The value of token t is <r_t, dh_t> / eps.
"""

from __future__ import annotations

import torch

from ..directions.parts import merged
from ..models.tensors import accumulation_dtype
from ..values import TokenValues
from .base import Estimator, NonFiniteRows, Task, check_weights_finite


class ByChange(Estimator):
    """Values a batch by the change of its hidden state.

    Attributes:
        parts (`tuple`): the parts of the value: "total" alone, or "target" and "drift", if they exist.
        directions (`dict`): part -> parameter name -> direction; freed when it was followed.
        changes (`dict`): part -> the change `(B, T, hidden)`, and the step that made it; a missing part is zero.
    """

    terms = ("adaptation", "stability")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        parts = task.parts if task.apart else merged(task.parts, task.config.stability_weight)
        self.parts, self.directions = tuple(parts), dict(parts)
        self.changes: dict[str, tuple[torch.Tensor, torch.Tensor | float]] = {}

    def release(self) -> None:
        self.changes = {}

    def values(self, rows: torch.Tensor) -> TokenValues:
        """From the gradient `(B, T, hidden)` at the hidden state that `on_hidden` was given.

        Raises:
            FloatingPointError: values are not finite.
        """
        batch = self.task.batch
        dtype = accumulation_dtype(rows)
        rows = rows[..., -batch.shape[1] :, :].to(dtype)  # behind any virtual tokens
        nothing = torch.zeros(batch.shape, dtype=dtype, device=rows.device)

        def term(part: str) -> torch.Tensor:
            if part not in self.changes:
                return nothing
            change, step = self.changes[part]
            products = (rows * change[..., -batch.shape[1] :, :].to(dtype)).sum(-1)
            return batch.at_labels(products.view(-1, *batch.shape).sum(0) / step)  # of Gemma 3n's several streams

        if "total" in self.parts:
            values = TokenValues(term("total"))
        else:
            adaptation, stability = term("target"), term("drift")
            values = TokenValues(adaptation + self.task.config.stability_weight * stability, adaptation, stability)
        if not values.total.isfinite().all():
            self._blame(rows)
        return values

    def _blame(self, rows: torch.Tensor) -> None:
        """Raise an error that names what makes values not finite."""
        check_weights_finite(self.task.scored)
        for part, (_, step) in self.changes.items():
            if not 0 < step < float("inf"):
                raise FloatingPointError(not_finite(part))
        if not rows.movedim(-1, 0)[..., self.task.batch.rows].isfinite().all():
            raise NonFiniteRows("The gradient of the loss is not finite at the hidden state. Look at the loss.")
        raise FloatingPointError(
            "Token values are not finite: the hidden state overflows. Use bf16 instead of float16, or float32."
        )


def not_finite(part: str) -> str:
    which = {"target": "target gradient", "drift": "drift"}.get(part, "target gradient or the drift")
    return f"The {which} is not finite. Look at the validation batches and the Fisher."
