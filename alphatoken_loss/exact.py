"""The exact estimator: first-order token values by forward-mode differentiation.

The value of token t is <grad l_t, D>, D = target + lambda * drift. Moving the parameters of the scored blocks along D
moves the last block's output h with velocity dh; with r_t the gradient of the loss at h_t the value is <r_t, dh_t>. The
blocks are run again from the saved input of the first, in one pass, with duals in the place of their parameters. What
lies behind (norm, head, vocabulary) takes no part, so no [tokens, vocabulary] tangent exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention import plain_attention, replaced_attention
from .batches import Batch
from .blocks import Scored, without_noise
from .config import AlphaTokenConfig
from .difference import values_of_changes
from .replay import Capture, capturing
from .values import TokenValues


class Exact:
    """Values one batch by running its scored blocks once more, in forward mode.

    Args:
        parts (`dict`): part of the value -> parameter name -> direction of the parameter's shape. Either `"total"`, or
            `"target"` and `"drift"`.
    """

    def __init__(
        self, scored: Scored, batch: Batch, config: AlphaTokenConfig, parts: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        self.scored, self.batch, self.config, self.parts = scored, batch, config, parts
        self.capture = Capture(scored, batch)
        self.changes: dict[str, tuple[torch.Tensor, float]] = {}

    @property
    def seen(self) -> bool:
        return self.capture.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> Iterator[None]:
        """Keep the blocks' inputs of one forward and pass the last one's output through `on_hidden`."""

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            for part, direction in self.parts.items():
                self.changes[part] = hidden_velocity(self.capture, direction), 1.0
            self.capture.release()
            return on_hidden(hidden)

        with capturing(self.capture, leave, training=training):
            yield

    def values(self, rows: torch.Tensor, *, norms: bool = False) -> TokenValues:
        """From the gradient `(B, T, hidden)` at the last block's output."""
        return values_of_changes(self.scored, self.batch, self.config, self.parts, rows, self.changes)

    def release(self) -> None:
        self.changes = {}
        self.capture.release()


def hidden_velocity(capture: Capture, direction: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Velocity `(B, T, hidden)` of the last block's output as the scored parameters move along `direction`."""
    blocks = capture.scored.blocks
    places = {id(p): direction[name] for name, p in capture.scored.parameters.items()}
    device, enabled, dtype = capture.autocast
    hidden = capture.calls[0].hidden.detach()
    capture.replaying = True
    try:
        with (
            torch.no_grad(),
            without_noise(*blocks),
            torch.autocast(device, dtype, enabled),
            _forward_mode(blocks, capture.batch),
            forward_ad.dual_level(),
        ):
            for block, call in zip(blocks, capture.calls, strict=True):
                moving = {
                    name: forward_ad.make_dual(p.detach(), places[id(p)].to(p))
                    for name, p in block.named_parameters()
                    if id(p) in places
                }
                again = call.on(hidden)
                output = torch.func.functional_call(block, moving, again.args, again.kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
            velocity = forward_ad.unpack_dual(hidden).tangent
            return torch.zeros_like(hidden) if velocity is None else velocity.clone()
    finally:
        capture.replaying = False


class _FrozenLinear(torch.autograd.Function):
    """A quantised linear's own forward, with the rule of a linear: its weight carries no tangent."""

    @staticmethod
    def forward(
        x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor], weight: Callable[[], torch.Tensor]
    ) -> Any:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.weight, ctx.dtype = inputs[2], output.dtype

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        weight = ctx.weight()
        return F.linear(tangent.to(weight.dtype), weight).to(ctx.dtype)


@contextlib.contextmanager
def _forward_mode(blocks: list[nn.Module], batch: Batch) -> Iterator[None]:
    """Give blocks what forward mode needs: attention in plain operations, and a rule for quantised linears.

    Raises:
        NotImplementedError: some module drops or refuses tangents; the message names it.
    """
    named = ((i, name, module) for i, block in enumerate(blocks) for name, module in block.named_modules())
    names = {id(module): f"scored block {i}: {name or type(module).__name__}" for i, name, module in named}
    leaves = [m for block in blocks for m in block.modules() if next(m.children(), None) is None]
    quantised = [m for m in leaves if type(getattr(m, "weight", None)).__name__ in ("Params4bit", "Int8Params")]
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()
        moves = any(_moves(argument) for argument in args)
        if moves and isinstance(output, torch.Tensor) and output.is_floating_point() and not _moves(output):
            raise _no_rule(names[id(module)], module)

    handles: list[Any] = []
    patched: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        # Attention outside transformers' interface: the math kernel alone of torch's has a rule.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(replaced_attention(blocks, lambda kernel, function: plain_attention(batch)))
        try:
            for module in leaves:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            for module in quantised:
                if "forward" not in module.__dict__:
                    module.forward = _dequantising(module)  # type: ignore[method-assign]
                    patched.append(module)
            yield
        except (NotImplementedError, RuntimeError) as error:
            if running and "forward" in str(error).lower():
                raise _no_rule(names[id(running[-1])], running[-1]) from error
            raise
        finally:
            for module in patched:
                del module.forward
            for handle in handles:
                handle.remove()


def _dequantising(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from peft.utils.integrations import dequantize_module_weight

    run = module.forward
    return lambda x: _FrozenLinear.apply(x, run, lambda: dequantize_module_weight(module).detach())


def _moves(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _no_rule(name: str, module: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{name} ({type(module).__module__}.{type(module).__name__}) has no forward-mode derivative, which the exact "
        'estimator needs. Use estimator="difference", which needs none, or estimator="ghost".'
    )
