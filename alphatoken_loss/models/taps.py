"""Taps on the scored linears.

A tap is an identity on a linear's output. In its backward it has the gradient d at this output and the input h that was
kept, and gives both to a visitor. The visitor makes token values or Fisher sums of them; per token nothing but a
(batch, time) accumulator is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .attention import AttentionCall, AttentionWatch
from .changes import Changes
from .sites import LoraSite, Scored, Site

# Called once per scored site in a walk, from the last to the first, with the site; the gradient at its output
# `(B, T, d_out)`; its input `(B, T, d_in)` and, for a LoRA layer tapped at its B, also B's input `(B, T, r)`; and the
# attention call that its values went into, if any.
Visitor = Callable[[Site, torch.Tensor, tuple[torch.Tensor, ...], AttentionCall | None], None]


class _Tap(torch.autograd.Function):
    """Identity whose backward gives the gradient and the kept inputs to the visitor of the current walk, if any."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, probe: torch.Tensor, taps: Taps, site: Site, *inputs: torch.Tensor
    ) -> torch.Tensor:
        ctx.taps, ctx.site = taps, site
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return output.data  # not a view: some models add to a linear's output in place (Falcon, Llama 4's experts)

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
        # A leaf that every tap depends on: asking autograd for its gradient makes it go through all taps.
        self.probe = torch.empty(0, requires_grad=True)
        self.watch = AttentionWatch(scored) if causal else None

    @contextlib.contextmanager
    def installed(self, sites: list[Site]) -> Iterator[None]:
        with Changes() as changes:
            for site in sites:
                self._hook(site, changes)
            with contextlib.nullcontext() if self.watch is None else self.watch.watching():
                yield

    def clear(self) -> None:
        """Free everything that was kept from a forward."""
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

    def _hook(self, site: Site, changes: Changes) -> None:
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
            changes.hook(site.a, keep_input)
            changes.hook(site.b, tap)
        else:
            changes.hook(site.module, tap)


def look_away(
    site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
) -> None:
    """A visitor that does nothing, for walks that need gradients alone."""
