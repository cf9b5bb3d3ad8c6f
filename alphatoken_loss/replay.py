"""Going back through the last K blocks, from what a forward left: in its graph, or by running blocks again.

This is the only file that installs module hooks. A tap is an identity on a linear's output whose backward meets the
gradient d there and the input h that was kept, and gives both to a visitor; what the visitor makes of them (token
values, Fisher sums) never outlives the walk as anything per token but a (batch, time) accumulator.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from .attention import AttentionCall, AttentionWatch
from .batches import Batch
from .blocks import HOOKS_INSIDE_CHECKPOINT, LoraSite, Scored, Site, unwrap, without_noise
from .logps import token_logps


class Visitor(Protocol):
    """Called once per scored site in a walk, from the last to the first.

    `error` is the gradient at the site's output, `(B, T, d_out)`; `inputs` is the site's input `(B, T, d_in)` and, for
    a LoRA layer tapped at its B, also B's input `(B, T, r)`; `attention` is the call its values went into, if any.
    """

    def __call__(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None: ...


class _Tap(torch.autograd.Function):
    """Identity whose backward shows the gradient and the kept inputs to the walk in progress, if one is."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, probe: torch.Tensor, taps: Taps, site: Site, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.taps, ctx.site = taps, site
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        (error,) = grads
        if error is not None and ctx.taps.visitor is not None:
            ctx.taps.show(ctx.site, error, ctx.saved_tensors)
        return error, None, None, None, *(None for _ in ctx.saved_tensors)


