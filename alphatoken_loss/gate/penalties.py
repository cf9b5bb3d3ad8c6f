"""The KLs that a context makes beside the loss: to the reference, and to theta*."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..losses.kl import Penalty, check_kl_coef, check_kl_options
from .figures import Figures
from .step import Step

Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """The KL that a context was asked for.

    Args:
        coef (`float`): weight of the KL to the reference.
        on, over (`str`): for both KLs, see `Penalty`.
        num_items (`int` or `torch.Tensor`, *optional*): what the sums are divided by.
        ref_model (`nn.Module`, *optional*): the reference.
    """

    coef: float
    on: str
    over: str
    num_items: int | torch.Tensor | None
    ref_model: nn.Module | None

    def __post_init__(self) -> None:
        check_kl_coef(self.coef)
        check_kl_options(self.on, self.over)


class Penalties:
    """The KLs of the last context.

    Args:
        path_kl (`float`): weight of the KL to theta*.
    """

    def __init__(self, model: nn.Module, path_kl: float) -> None:
        self.model, self.path_kl = model, path_kl
        self._of: dict[str, Penalty] = {}  # by their names in `AlphaToken.metrics`
        self._step: Step | None = None

    @property
    def kl(self) -> torch.Tensor | None:
        """Their sum, a scalar with graph, when the forward has run. Without grad nothing runs at theta*: then that KL
        is 0, so that a loss with it is the plain one."""
        found = [penalty.kl for penalty in self._of.values() if penalty.kl is not None]
        if not found and self.path_kl > 0 and not torch.is_grad_enabled():
            return torch.zeros(())
        return sum(found[1:], found[0]) if found else None

    def check_known(self, asked: Asked, when: str) -> None:
        """Raise ValueError if a KL is on what is dropped, which is known only later, when `when` is so."""
        if asked.on == "dropped" and (asked.coef > 0 or self.path_kl > 0):
            raise ValueError(
                f'kl_on is "dropped", but which tokens are is known only when {when}. Give weights, choose tokens by '
                'values with estimator="path", or set kl_on="all".'
            )

    def forget(self) -> None:
        """Free the graph of a step that failed."""
        self._of, self._step = {}, None

    def begin(self, asked: Asked, batch: Batch, step: Step | None) -> None:
        """Begin the KLs of a context; `step` is None if nothing is masked."""
        options: dict[str, Any] = {"num_items_in_batch": asked.num_items, "on": asked.on, "over": asked.over}
        options["dropped"] = (lambda: torch.zeros_like(batch.rows)) if step is None else step.dropped
        self.forget()
        if asked.coef > 0:
            self._of["kl"] = Penalty(self.model, batch, kl_coef=asked.coef, ref_model=asked.ref_model, **options)
        if self.path_kl > 0 and step is not None:
            weigher = step.weigher
            options["compared"] = lambda: weigher.compared
            self._of["path_kl"] = Penalty(self.model, batch, kl_coef=self.path_kl, **options)
        self._step = step if self._of else None

    def around(self, gate: Gate) -> Gate:
        """The same gate; the gradients of the KLs do not pass it."""
        for penalty in self._of.values():
            gate = penalty.around(gate)
        return gate

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Make them in the forward that runs inside. Enter it after the gate has set its hooks."""
        with contextlib.ExitStack() as stack:
            for penalty in self._of.values():
                stack.enter_context(penalty.watching())
            yield

    def count(self, figures: Figures) -> None:
        for name, penalty in self._of.items():
            figures.add_kl(name, penalty)

    def check_counted(self) -> None:
        """Check that the last backward had in it the KLs that were asked for.

        Raises:
            RuntimeError: it had not.
        """
        step, self._step = self._step, None
        left = [name for name, penalty in self._of.items() if not penalty.counted]
        if step is not None and step.masked and left:
            name = {"kl": "kl_coef"}.get(left[0], left[0])
            raise RuntimeError(
                f"{name} is {self._of[left[0]].coef}, but the last context's KL was not part of what went backward. "
                "Add it to the loss: `with alphatoken(batch) as step: loss = ...; (loss + step.kl).backward()`; or set "
                f"{name}=0."
            )
