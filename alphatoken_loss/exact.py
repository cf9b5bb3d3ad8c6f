"""The exact estimator: first-order token values by forward-mode differentiation.

The value of token t is <grad l_t, D>, D = target + lambda * drift. Moving the parameters of the scored blocks along D
moves the last block's output h with velocity dh; with r_t the gradient of the loss at h_t the value is <r_t, dh_t>. The
blocks are run again from the saved input of the first, in one pass, with duals in the place of their parameters. What
lies behind (norm, head, vocabulary) takes no part, so no [tokens, vocabulary] tangent exists.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import foreach
from .attention import forward_mode_attention, replaced_attention
from .batches import Batch
from .blocks import LoraSite, Scored, without_noise
from .config import AlphaTokenConfig
from .difference import values_of_changes
from .replay import Capture, capturing
from .values import TokenValues

_QUANTISED = ("Params4bit", "Int8Params")  # bitsandbytes' weights, by name: importing it takes seconds


class Exact:
    """Values one batch by running its scored blocks once more, in forward mode.

    Args:
        parts (`dict`): part of the value -> parameter name -> direction of the parameter's shape. Either `"total"`, or
            `"target"` and `"drift"`.
    """

    def __init__(
        self, scored: Scored, batch: Batch, config: AlphaTokenConfig, parts: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        self.scored, self.batch, self.config = scored, batch, config
        self.parts, self.directions = tuple(parts), dict(parts)
        self.capture = Capture(scored, batch)
        self.seconds = 0.0
        self.changes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def seen(self) -> bool:
        return self.capture.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> Iterator[None]:
        """Keep the blocks' inputs of one forward and pass the last one's output through `on_hidden`."""

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            for part, direction in self.directions.items():
                length = foreach.length_of(direction)
                # Along a direction of length 1: small gradients would vanish in float16.
                unit = {name: tensor / torch.where(length > 0, length, 1.0) for name, tensor in direction.items()}
                step = torch.where(length > 0, 1 / length, torch.where(length == 0, 1.0, torch.nan))
                self.changes[part] = hidden_velocity(self.capture, unit), step
            self.directions.clear()
            self.seconds += time.perf_counter() - started
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
            _forward_mode(capture.scored, capture.batch),
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
    def forward(x: torch.Tensor, run: Callable[..., torch.Tensor], module: nn.Module) -> Any:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.module, ctx.dtype = inputs[2], output.dtype

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: None) -> torch.Tensor:
        weight = _weight_of(ctx.module)
        return F.linear(tangent.to(weight.dtype), weight).to(ctx.dtype)


class _LoraLinear(torch.autograd.Function):
    """A LoRA layer's own forward, y = W x + s B A x, with the rule that A and B move and W does not."""

    @staticmethod
    def forward(
        x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, run: Callable[..., torch.Tensor], site: LoraSite
    ) -> Any:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, a, b, _, ctx.site = inputs
        ctx.save_for_forward(x, a, b)
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, dx: torch.Tensor, da: torch.Tensor, db: torch.Tensor, *_: None) -> torch.Tensor:
        x, a, b = ctx.saved_tensors
        scaling = ctx.site.scaling
        weight = _weight_of(ctx.site.layer.get_base_layer())
        low = torch.cat([F.linear(dx.to(a), a) + F.linear(x.to(a), da), F.linear(x.to(a), a)], -1)
        velocity = F.linear(dx.to(weight), weight)
        # d(s B A x) = s [A dx + dA x, A x] [B, dB]^T, added in place: no further temporary of the output's size.
        up = (scaling * torch.cat([b, db], 1)).T
        velocity.flatten(0, -2).addmm_(low.flatten(0, -2).to(velocity), up.to(velocity))
        return velocity.to(ctx.dtype)


@contextlib.contextmanager
def _forward_mode(scored: Scored, batch: Batch) -> Iterator[None]:
    """Give blocks what forward mode needs: attention in plain operations, and a rule for quantised linears.

    Raises:
        NotImplementedError: some module drops or refuses tangents; the message names it.
    """
    blocks = scored.blocks
    named = ((i, name, module) for i, block in enumerate(blocks) for name, module in block.named_modules())
    names = {id(module): f"scored block {i}: {name or type(module).__name__}" for i, name, module in named}
    modules = [module for block in blocks for module in block.modules()]
    leaves = {module for module in modules if next(module.children(), None) is None}
    quantised = [m for m in leaves if type(getattr(m, "weight", None)).__name__ in _QUANTISED]
    ruled = {site.layer: site for site in scored.sites if isinstance(site, LoraSite) and _only_factors_move(site)}
    running: list[nn.Module] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        running.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()
        moves = module in leaves and any(_moves(argument) for argument in args)
        if moves and isinstance(output, torch.Tensor) and output.is_floating_point() and not _moves(output):
            raise _no_rule(names[id(module)], module)

    handles: list[Any] = []
    patched: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        # Attention outside transformers' interface: the math kernel alone of torch's has a rule.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(
            replaced_attention(blocks, lambda kernel, function: forward_mode_attention(function, batch))
        )
        try:
            for module in modules:
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            for module in {*quantised, *ruled}:
                if "forward" not in module.__dict__:
                    site = ruled.get(module)
                    module.forward = _frozen(module) if site is None else _lora(site)
                    patched.append(module)
            yield
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, _NoRule) and running and "forward" in str(error).lower():
                raise _no_rule(names[id(running[-1])], running[-1]) from error
            raise
        finally:
            for module in patched:
                del module.forward
            for handle in handles:
                handle.remove()


def _only_factors_move(site: LoraSite) -> bool:
    """Whether `_LoraLinear` says all of a layer: no bias is trained, and the base is y = W x + b."""
    moving = [p for p in site.layer.parameters() if p.requires_grad]
    return isinstance(site.layer.get_base_layer(), nn.Linear) and all(
        p is site.a.weight or p is site.b.weight for p in moving
    )


def _weight_of(module: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if type(weight).__name__ not in _QUANTISED:
        return weight.detach()
    # Not PEFT's `dequantize_module_weight`, which resets the scales of an 8-bit linear.
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(module, "state", None)).detach()


def _frozen(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    run = module.forward
    return lambda x: _FrozenLinear.apply(x, run, module)


def _lora(site: LoraSite) -> Callable[[torch.Tensor], torch.Tensor]:
    run = site.layer.forward
    return lambda x: _LoraLinear.apply(x, site.a.weight, site.b.weight, run, site)


def _moves(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


class _NoRule(NotImplementedError):
    pass


def _no_rule(name: str, module: nn.Module) -> _NoRule:
    return _NoRule(
        f"{name} ({type(module).__module__}.{type(module).__name__}) has no forward-mode derivative, which the exact "
        'estimator needs. Use estimator="difference", which needs none, or estimator="ghost".'
    )
