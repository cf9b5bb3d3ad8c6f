"""What an estimator is.

A batch meets it three times. Before the forward its `Memory` prepares what values are taken along (by default the
directions: target gradient and Fisher drift). During the forward `watching` keeps what is needed, and passes the hidden
state at the gate through a callback. In the backward `values` turns the gradient at that state into token values.
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
    """The gradient at the gate is itself not finite: the loss overflowed, not the valuation."""


def check_weights_finite(scored: Scored) -> None:
    """Raise FloatingPointError for a scored parameter that is not finite, so that nothing can be valued."""
    for name, parameter in scored.parameters.items():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"The adapter weight {name} is not finite, so nothing can be valued. Lower the learning rate, clip "
                "gradients, or go back to a checkpoint."
            )


class Memory:
    """What an estimator carries from batch to batch. The default carries nothing."""

    def __init__(self, config: AlphaTokenConfig) -> None:
        self.config = config

    def check(self, source: Source) -> None:
        """See, before anything runs, that the source has what `prepare` needs.

        Raises:
            ValueError: it has not, or what this estimator has no use for.
        """
        if source.path is not None:
            raise ValueError(
                f'path was given, but estimator="{self.config.estimator}" values tokens along target and drift. Set '
                'estimator="path", or give none.'
            )

    def prepare(self, source: Source, scored: Scored, batch: Batch) -> Parts:
        """Make ready, before a forward, what its values are taken along.

        Returns:
            `dict`: "target" and "drift", those there are -> parameter name -> direction of the parameter's shape.
        """
        return source.directions(scored, batch)

    def enter(self, source: Source, scored: Scored) -> None:
        """A training forward is about to run."""

    def state_dict(self, source: Source) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, source: Source, state: Mapping[str, torch.Tensor]) -> None:
        pass

    def figures(self) -> dict[str, float]:
        """What a logger should see of it, by name."""
        return {}


@dataclass
class Task:
    """One forward of one batch, which is to be valued.

    Attributes:
        model (`nn.Module`): the model that runs.
        scored (`Scored`): the parameters whose movement is valued.
        parts (`dict`): see `Memory.prepare`.
        memory (`Memory`): the estimator's own.
        apart (`bool`): report adaptation and stability apart; else the total is enough.
        training (`bool`): the forward to watch is the one with grad; else the one without.
        valued (`bool`): False where the forward is only to be masked, by weights that are known.
        others (`Others`, *optional*): for estimators that set `values_others`, where there is no target.
        ref_model (`nn.Module`, *optional*): the reference.
        kl_over (`str`, *optional*): what a KL to the estimator's own second forward is taken over, where one is wanted.
    """

    model: nn.Module
    scored: Scored
    batch: Batch
    config: AlphaTokenConfig
    parts: Parts
    memory: Memory
    apart: bool = True
    training: bool = False
    valued: bool = True
    others: Others | None = None
    ref_model: nn.Module | None = None
    kl_over: str | None = None


class Estimator(ABC):
    """Values one batch by one forward and the gradient that comes back to the gate.

    Attributes:
        layers: K where the config names none.
        scope: which trained parameters it can score, see `find_scored`.
        gate: where its hidden state is: the last block's output, or the decoder's.
        values_others: whether it can value the sequences of a batch against each other in one walk (`Task.others`);
            those of other estimators are valued one by one.
        in_forward: whether its values are known as soon as the hidden state has passed the gate (`forward_values`),
            whatever the loss; it then has a target of its own, in its `Memory`.
        memory: the class of what it carries from batch to batch.
        seen (`bool`): whether its forward has run.
        seconds (`float`): spent inside that forward; going back is timed by the gate.
    """

    layers: ClassVar[int | Literal["all"]] = "all"
    scope: ClassVar[Scope] = "blocks"
    gate: ClassVar[Literal["block", "decoder"]] = "block"
    values_others: ClassVar[bool] = False
    in_forward: ClassVar[bool] = False
    memory: ClassVar[type[Memory]] = Memory
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
    def values(self, rows: torch.Tensor, *, norms: bool = False) -> TokenValues:
        """Value the batch.

        Args:
            rows (`torch.Tensor`): `(B, T, hidden)`, gradient of the loss (a sum over tokens, times any positive
                factor) at the hidden state that `on_hidden` was given.
            norms (`bool`): give `grad_norm` too, where the estimator has it.

        Raises:
            NonFiniteRows: `rows` is not finite.
            FloatingPointError: `rows` is finite and values are not; the message names the cause.
        """

    def forward_values(self) -> TokenValues:
        """Value the batch as soon as its forward has passed the gate, where `in_forward` is set."""
        raise NotImplementedError

    @property
    def compared(self) -> Compared | None:
        """What a second forward of the estimator's own found beside this one, for a KL to it."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Let go of everything that the forward left."""
