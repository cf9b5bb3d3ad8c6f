"""The ghost estimator: position-local token values as contractions d^T C h (arXiv 2606.01635, Eqs. 8 to 12).

contractions.py has the arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..models.modes import walked_once
from ..models.replay import Capture, capturing
from ..models.taps import Taps
from ..models.tensors import accumulation_dtype
from ..values import TokenValues
from .base import Estimator, NonFiniteRows, Task, check_weights_finite
from .contractions import Contractor


class Ghost(Estimator):
    """Values one batch by going back through its scored blocks: in the forward's graph, or by running them again."""

    layers = 3
    scope = "lora"
    values_others = True
    terms = (
        "adaptation", "stability", "direct_target", "causal_target", "direct_drift", "causal_drift", "grad_norm",
    )  # fmt: skip

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.capture = Capture(task.scored, task.batch)
        self.parts = task.parts
        once = task.training and walked_once(task.scored.blocks)
        in_graph = task.training and task.valued and not once  # else blocks are run again
        self.taps = Taps(task.scored, task.batch.shape, causal=task.config.causal_window > 0) if in_graph else None

    @property
    def seen(self) -> bool:
        return self.capture.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Keep what one forward leaves, and pass the last block's output through `on_hidden`."""

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            if self.taps is not None:
                self.capture.graph = (self.taps, hidden)
            return on_hidden(hidden)

        with contextlib.ExitStack() as stack:
            if self.taps is not None:
                stack.enter_context(self.taps.installed(self.capture.scored.sites))
            stack.enter_context(capturing(self.capture, leave, training=self.task.training))
            yield

    def values(self, rows: torch.Tensor) -> TokenValues:
        """From the gradient `(B, T, hidden)` at the last block's output.

        Raises:
            FloatingPointError: rows are finite and values are not; the message names the linear.
        """
        batch, others, config = self.task.batch, self.task.others, self.task.config
        found = self._contracted(rows)
        names = (("target",) if others is not None else ()) + tuple(self.parts)
        empty = torch.zeros(batch.shape, dtype=accumulation_dtype(rows), device=rows.device)

        def term(accumulated: torch.Tensor | float, name: str) -> torch.Tensor:
            if not isinstance(accumulated, torch.Tensor) or name not in names:
                return empty
            return batch.at_labels(accumulated[..., names.index(name)])

        direct_target, causal_target = term(found.direct, "target"), term(found.causal, "target")
        direct_drift, causal_drift = term(found.direct, "drift"), term(found.causal, "drift")
        adaptation, stability = direct_target + causal_target, direct_drift + causal_drift
        total = adaptation + config.stability_weight * stability
        if not total.isfinite().all():
            self._blame(rows)
            self._contracted(rows, check=True)  # a second walk, to name the linear
            raise FloatingPointError("Token values are not finite in the causal terms: attention overflowed.")
        grad_norm = batch.at_labels(found.norms[..., 0].sqrt()) if isinstance(found.norms, torch.Tensor) else None
        return TokenValues(
            total, adaptation, stability, direct_target, causal_target, direct_drift, causal_drift, grad_norm
        )

    def _contracted(self, rows: torch.Tensor, *, check: bool = False) -> Contractor:
        task, window = self.task, self.task.config.causal_window
        contractor = Contractor(
            task.scored, task.batch, self.parts, window=window, norms=task.apart, others=task.others, check=check
        )
        self.capture.visit(rows, contractor, causal=window > 0)
        return contractor

    def _blame(self, rows: torch.Tensor) -> None:
        """Raise an error for values that are not finite, if the cause was there before the backward."""
        capture = self.capture
        check_weights_finite(capture.scored)
        for name in capture.scored.parameters:
            if not all(part[name].isfinite().all() for part in self.parts.values()):
                raise FloatingPointError(
                    f"The target gradient or the drift of {name} is not finite. Look at the validation batches and the "
                    "Fisher."
                )
        if rows.isfinite().all():
            if capture.in_float16:
                raise NonFiniteRows(
                    "Gradients overflow float16 within the scored blocks. Use a lower loss scale, or bf16."
                )
            return
        for index, call in enumerate(capture.calls):
            if not call.hidden.isfinite().all():
                block = capture.scored.total - len(capture.scored.blocks) + index
                raise NonFiniteRows(
                    f"The input of block {block} of the model is not finite: an earlier layer overflowed."
                )
        raise NonFiniteRows("The gradient of the loss is not finite at the last block's output. Look at the loss.")

    def release(self) -> None:
        self.parts = {}
        self.capture.release()
