"""What makes the weights of a batch in the gate: an estimator's values, or something else.

If weights are known before, the forward is watched only for its last hidden state. If they are made from the forward,
this is done at its end, when it returns logits or log-probabilities, which need not be held longer. If it returns none
(a loss that runs the head itself), weights are made in the backward, from the last hidden state.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..directions.source import Source
from ..estimators.base import Estimator, NonFiniteRows, Task
from ..losses.compare import Compared
from ..losses.forward import Forward, outputs_of
from ..models.decoder import Call, DecoderForward
from ..models.sites import Scored
from ..models.structure import unwrap
from ..selection.thresholds import select
from ..values import TokenValues


@contextlib.contextmanager
def _blaming_target(source: Source, scored: Scored) -> Iterator[None]:
    """If valuing fails since the target is not finite: forget that target, so that no average keeps it, and say so."""
    try:
        yield
    except FloatingPointError as error:
        finite = all(bool(p.isfinite().all()) for p in scored.parameters.values())
        if isinstance(error, NonFiniteRows) or not finite or not source.drop_bad_target():
            raise
        raise FloatingPointError(
            "The gradient of the target's validation loss is not finite: the model overflows on one of the target "
            "batches, or one holds what is not finite itself. That estimate was dropped, and the next step makes a new "
            "one from all of them. Look at the target batches; use bf16 instead of float16."
        ) from error


class Valued:
    """Weights by an estimator's values.

    Attributes:
        seen (`bool`): whether its forward has run.
        seconds (`float`): spent inside that forward.
        in_forward (`bool`): weights are known when the hidden state has passed the gate.
        compared (`Compared` or `None`): this forward compared with a second one of the estimator's own.
    """

    def __init__(self, estimator: type[Estimator], task: Task, source: Source) -> None:
        self._batch, self._config, self._scored, self._source = task.batch, task.config, task.scored, source
        self._estimator = estimator(task)
        self.release = self._estimator.release

    @property
    def seen(self) -> bool:
        return self._estimator.seen

    @property
    def seconds(self) -> float:
        return self._estimator.seconds

    @property
    def in_forward(self) -> bool:
        return self._estimator.in_forward and self._estimator.task.early

    @property
    def compared(self) -> Compared | None:
        return self._estimator.compared

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Watch one forward, and pass the hidden state `(B, T, hidden)` at the gate through `on_hidden`."""
        with _blaming_target(self._source, self._scored), self._estimator.watching(on_hidden):
            yield

    def weigh(self, rows: torch.Tensor | None) -> tuple[TokenValues, torch.Tensor]:
        """Values, and weights `(B, T)` at the labels, from the gradient at the hidden state that `on_hidden` was given;
        without it where `in_forward` is set."""
        with _blaming_target(self._source, self._scored):
            values = self._estimator.forward_values() if rows is None else self._estimator.values(rows)
        return values, select(values, self._batch, self._config)


class Weighed:
    """Weights that are known, or that are made from what the training forward has; to the gate, like `Valued`.

    Args:
        model (`nn.Module`): the model that runs; whatever is trained in it.
        batch (`Batch`): what it runs on.
        make (`Callable`, *optional*): makes `(B, T)` weights, aligned with the labels, from the forward; `None` if they
            are known.

    Attributes:
        seen (`bool`): whether the forward has run.
        seconds (`float`): spent making weights in the forward.
    """

    in_forward = False
    compared = None

    def __init__(self, model: nn.Module, batch: Batch, make: Callable[[Forward], torch.Tensor] | None) -> None:
        self.model, self.batch = unwrap(model), batch
        self._make = make
        self.seconds = 0.0
        self._watched = DecoderForward(self.model, batch, {}, training=True)
        self._forward: Forward | None = None
        self._weights: torch.Tensor | None = None

    @property
    def seen(self) -> bool:
        return self._watched.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """At the decoder's output."""

        def leave(call: Call, hidden: torch.Tensor) -> torch.Tensor:
            if self._make is not None:
                self._forward = Forward(self.model, self.batch, hidden)
            return on_hidden(hidden)

        def end(output: Any, kwargs: Mapping[str, Any]) -> None:
            if self._forward is not None:
                started = time.perf_counter()
                self._forward.take(output, kwargs)
                self._end()
                self.seconds += time.perf_counter() - started

        made = self._make is not None
        with outputs_of(self.model, end) if made else contextlib.nullcontext(), self._watched.watching(leave):
            yield

    def weigh(self, rows: torch.Tensor | None) -> tuple[None, torch.Tensor]:
        if self._weights is None:
            self._end()
        assert self._weights is not None
        return None, self._weights

    def release(self) -> None:
        self._forward = None

    def _end(self) -> None:
        assert self._forward is not None and self._make is not None
        forward, self._forward = self._forward, None
        with torch.no_grad():
            weights = self._make(forward).to(self.batch.labels.device)
        self._weights = self.batch.at_labels(weights.roll(-1, 1))
        forward.release()


Weigher = Valued | Weighed  # what the gate has of that which makes the weights of one batch
