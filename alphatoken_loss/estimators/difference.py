"""The difference estimator: by how much a token's loss changes when the adapter is nudged; one more forward.

The first-order value of token t is <grad l_t, D>, D = target + lambda * drift. Nudge the scored parameters from theta
to theta - eps D: the last hidden state changes from h to h'. With r_t, the gradient of the loss at h_t,

    value(t) = <r_t, h_t - h'_t> / eps.

This is (l_t(theta) - l_t(theta - eps D)) / eps with the head replaced by its first order. It has less rounding error,
since no logits of the nudged model are needed; and as r_t comes from the loss, the value has the units, sign and weight
that the loss, SFT or preference, gives the token. Nothing need be known of blocks, attention and linears.

The nudged forward runs at the very start of the forward that it belongs to, with the same inputs, autocast and random
state. Prepared tensors take the place of the parameters, which are never written to.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from ..models import tensors
from ..models.decoder import Call, DecoderForward
from ..models.tensors import accumulation_dtype
from .base import Task
from .by_change import ByChange, not_finite
from .nudges import LONGEST, Nudges


class Difference(ByChange):
    """Values one batch by one nudged forward per part (see the module's docstring)."""

    scope = "anywhere"
    gate = "decoder"
    memory = Nudges

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.scored, self.batch = task.scored, task.batch
        assert isinstance(task.memory, Nudges)
        self.nudges = task.memory
        self.forward = DecoderForward(task.model, task.batch, task.scored.parameters, training=task.training)

    @property
    def seen(self) -> bool:
        return self.forward.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Nudge beside one forward, and pass its last hidden state `(B, T, hidden)` through `on_hidden`.

        In training, the nudged forward comes first, so that the memory of the training graph is not held during it.
        """
        nudged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def nudge(call: Call, hidden: torch.Tensor | None = None) -> None:
            nudged.update(self._nudge_all(call, hidden))
            self.directions.clear()  # so that no copy of the adapters is held during the step

        def leave(call: Call, hidden: torch.Tensor) -> torch.Tensor:
            if not self.task.training:
                nudge(call, hidden)
            self._measure(hidden.detach(), nudged)
            nudged.clear()
            return on_hidden(hidden)

        with self.forward.watching(leave, on_call=nudge if self.task.training else None):
            yield

    def _nudge_all(self, call: Call, hidden: torch.Tensor | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Part of the value -> the nudged hidden state and eps."""
        started = time.perf_counter()
        found = {}
        for part, direction in self.directions.items():
            norm = tensors.length_of(direction)
            if part not in self.nudges.length:
                if norm == 0:
                    continue  # zero, as the drift before the first step
                hidden = self.forward.again(call, {}) if hidden is None else hidden
                tried = self._search(call, hidden.detach(), part, norm)
                if tried is not None:
                    found[part] = tried
            else:
                eps = self.nudges.length[part] / torch.where(norm == 0, 1.0, norm)
                found[part] = self._nudge(call, part, eps), eps
        self.seconds += time.perf_counter() - started
        return found

    def _nudge(self, call: Call, part: str, eps: torch.Tensor) -> torch.Tensor:
        direction, parameters = self.directions[part], self.scored.parameters
        there = {name: p.detach().to(direction[name].dtype) for name, p in parameters.items()}
        moved = tensors.added(there, tensors.scaled(direction, -eps))
        return self.forward.again(call, moved)

    def _search(
        self, call: Call, hidden: torch.Tensor, part: str, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the first step's length by trying; find none if the nudge reaches no response token."""
        if not norm.isfinite():
            raise FloatingPointError(not_finite(part))
        wanted = self.nudges.effect_wanted(self.forward.decoder, self.scored.device)
        size = tensors.length_of({name: p.detach().to(norm.dtype) for name, p in self.scored.parameters.items()})
        size = torch.where(size > 0, size, 1.0)
        length, longest = wanted * size, LONGEST * size
        for _ in range(8):
            eps = length / norm
            nudged = self._nudge(call, part, eps)
            effect = self._effect(hidden, hidden - nudged)
            if wanted / 1.05 < effect < wanted * 1.05:
                break
            if not effect > 0 or (length == longest and effect < wanted / 8):
                return None
            length = (length * (wanted / effect).clamp(1e-4, 1e4)).minimum(longest)
        self.nudges.length[part], self.nudges.longest[part] = eps * norm, longest
        return nudged, eps

    def _effect(self, hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        rows = self.batch.rows
        dtype = accumulation_dtype(hidden)
        squares = (t[:, -rows.shape[1] :].to(dtype).square().sum(-1).masked_fill(~rows, 0) for t in (change, hidden))
        changed, whole = (square.sum() for square in squares)
        return (changed / whole).sqrt()

    def _measure(self, hidden: torch.Tensor, nudged: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        wanted = self.nudges.effect_wanted(self.forward.decoder, self.scored.device)
        for part, (moved, eps) in nudged.items():
            change = hidden - moved
            self.nudges.learn(part, self._effect(hidden, change), wanted)
            self.changes[part] = change, eps
