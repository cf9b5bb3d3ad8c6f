"""Attention probabilities near the diagonal, which the causal terms need, for the scored blocks only.

Whatever kernel a model uses, transformers calls it through its attention registry with queries, keys and values. While
scored blocks run, the registry's entry is wrapped, and queries and keys are kept. The probabilities are computed from
them later, in query chunks, when the gradient of the value projection is known.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..batches.batch import Batch
from .changes import Changes
from .sites import Scored, Site

# Probabilities of one query chunk, all heads, are held in full precision: 32 MiB of float32 at this many elements.
CHUNK_ELEMENTS = 1 << 23
CHUNK_ROWS = 64  # with more queries at once, only more zeros of the causal mask are computed


@dataclass
class AttentionCall:
    """What one attention layer was called with.

    Attributes:
        query (`torch.Tensor`): `(B, heads, T, head_dim)`, positions already encoded, detached.
        key (`torch.Tensor`): `(B, key_value_heads, T, head_dim)`, likewise.
        mask (`torch.Tensor` or `None`): the kernel's own `(B, 1, T, T)` mask, boolean or additive, if it has one.
        scaling, softcap, sliding_window: as the kernel got them.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    sliding_window: int | None

    @classmethod
    def read(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
        refuse: Callable[[str], Exception],
    ) -> AttentionCall:
        """From a registered kernel's arguments; `refuse` makes the error for an option that is not modelled."""
        for name in ("s_aux", "position_bias"):
            if options.get(name) is not None:
                raise refuse(name)
        scaling = options.get("scaling")
        return cls(
            query.detach(),
            key.detach(),
            mask.detach() if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            options.get("softcap"),
            options.get("sliding_window"),
        )

    def velocity(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        d_query: torch.Tensor,
        d_key: torch.Tensor,
        d_value: torch.Tensor,
        batch: Batch,
    ) -> torch.Tensor:
        """Velocity of the output `(B, T, heads, head_dim)`, from those of its inputs (`d_`), in chunks of queries."""
        size, heads, length, width = query.shape
        groups, shared = size * key.shape[1], heads // key.shape[1]
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        rows = min(max(16, CHUNK_ELEMENTS // (size * heads * length)), CHUNK_ROWS)
        key, d_key, value, d_value = (t.flatten(0, 1) for t in (key, d_key, value, d_value))
        out = torch.empty(size, length, heads, value.shape[-1], dtype=value.dtype, device=value.device)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            first = 0 if self.sliding_window is None else max(0, start - self.sliding_window + 1)
            keys, d_keys, values, d_values = (t[:, first:stop] for t in (key, d_key, value, d_value))
            # Grouped-query attention: the queries of one key head stand in one matrix.
            near, d_near = (
                (t[:, :, start:stop] * self.scaling).reshape(groups, shared * (stop - start), width)
                for t in (query, d_query)
            )
            scores = near @ keys.transpose(1, 2)
            moved = torch.baddbmm(d_near @ keys.transpose(1, 2), near, d_keys.transpose(1, 2)).to(dtype)
            scores = scores.to(dtype)
            if self.softcap is not None:
                scores = (scores / self.softcap).tanh_()
                moved *= 1 - scores.square()
                scores *= self.softcap
            # Finite, for queries that attend to nothing: their softmax must not be NaN.
            bias = _bias(self.mask, self.sliding_window, batch, dtype, start, stop, first)
            scores.view(size, heads, stop - start, -1).add_(bias.clamp(min=torch.finfo(dtype).min))
            weights = scores.softmax(-1)
            moved = weights * moved.sub_((weights * moved).sum(-1, keepdim=True))
            moved, weights = moved.to(value.dtype), weights.to(value.dtype)
            chunk = torch.baddbmm(moved @ values, weights, d_values)
            out[:, start:stop] = chunk.view(size, heads, stop - start, -1).transpose(1, 2)
        return out

    def propagate(self, errors: torch.Tensor, window: int, batch: Batch) -> torch.Tensor:
        """Hand each position what later positions get from it: out[t] = sum over t < k <= t + window of A[k, t] e[k].

        A is averaged over query heads (Eq. 9); it is zero across padding and sequence borders.

        Args:
            errors (`torch.Tensor`): `(B, T, n)`, float32 or float64, in which the softmax is computed too.
            window (`int`): W, at least 1.
            batch (`Batch`): tells padding and sequences apart if the kernel was given no explicit mask.

        Returns:
            `torch.Tensor`: `(B, T, n)`.
        """
        size, heads, length, _ = self.query.shape
        kv_heads = self.key.shape[1]
        out = torch.zeros_like(errors)
        rows = min(max(16, CHUNK_ELEMENTS // (size * heads * length)), max(CHUNK_ROWS, window))
        position = torch.arange(length, device=errors.device)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            # Keys from `first` on enter the softmax; keys from `near` on lie within the window of some query.
            first = 0 if self.sliding_window is None else max(0, start - self.sliding_window + 1)
            near = max(first, start - window)
            # Grouped-query attention: the queries of one key head stand in one matrix.
            query = (self.query[:, :, start:stop] * self.scaling).reshape(size, kv_heads, -1, self.query.shape[-1])
            scores = (query @ self.key[:, :, first:stop].transpose(2, 3)).to(errors.dtype)
            scores = scores.view(size, heads, stop - start, stop - first)
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            scores += _bias(self.mask, self.sliding_window, batch, scores.dtype, start, stop, first)
            probabilities = scores.softmax(-1)[..., near - first :].mean(1)
            distance = position[start:stop, None] - position[None, near:stop]
            # A query that attends to nothing (padding) has no probabilities, not even zero ones.
            probabilities = probabilities.nan_to_num_(0.0).mul_((distance > 0) & (distance <= window))
            out[:, near:stop] += probabilities.transpose(1, 2) @ errors[:, start:stop]
        return out


def _bias(
    mask: torch.Tensor | None,
    sliding_window: int | None,
    batch: Batch,
    dtype: torch.dtype,
    start: int,
    stop: int,
    first: int,
) -> torch.Tensor:
    """Additive mask for queries start:stop and keys first:stop, from the kernel's own mask if it has one."""
    if mask is not None:
        mask = mask[:, :, start:stop, first:stop]
        if mask.dtype != torch.bool:
            return mask.to(dtype)
    else:
        position = torch.arange(stop, device=batch.labels.device)
        distance = position[start:stop, None] - position[None, first:stop]
        mask = (distance >= 0)[None]
        if sliding_window is not None:
            mask = mask & (distance < sliding_window)
        if batch.packed:
            mask = mask & (batch.segments[:, start:stop, None] == batch.segments[:, None, first:stop])
        if batch.attended is not None:
            mask = mask & batch.attended[:, None, first:stop]
        mask = mask[:, None]
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


Kernel = Callable[..., Any]


def eager_attention(module: nn.Module) -> Kernel:
    """Eager attention: not an entry of the registry, but a function in the module of the model's own classes."""
    function: Kernel = sys.modules[type(module).__module__].eager_attention_forward
    return function


class _Dispatch:
    """The registry's entry for one kernel while any thread replaces it, each for its own modules. Other modules still
    call what was registered.

    The registry belongs to the process, and contexts of two threads may end in the order they began. So each context
    has an entry here, and what was registered is put back when the last entry goes.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.before: Kernel | None = None
        self._put_back: Callable[[], Any] = int
        self._own: dict[object, tuple[set[int], Kernel]] = {}

    def replace(self, modules: set[int], replacement: Callable[[str, Kernel | None], Kernel], changes: Changes) -> None:
        local = ALL_ATTENTION_FUNCTIONS._local_mapping
        found = local.get(self.kernel)
        if found is not self:
            self.before = found or ALL_ATTENTION_FUNCTIONS._global_mapping.get(self.kernel)
            self._put_back = (
                partial(local.update, {self.kernel: found}) if found else partial(local.pop, self.kernel, None)
            )
        changes.note_unless(self._own, self._put_back)
        changes.put(self._own, object(), (modules, replacement(self.kernel, self.before)))
        local[self.kernel] = self  # after its entry: a thread that leaves now sees it, and puts nothing back

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        latest_first = reversed(list(self._own.values()))
        own = next((function for modules, function in latest_first if id(module) in modules), None)
        return (own or self.before or eager_attention(module))(module, *args, **kwargs)


_dispatches: dict[str, _Dispatch] = {}  # by kernel


@contextlib.contextmanager
def replaced_attention(blocks: list[nn.Module], replacement: Callable[[str, Kernel | None], Kernel]) -> Iterator[None]:
    """Replace the registry's entries for the kernels that blocks use, for these blocks alone; they are put back on
    leaving. Meanwhile other threads may run other models, and replace their attention.

    Args:
        replacement (`Callable`): from a kernel's name and its entry (None: eager, which has none) to another function.
    """
    modules = {id(module): module for block in blocks for module in block.modules()}
    kernels = {
        config._attn_implementation
        for module in modules.values()
        if (config := getattr(module, "config", None)) is not None and hasattr(config, "_attn_implementation")
    }
    with Changes() as changes:
        for kernel in kernels:
            _dispatches.setdefault(kernel, _Dispatch(kernel)).replace(set(modules), replacement, changes)
        yield


class AttentionWatch:
    """Keeps the attention calls of scored blocks while `watching()` is entered, and finds their value rows.

    Args:
        scored (`Scored`): its `value_rows` are filled when a block first runs.
    """

    def __init__(self, scored: Scored) -> None:
        self.scored = scored
        self.outputs: dict[int, dict[str, torch.Tensor]] = {}  # by block: values depend on those of earlier blocks too
        self.calls: dict[str, AttentionCall] = {}
        self._block_of = {id(module): i for i, block in enumerate(scored.blocks) for module in block.modules()}

    def saw_output(self, site: Site, output: torch.Tensor) -> None:
        """Hold the output of a tapped linear until its block's attention shows whether it is values."""
        if site.block not in self.scored.value_rows:
            self.outputs.setdefault(site.block, {})[site.name] = output

    def watching(self) -> AbstractContextManager[None]:
        """A context in which the calls of the kernels in use are kept."""
        return replaced_attention(self.scored.blocks, lambda kernel, registered: self._wrapped(registered))

    def _wrapped(self, registered: Callable[..., Any] | None) -> Callable[..., Any]:
        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if id(module) in self._block_of and torch.is_grad_enabled():
                self._keep(module, query, key, value, attention_mask, kwargs)
            function = registered or eager_attention(module)
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return attention

    def _keep(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> None:
        carriers = self._carriers(module, value)
        if not carriers:
            return

        def refuse(option: str) -> Exception:
            return ValueError(
                f"{carriers[0]}: this attention uses `{option}`, which the causal terms do not model. "
                "Set causal_window=0 to value tokens without them."
            )

        call = AttentionCall.read(query, key, mask, options, refuse)
        self.calls.update(dict.fromkeys(carriers, call))

    def _carriers(self, module: nn.Module, value: torch.Tensor) -> list[str]:
        """Names of the sites whose output becomes `value`. Which of their rows do is found by a gradient."""
        block = self._block_of[id(module)]
        own = self.outputs.get(block, {})
        if block not in self.scored.value_rows:
            found: tuple[torch.Tensor | None, ...] = ()
            if value.requires_grad and own:
                outputs = list(own.values())
                found = torch.autograd.grad(
                    value, outputs, torch.ones_like(value), retain_graph=True, allow_unused=True
                )
            rows = {
                name: (gradient != 0).flatten(0, -2).any(0).nonzero().flatten()
                for name, gradient in zip(own, found, strict=False)
                if gradient is not None
            }
            self.scored.value_rows[block] = {name: row for name, row in rows.items() if row.numel()}
            if not self.scored.value_rows[block]:
                warnings.warn(
                    "A scored block has no adapter on its value projection, so it adds no causal term. Add the value "
                    "projection to target_modules, or set causal_window=0 to skip attention work.",
                    stacklevel=2,
                )
        self.outputs.clear()
        return list(self.scored.value_rows[block])
