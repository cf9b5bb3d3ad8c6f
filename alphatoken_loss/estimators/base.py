"""What an estimator is.

A batch meets it three times. Before the forward, its `Memory` prepares the directions along which tokens are valued
(by default the target gradient and the Fisher drift). During the forward, `watching` keeps what will be needed, and
passes the hidden state at the gate through a callback. In the backward, `values` turns the gradient at that state into
token values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..directions.parts import Parts
from ..directions.source import Source
from ..losses.compare import Compared
from ..models.sites import Scope, Scored
from ..values import TokenValues
from .others import Others


class NonFiniteRows(FloatingPointError):
    """The gradient that reached the gate is not finite: the loss has overflowed, not the values."""


def check_weights_finite(scored: Scored) -> None:
    """Raise FloatingPointError if a scored parameter is not finite: then nothing can be valued."""
    for name, parameter in scored.parameters.items():
        if not parameter.isfinite().all():
            half = parameter.dtype == torch.float16
            cure = "Train adapters in float32: float16 is too narrow for Adam" if half else "Lower the learning rate"
            raise FloatingPointError(
                f"The adapter weight {name} is not finite, so nothing can be valued. {cure}, clip gradients, or go "
                "back to a checkpoint."
            )


class Memory:
    """What an estimator keeps from batch to batch. This default keeps nothing.

    Attributes:
        kl (`float`): weight of a KL to the estimator's own second forward of each batch (`Estimator.compared`).
        keeps_all (`bool`): values would choose nothing, and are needed for nothing else: they are not made.
    """

    kl = 0.0
    keeps_all = False

    def __init__(self, config: AlphaTokenConfig) -> None:
        self.config = config

    def check(self, source: Source) -> None:
        """Check, before anything runs, that the source has what `prepare` needs.

        Raises:
            ValueError: something is missing, or this estimator has no use for something that was given.
        """
        if source.path is not None:
            raise ValueError(
                f'path was given, but estimator="{self.config.estimator}" values tokens along target and drift. Set '
                'estimator="path", or give none.'
            )

    def prepare(self, source: Source, scored: Scored, batch: Batch) -> Parts:
        """Prepare, before a forward, the directions along which its tokens are valued.

        Returns:
            `dict`: "target" and "drift", if they exist -> parameter name -> direction of the parameter's shape.
        """
        return source.directions(scored, batch)

    def begin(self, source: Source, scored: Scored, batch: Batch, *, needed: bool) -> Parts:
        """A training forward is about to run: what `prepare` gives, if that is `needed` to value or to compare it."""
        if needed:
            return self.prepare(source, scored, batch)
        source.count(scored)
        return {}

    def early(self, source: Source) -> bool:
        """Whether an estimator with `in_forward` must have this forward's values at the gate (`Task.early`)."""
        return True

    def state_dict(self, source: Source) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, source: Source, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Go on from what `state_dict` gave, which may lie on another device."""

    def figures(self) -> dict[str, float]:
        """Figures for a logger, by name."""
        return {}


@dataclass
class Task:
    """One forward of one batch, which is to be valued.

    Attributes:
        model (`nn.Module`): the model that runs.
        scored (`Scored`): the parameters along whose directions tokens are valued.
        parts (`dict`): see `Memory.prepare`.
        memory (`Memory`): the estimator's memory.
        apart (`bool`): report adaptation and stability separately, and `grad_norm`; else the total is enough.
        training (`bool`): whether the forward to watch is the one with grad, or the one without.
        early (`bool`): whether an estimator with `in_forward` must have values at the gate; else its forward may end
            first.
        valued (`bool`): False where weights are known and only mask the forward.
        others (`Others`, *optional*): for estimators with `values_others`, where there is no target.
        ref_model (`nn.Module`, *optional*): the reference.
        kl_over (`str`, *optional*): for a KL to the estimator's own second forward: what it is taken over; `None` for
            no such KL.
    """

    model: nn.Module
    scored: Scored
    batch: Batch
    config: AlphaTokenConfig
    parts: Parts
    memory: Memory
    apart: bool = True
    training: bool = False
    early: bool = True
    valued: bool = True
    others: Others | None = None
    ref_model: nn.Module | None = None
    kl_over: str | None = None


class Estimator(ABC):
    """Values one batch by one forward and the gradient that comes back to the gate.

    Attributes:
        layers: K, if the config gives none.
        scope: which trained parameters it can score, see `find_scored`.
        gate: where the gate is: at the output of the last block, or of the decoder.
        values_others: without a target, the sequences of a batch are valued against each other. With True the estimator
            does so in one backward (`Task.others`); with False they are valued one by one.
        in_forward: its values do not depend on the loss, and are known when the forward has run, or if asked for when
            its hidden state has passed the gate (`forward_values`). Such an estimator has a target of its own, in its
            `Memory`.
        memory: the class of its memory.
        terms: what it reports beside the total where they are asked for apart, see `TokenValues`.
        seen (`bool`): whether its forward has run.
        seconds (`float`): time spent inside that forward; the gate measures the backward.
    """

    layers: ClassVar[int | Literal["all"]] = "all"
    scope: ClassVar[Scope] = "blocks"
    gate: ClassVar[Literal["block", "decoder"]] = "block"
    values_others: ClassVar[bool] = False
    in_forward: ClassVar[bool] = False
    memory: ClassVar[type[Memory]] = Memory
    terms: ClassVar[tuple[str, ...]] = ()
    seconds: float = 0.0

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    @abstractmethod
    def seen(self) -> bool: ...

    @abstractmethod
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[Any]:
        """Watch one forward, and pass the hidden state `(B, T, hidden)` at the gate through `on_hidden`."""

    @abstractmethod
    def values(self, rows: torch.Tensor) -> TokenValues:
        """Value the batch.

        Args:
            rows (`torch.Tensor`): `(B, T, hidden)`, gradient of the loss (a sum over tokens, times any positive
                factor) at the hidden state that `on_hidden` was given.

        Raises:
            NonFiniteRows: `rows` is not finite.
            FloatingPointError: `rows` is finite and values are not; the message names the cause.
        """

    def forward_values(self) -> TokenValues:
        """Value the batch without a gradient; for estimators with `in_forward`."""
        raise NotImplementedError

    @property
    def compared(self) -> Compared | None:
        """This forward compared with the estimator's own second one, for a KL to it."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Free everything that was kept from the forward."""
