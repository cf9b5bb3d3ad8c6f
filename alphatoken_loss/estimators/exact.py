"""The exact estimator: first-order token values by forward-mode differentiation.

The value of token t is <grad l_t, D>, D = target + lambda * drift. If the parameters of the scored blocks move along D,
the last block's output h moves with velocity dh. With r_t, the gradient of the loss at h_t, the value is <r_t, dh_t>.
The blocks run again from the saved input of the first, in one pass, with dual tensors in the place of their parameters.
Norm and head take no part, so there is no [tokens, vocabulary] tangent.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.autograd.forward_ad as forward_ad

from ..models import tensors
from ..models.changes import Changes
from ..models.modes import walked_once, without_noise
from ..models.replay import Capture, capturing
from .base import Task
from .by_change import ByChange
from .forward_mode import forward_mode


class Exact(ByChange):
    """Values one batch by running its scored blocks once more, in forward mode."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.capture = Capture(task.scored, task.batch)
        if task.training:
            walked_once(task.scored.blocks)  # an error now, if hooks would not see the forward

    @property
    def seen(self) -> bool:
        return self.capture.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Keep the blocks' inputs of one forward and pass the last one's output through `on_hidden`."""

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            for part, direction in self.directions.items():
                length = tensors.length_of(direction)
                # The direction is scaled to length 1: small gradients would vanish in float16.
                unit = {name: along / torch.where(length > 0, length, 1.0) for name, along in direction.items()}
                step = torch.where(length > 0, 1 / length, torch.where(length == 0, 1.0, torch.nan))
                self.changes[part] = hidden_velocity(self.capture, unit), step
            self.directions.clear()
            self.seconds += time.perf_counter() - started
            self.capture.release()
            return on_hidden(hidden)

        with capturing(self.capture, leave, training=self.task.training):
            yield

    def release(self) -> None:
        super().release()
        self.capture.release()


_forward_ad = threading.Lock()


@contextlib.contextmanager
def _dual_level() -> Iterator[None]:
    """`forward_ad.dual_level`. Torch has one in a process, so one thread after the other enters it."""
    with _forward_ad, Changes() as changes:
        level = changes.begin(torch._C._enter_dual_level, torch._C._exit_dual_level)
        changes.put(vars(forward_ad), "_current_level", level)
        yield


def hidden_velocity(capture: Capture, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Velocity `(B, T, hidden)` of the last block's output as the scored parameters move along `direction`."""
    blocks = capture.scored.blocks
    places = {id(p): direction[name] for name, p in capture.scored.parameters.items()}
    device, enabled, dtype = capture.autocast
    hidden = capture.calls[0].hidden.detach()
    exchanged = capture.exchanged()
    capture.replaying = True
    try:
        with (
            torch.no_grad(),
            without_noise(*blocks),
            torch.autocast(device, dtype, enabled),
            forward_mode(capture.scored, capture.batch),
            _dual_level(),
        ):
            for block, call in zip(blocks, capture.calls, strict=True):
                moving = {
                    id(p): forward_ad.make_dual(p.detach(), places[id(p)].to(p))
                    for p in block.parameters()
                    if id(p) in places
                }
                again = call.on(hidden, exchanged)
                with Changes() as changes:
                    changes.replace(block, moving)
                    output = block(*again.args, **again.kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
            velocity = forward_ad.unpack_dual(hidden).tangent
            return torch.zeros_like(hidden) if velocity is None else velocity.clone()
    finally:
        capture.replaying = False
