"""What a block needs to run in forward mode: rules for attention, and for quantised and LoRA linears."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..batches.batch import Batch
from ..models.attention import AttentionCall, Kernel, eager_attention, replaced_attention
from ..models.changes import Changes
from ..models.sites import LoraSite, Scored

_QUANTISED = ("Params4bit", "Int8Params")  # bitsandbytes' weights, by name: importing it takes seconds


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
def forward_mode(scored: Scored, batch: Batch) -> Iterator[None]:
    """Give blocks what forward mode needs: rules for attention, and for quantised and LoRA linears.

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

    attention = replaced_attention(blocks, lambda kernel, function: forward_mode_attention(function, batch))
    direct = any(_calls_attention(kind) for kind in {type(module) for module in modules})
    with _MathAttention() if direct else contextlib.nullcontext(), attention, Changes() as changes:
        try:
            for module in modules:
                changes.hook(module, enter, before=True)
                changes.hook(module, leave)
            for module in {*quantised, *ruled}:
                if "forward" not in vars(module):
                    site = ruled.get(module)
                    changes.set(module, "forward", _frozen(module) if site is None else _lora(site))
            yield
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, _NoRule) and running and "forward" in str(error).lower():
                raise _no_rule(names[id(running[-1])], running[-1]) from error
            raise


def _only_factors_move(site: LoraSite) -> bool:
    """Whether `_LoraLinear` describes a layer: nothing but A and B is trained, and the base is y = W x + b."""
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


class _MathAttention(TorchFunctionMode):
    """Compute torch's attention by the math kernel, which alone has a rule, if it is called outside transformers'
    interface and an input moves. In this thread; `torch.nn.attention.sdpa_kernel` would act on the whole process."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and any(_moves(x) for x in (*args, *(kwargs or {}).values())):
            return _math_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _calls_attention(kind: type[nn.Module]) -> bool:
    """Whether a module's forward calls torch's attention (Falcon's does); else `_MathAttention` only costs time."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


def _math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Finite, for queries that attend to nothing: their softmax must not be NaN.
        least = torch.finfo(query.dtype).min
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, least)
    run = torch.ops.aten._scaled_dot_product_attention_math
    return run(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


class _NoRule(NotImplementedError):
    pass


def _no_rule(name: str, module: nn.Module) -> _NoRule:
    return _NoRule(
        f"{name} ({type(module).__module__}.{type(module).__name__}) has no forward-mode derivative, which the exact "
        'estimator needs. Use estimator="difference", which needs none, or estimator="ghost".'
    )


class _Attention(torch.autograd.Function):
    """A kernel's own attention, with a forward-mode rule: its output's velocity, a chunk of queries at a time."""

    @staticmethod
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        run: Callable[..., torch.Tensor],
        call: AttentionCall,
        batch: Batch,
    ) -> torch.Tensor:
        return run(query, key, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        query, key, value, _, ctx.call, ctx.batch = inputs
        ctx.save_for_forward(query, key, value)

    @staticmethod
    def jvp(ctx: Any, d_query: torch.Tensor, d_key: torch.Tensor, d_value: torch.Tensor, *_: None) -> torch.Tensor:
        query, key, value = ctx.saved_tensors
        return ctx.call.velocity(query, key, value, d_query, d_key, d_value, ctx.batch)


def forward_mode_attention(registered: Kernel | None, batch: Batch) -> Callable[..., Any]:
    """What replaces a registry's entry while blocks run in forward mode."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        function = registered or eager_attention(module)
        call = AttentionCall.read(query, key, attention_mask, kwargs, _no_forward_mode)

        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = function(module, query, key, value, attention_mask, *args, **kwargs)[0]
            return output.clone(memory_format=torch.contiguous_format)  # not a view: a velocity has its own memory

        return _Attention.apply(query, key, value, run, call, batch), None

    return attention


def _no_forward_mode(option: str) -> Exception:
    return NotImplementedError(f"attention with `{option}` has no forward-mode rule here")
