"""Going back through the last K blocks: in the graph of a forward, or by running blocks again."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Cache

from ..batches.batch import Batch
from .changes import Changes
from .forwards import (
    PACKED_WITH_CACHE,
    SECOND_FORWARD,
    check_batch,
    refuse_compiled_call,
    renew_forward,
    rows_without_graph,
)
from .modes import HOOKS_INSIDE_CHECKPOINT, unhooked, without_noise
from .sites import Scored
from .taps import Taps, Visitor, look_away


@dataclass
class BlockCall:
    """How a block was called in a forward; tensors are references, not copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def on(self, hidden: torch.Tensor, exchanged: Mapping[int, Any]) -> BlockCall:
        """The same call on another hidden state, with copies of what blocks exchange (see `Capture.exchanged`), and
        without the cache: a second call would append to it."""

        def other(value: Any) -> Any:
            return None if isinstance(value, Cache) else exchanged.get(id(value), value)

        kwargs = {key: other(value) for key, value in self.kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if self.args:
            return BlockCall((hidden, *map(other, self.args[1:])), kwargs)
        return BlockCall((), {**kwargs, "hidden_states": hidden})


@dataclass
class Capture:
    """What is kept of one forward for valuing it: the calls of the last K blocks, or a graph with taps."""

    scored: Scored
    batch: Batch
    calls: list[BlockCall] = field(default_factory=list)
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
    graph: tuple[Taps, torch.Tensor] | None = None
    replaying: bool = False
    seen: bool = False
    spent: bool = False

    def release(self) -> None:
        """Free everything that was kept."""
        self.spent = True
        self.calls.clear()
        if self.graph is not None:
            self.graph[0].clear()
            self.graph = None

    @property
    def in_float16(self) -> bool:
        """Whether gradients are float16, which overflows where other dtypes don't."""
        return self.calls[0].hidden.dtype == torch.float16 or self.autocast[1:] == (True, torch.float16)

    def exchanged(self) -> dict[int, Any]:
        """Copies of the containers through which blocks hand each other more than the hidden state (Gemma 4's shared
        keys and values), by the id of the forward's own, which a later call must neither write to nor reach through."""
        values = [value for call in self.calls for value in (*call.args, *call.kwargs.values())]
        held = {id(value): value for value in values if isinstance(value, MutableMapping)}
        copies = {key: copy.copy(value) for key, value in held.items()}
        for mapping in copies.values():
            for key, value in list(mapping.items()):
                mapping[key] = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, value)
        return copies

    def remember_autocast(self, device: str) -> None:
        self.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def visit(self, rows: torch.Tensor, visitor: Visitor, *, causal: bool, at_layer: bool = False) -> None:
        """Go back from the gradient `rows` `(B, T, hidden)` at the last block's output; the visitor sees each site."""
        if self.graph is not None:
            taps, output = self.graph
            taps.walk(output, rows, [], visitor, retain_graph=True)
        else:
            self._replay(rows, [], visitor, causal=causal, at_layer=at_layer)
        if causal and len(self.scored.value_rows) < len(self.scored.blocks):
            warnings.warn(
                "The attention of a scored block does not run through transformers' attention interface, so it adds no "
                "causal term. Set causal_window=0 to go without.",
                stacklevel=2,
            )

    def gradients(self, rows: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of parameters of the scored blocks, by replay; zeros for a parameter that was not used."""
        found = self._replay(rows, list(parameters.values()), None)
        return {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }

    def _replay(
        self,
        rows: torch.Tensor,
        parameters: list[torch.Tensor],
        visitor: Visitor | None,
        *,
        causal: bool = False,
        at_layer: bool = False,
    ) -> list[torch.Tensor | None]:
        """Run each block again, last to first, and go back through it: one block's activations live at a time.

        Blocks that pass on more than the hidden state are run as one, since gradients come back through the rest too.
        """
        found: list[torch.Tensor | None] = [None] * len(parameters)
        exchanged = self.exchanged()
        every = list(range(len(self.calls)))
        self.replaying = True  # the hooks of `capturing` may still be in place
        try:
            for part in [every] if exchanged else [[index] for index in reversed(every)]:
                own = {id(p) for index in part for p in self.scored.blocks[index].parameters()}
                here = [i for i, parameter in enumerate(parameters) if id(parameter) in own]
                among = [parameters[i] for i in here]
                rows, grads = self._replay_part(part, exchanged, rows, among, visitor, causal, at_layer)
                for i, gradient in zip(here, grads, strict=True):
                    before = found[i]  # a parameter that several blocks share
                    found[i] = gradient if before is None or gradient is None else before + gradient
        finally:
            self.replaying = False
        return found

    def _replay_part(
        self,
        part: list[int],
        exchanged: Mapping[int, Any],
        rows: torch.Tensor,
        parameters: list[torch.Tensor],
        visitor: Visitor | None,
        causal: bool,
        at_layer: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """From the gradient at the output of some blocks to that at their input (not for the first of all) and at
        parameters."""
        first, blocks = part[0], [self.scored.blocks[index] for index in part]
        leaf = hidden = self.calls[first].hidden.detach().requires_grad_()
        device, enabled, dtype = self.autocast
        taps = Taps(self.scored, self.batch.shape, causal=causal, at_layer=at_layer)
        sites = [site for index in part for site in self.scored.in_block(index)] if visitor is not None else []
        with torch.enable_grad(), without_noise(*blocks), unhooked(), torch.autocast(device, dtype, enabled):
            with taps.installed(sites):
                for index, block in zip(part, blocks, strict=True):
                    call = self.calls[index].on(hidden, exchanged)
                    output = block(*call.args, **call.kwargs)
                    hidden = output[0] if isinstance(output, tuple) else output
        inputs = [leaf] if first else []
        grads = taps.walk(hidden, rows.to(hidden.dtype), [*inputs, *parameters], visitor or look_away)
        taps.clear()
        if not first:
            return rows, grads
        assert grads[0] is not None
        return grads[0], grads[1:]


@contextlib.contextmanager
def capturing(capture: Capture, on_output: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> Iterator[None]:
    """Record the block calls of one forward, and pass the last block's output through `on_output`.

    Args:
        training (`bool`): record the forward that runs with grad, and leave others alone; else the one without.

    Raises:
        RuntimeError: a second such forward runs.
        ValueError: the forward's shape is not the batch's.
    """
    blocks = capture.scored.blocks
    state = {"running": False}

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if capture.replaying or (capture.spent and HOOKS_INSIDE_CHECKPOINT):
                return
            if index == 0:
                state["running"] = torch.is_grad_enabled() == training
                if state["running"] and capture.seen:
                    raise RuntimeError(SECOND_FORWARD)
            if not state["running"]:
                return
            call = BlockCall(args, kwargs)
            refuse_compiled_call()
            check_batch(capture.batch, *call.hidden.shape[-3:-1])  # Gemma 3n's has one more dimension in front
            if any(isinstance(value, Cache) for value in (*args, *kwargs.values())) and capture.batch.packed:
                raise ValueError(PACKED_WITH_CACHE)
            if index == 0:
                capture.seen = True
                capture.remember_autocast(call.hidden.device.type)
            capture.calls.append(call)

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not state["running"]:
            return None
        state["running"] = False
        if isinstance(output, tuple):
            return (on_output(output[0]), *output[1:])
        return on_output(output)

    with Changes() as changes:
        renew_forward(blocks[0], changes)
        for index, block in enumerate(blocks):
            changes.hook(block, before(index), before=True, with_kwargs=True)
        changes.hook(blocks[-1], after)
        yield


def capture_without_graph(
    model: nn.Module, scored: Scored, batch: Batch, loss_sum: Callable[[nn.Module], torch.Tensor]
) -> tuple[Capture, torch.Tensor]:
    """Run a forward whose graph begins at the last block's output, and take the loss's gradient there.

    Args:
        loss_sum (`Callable`): runs the model on the batch and returns a scalar loss.

    Returns:
        The capture, and the gradient rows `(B, T, hidden)` at the last block's output.
    """
    capture = Capture(scored, batch)
    rows = rows_without_graph(model, lambda cut: capturing(capture, cut, training=False), loss_sum)
    return capture, rows