class Taps:
    """Taps on the sites of some blocks, live while `installed()` is entered.

    Args:
        scored (`Scored`): what is scored.
        shape (`tuple`): `(B, T)` of the batch, which every tapped linear must see.
        causal (`bool`): keep queries and keys for the causal terms.
        at_layer (`bool`): tap LoRA layers as a whole (dL/dy and x; the layer's adapters may be off) instead of the
            A and B inside.
    """

    def __init__(self, scored: Scored, shape: tuple[int, int], *, causal: bool = False, at_layer: bool = False) -> None:
        self.scored = scored
        self.shape = shape
        self.at_layer = at_layer
        self.visitor: Visitor | None = None
        # A leaf that every tap depends on and nothing needs: asking autograd for its gradient walks through the taps.
        self.probe = torch.empty(0, requires_grad=True)
        self.watch = AttentionWatch(scored) if causal else None

    @contextlib.contextmanager
    def installed(self, sites: list[Site]) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        with contextlib.ExitStack() as stack:
            try:
                for site in sites:
                    handles += self._hooks(site)
                if self.watch is not None:
                    stack.enter_context(self.watch.watching())
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def clear(self) -> None:
        """Let go of everything kept from a forward."""
        if self.watch is not None:
            self.watch.outputs.clear()
            self.watch.calls.clear()

    def walk(
        self, output: torch.Tensor, rows: torch.Tensor, inputs: list[torch.Tensor], visitor: Visitor, **kwargs: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """Go back from `output` with gradient `rows` through every tap, and return the gradients of `inputs`."""
        self.visitor = visitor
        try:
            return torch.autograd.grad(output, [self.probe, *inputs], rows, allow_unused=True, **kwargs)[1:]
        finally:
            self.visitor = None

    def show(self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        assert self.visitor is not None
        attention = self.watch.calls.get(site.name) if self.watch is not None else None
        batched = (tensor.reshape(*self.shape, tensor.shape[-1]) for tensor in (error, *inputs))
        error = next(batched)
        with torch.no_grad():
            self.visitor(site, error, tuple(batched), attention)

    def _hooks(self, site: Site) -> list[RemovableHandle]:
        kept: list[torch.Tensor] = []

        def keep_input(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                kept.append(args[0].detach())

        def tap(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not isinstance(output, torch.Tensor):
                raise ValueError(
                    f"{site.name} returns a {type(output).__name__}, not a tensor. Keep it out of target_modules."
                )
            seen = args[0].shape[:-1].numel()
            if seen != self.shape[0] * self.shape[1]:
                raise ValueError(
                    f"{site.name} sees {seen} positions of a batch of {self.shape[0]} x {self.shape[1]}. Token values "
                    "need linears that see every position once; keep routed experts and the like out of target_modules."
                )
            inputs = (kept.pop(), args[0].detach()) if kept else (args[0].detach(),)
            tapped = _Tap.apply(output, self.probe, self, site, *inputs)
            if self.watch is not None:
                self.watch.saw_output(site, tapped)
            return tapped

        if isinstance(site, LoraSite) and not self.at_layer:
            return [site.a.register_forward_hook(keep_input), site.b.register_forward_hook(tap)]
        return [site.module.register_forward_hook(tap)]


@dataclass
class BlockCall:
    """How a block was called in a forward; tensors are references, not copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def detached(self) -> BlockCall:
        """The same call on a leaf of the same values."""
        return self.on(self.hidden.detach().requires_grad_())

    def on(self, hidden: torch.Tensor) -> BlockCall:
        """The same call on another hidden state, without the cache: a second call would append to it."""
        kwargs = {k: None if isinstance(v, Cache) else v for k, v in self.kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        if self.args:
            rest = tuple(None if isinstance(v, Cache) else v for v in self.args[1:])
            return BlockCall((hidden, *rest), kwargs)
        return BlockCall((), {**kwargs, "hidden_states": hidden})


@dataclass
class Capture:
    """What one forward of the model leaves for valuing it: the calls of the last K blocks, or a graph with taps."""

    scored: Scored
    batch: Batch
    calls: list[BlockCall] = field(default_factory=list)
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
    graph: tuple[Taps, torch.Tensor] | None = None
    replaying: bool = False
    seen: bool = False
    spent: bool = False

    def release(self) -> None:
        """Let go of everything the forward left."""
        self.spent = True
        self.calls.clear()
        if self.graph is not None:
            self.graph[0].clear()
            self.graph = None

    @property
    def in_float16(self) -> bool:
        """Whether gradients are float16, which overflows where other dtypes don't."""
        return self.calls[0].hidden.dtype == torch.float16 or self.autocast[1:] == (True, torch.float16)

    def remember_autocast(self, device: str) -> None:
        self.autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def visit(self, rows: torch.Tensor, visitor: Visitor, *, causal: bool, at_layer: bool = False) -> None:
        """Show a visitor every scored site, from the gradient `rows` `(B, T, hidden)` at the last block's output."""
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
        """Gradients of parameters of the scored blocks, by replay; zeros for one that took no part."""
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
        """Run each block again, last to first, and go back through it: one block's activations live at a time."""
        found: list[torch.Tensor | None] = [None] * len(parameters)
        self.replaying = True  # the hooks of `capturing` may still be in place
        try:
            for index in reversed(range(len(self.calls))):
                own = {id(p) for p in self.scored.blocks[index].parameters()}
                here = [i for i, parameter in enumerate(parameters) if id(parameter) in own]
                rows, grads = self._replay_block(index, rows, [parameters[i] for i in here], visitor, causal, at_layer)
                for i, gradient in zip(here, grads, strict=True):
                    found[i] = gradient
        finally:
            self.replaying = False
        return found

    def _replay_block(
        self,
        index: int,
        rows: torch.Tensor,
        parameters: list[torch.Tensor],
        visitor: Visitor | None,
        causal: bool,
        at_layer: bool,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """From the gradient at a block's output to that at its input (not for the first) and at parameters."""
        block, call = self.scored.blocks[index], self.calls[index].detached()
        device, enabled, dtype = self.autocast
        taps = Taps(self.scored, self.batch.shape, causal=causal, at_layer=at_layer)
        with torch.enable_grad(), without_noise(block), unhooked(), torch.autocast(device, dtype, enabled):
            with taps.installed(self.scored.in_block(index) if visitor is not None else []):
                output = block(*call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        inputs = [call.hidden] if index else []
        grads = taps.walk(output, rows.to(output.dtype), [*inputs, *parameters], visitor or _look_away)
        taps.clear()
        if not index:
            return rows, grads
        assert grads[0] is not None
        return grads[0], grads[1:]


def saved_tensors_hooked() -> bool:
    """Whether what autograd saves goes through hooks, which may give it back only once (TRL's offloading does)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """Save tensors as they are, whatever hooks there are."""
    if not saved_tensors_hooked():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _look_away(
    site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
) -> None:
    """A visitor for walks that only want gradients."""


PACKED_WITH_CACHE = (
    "The batch is packed and the model was called with a cache, which makes transformers attend across sequence "
    "borders. Call it with use_cache=False."
)
SECOND_FORWARD = (
    "A second forward with grad ran in one AlphaToken context, which values one batch by one forward. Open a context "
    "for each forward; a reference belongs under torch.no_grad()."
)


def check_batch(batch: Batch, size: int, length: int, *, virtual: bool = False) -> None:
    """See that a forward ran on the batch that is valued; `virtual` tokens may stand before its own.

    Raises:
        ValueError: it did not.
    """
    if size != batch.shape[0] or (length < batch.shape[1] if virtual else length != batch.shape[1]):
        raise ValueError(
            f"The model ran on a batch of shape {(size, length)}, but the batch being valued has shape {batch.shape}. "
            "Give the context the batch that the model runs on."
        )


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
            check_batch(capture.batch, *call.hidden.shape[:2])
            if capture.batch.packed and any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
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

    handles: list[RemovableHandle] = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(blocks[-1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Token values need gradients, and torch.inference_mode() rules them out. Leave it first.")


def loss_gradients(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], batch: Batch, *, first: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of a batch's summed token losses by an ordinary backward, `.grad` untouched; zeros where none comes.

    Args:
        first (`nn.Module`, *optional*): the block that the graph begins with; no parameter may lie before it.
    """

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.set_grad_enabled(True)  # the context below puts it back

    _refuse_inference_mode()
    inner = unwrap(model)
    with torch.set_grad_enabled(first is None), without_noise(inner):
        hook = None if first is None else first.register_forward_pre_hook(begin)
        try:
            loss = -token_logps(inner, batch).sum()
        finally:
            if hook is not None:
                hook.remove()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def capture_without_graph(
    model: nn.Module, scored: Scored, batch: Batch, loss_sum: Callable[[nn.Module], torch.Tensor]
) -> tuple[Capture, torch.Tensor]:
    """Run a forward whose graph holds only what follows the last block, and the loss back to that block's output.

    Args:
        loss_sum (`Callable`): runs the model on the batch and returns a scalar loss.

    Returns:
        The capture, and the gradient rows `(B, T, hidden)` at the last block's output.
    """
    capture = Capture(scored, batch)
    rows = rows_without_graph(model, lambda cut: capturing(capture, cut, training=False), loss_sum)
    return capture, rows


def rows_without_graph(
    model: nn.Module,
    watching: Callable[[Callable[[torch.Tensor], torch.Tensor]], AbstractContextManager[None]],
    loss_sum: Callable[[nn.Module], torch.Tensor],
) -> torch.Tensor:
    """The gradient at the hidden state that a watched forward passes through its callback, and no graph before it."""
    leaves: list[torch.Tensor] = []

    def cut(hidden: torch.Tensor) -> torch.Tensor:
        leaves.append(hidden.detach().requires_grad_())
        torch.set_grad_enabled(True)  # for norm, head and loss; `no_grad` below puts it back
        return leaves[0]

    _refuse_inference_mode()
    inner = unwrap(model)  # a distributed wrapper would take this forward for a training step's
    with without_noise(inner):
        with torch.no_grad(), watching(cut):
            loss = loss_sum(inner)
        (rows,) = torch.autograd.grad(loss, leaves)
    return rows
