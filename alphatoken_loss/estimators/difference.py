"""The difference estimator: what a token's loss changes by when the adapter is nudged, in one more forward.

The first-order value of token t is <grad l_t, D>, D = target + lambda * drift. Nudge the scored parameters from theta
to theta - eps D, and what stands before the LM head changes from h to h'; with r_t the gradient of the loss at h_t,

    value(t) = <r_t, h_t - h'_t> / eps,

which is the change of the token's loss with the head taken at first order: (l_t(theta) - l_t(theta - eps D)) / eps with
less rounding, since no logits of the nudged model are formed, and in the units, sign and weight that any loss, SFT or
preference, gives its tokens. Blocks, attention and linears need not be known.

The nudged forward runs at the very start of the forward that it belongs to, on the same inputs, under the same autocast
and random state; parameters are swapped for prepared tensors, so theirs are never written to.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..models import tensors as foreach
from ..models.forwards import PACKED_WITH_CACHE, SECOND_FORWARD, check_batch
from ..models.modes import without_checkpointing
from ..models.sites import Scored
from ..models.structure import find_decoder, unwrap
from ..models.tensors import accumulation_dtype
from ..values import TokenValues
from .steps import LONGEST, Steps
from .values import not_finite, values_of_changes


class Difference:
    """Values one batch by one nudged forward per part (see the module's docstring).

    Args:
        model (`nn.Module`): the model in training.
        parts (`dict`): part of the value -> parameter name -> direction of the parameter's shape. Either `"total"`, or
            `"target"` and `"drift"`.
        steps (`Steps`): carried from batch to batch.
    """

    def __init__(
        self,
        model: nn.Module,
        scored: Scored,
        batch: Batch,
        config: AlphaTokenConfig,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        steps: Steps,
    ) -> None:
        self.scored, self.batch, self.config, self.steps = scored, batch, config, steps
        self.parts, self.directions = tuple(parts), dict(parts)
        self.seen = False
        self.seconds = 0.0
        self.changes: dict[str, tuple[torch.Tensor, torch.Tensor | float]] = {}
        self.decoder = find_decoder(model)
        inner = unwrap(model)
        own = {id(p): name for name, p in self.decoder.named_parameters()}
        # Virtual tokens of prompt learning come from outside the decoder: then the whole model runs again.
        self.virtual = not all(id(p) in own for p in scored.parameters.values())
        self.entry = inner if self.virtual else self.decoder
        if self.virtual:
            own = {id(p): name for name, p in inner.named_parameters()}
        self._names = {name: own[id(p)] for name, p in scored.parameters.items()}
        self._running = False
        self._hidden: torch.Tensor | None = None  # of a forward that is this estimator's own

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> Iterator[None]:
        """Nudge beside one forward, and pass its last hidden state `(B, T, hidden)` through `on_hidden`.

        Args:
            training (`bool`): the forward that runs with grad; it is nudged before it runs. Else the one without.
        """
        call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        watched = False
        nudged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal call, watched
            if self._running or torch.is_grad_enabled() != training:
                return
            if self.seen:
                raise RuntimeError(SECOND_FORWARD)
            self._check_call(args, kwargs)
            self.seen = watched = True
            call = (args, kwargs)
            if training:
                nudged.update(self._nudge_all(call, None))
                self.directions.clear()  # nothing of the adapters' size is held through the step

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            nonlocal watched
            if not self._running and not watched:
                return None
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            if self._running:
                self._hidden = hidden
                return None
            watched = False
            check_batch(self.batch, hidden.shape[0], hidden.shape[1], virtual=self.virtual)
            if not training:
                nudged.update(self._nudge_all(call, hidden))
                self.directions.clear()
            self._measure(hidden.detach(), nudged)
            nudged.clear()
            if isinstance(output, tuple):
                return (on_hidden(hidden), *output[1:])
            output.last_hidden_state = on_hidden(hidden)
            return output

        handles = [
            self.entry.register_forward_pre_hook(before, with_kwargs=True),
            self.decoder.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def values(self, rows: torch.Tensor, *, norms: bool = False) -> TokenValues:
        """From the gradient `(B, T, hidden)` at the hidden state that `on_hidden` was given."""
        return values_of_changes(self.scored, self.batch, self.config, self.parts, rows, self.changes)

    def release(self) -> None:
        self.changes = {}

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.virtual:
            return
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError(
                "The model was called with a cache, to which a nudged forward would append. Call it with "
                "use_cache=False and without past_key_values."
            )
        caching = kwargs.get("use_cache")
        caching = getattr(self.decoder.config, "use_cache", False) if caching is None else caching
        if self.batch.packed and caching:
            raise ValueError(PACKED_WITH_CACHE)

    def _run(self, call: tuple[tuple[Any, ...], dict[str, Any]], moved: dict[str, torch.Tensor]) -> torch.Tensor:
        """The last hidden state with some parameters in the place of the entry's own."""
        args, kwargs = call
        kwargs = {key: value for key, value in kwargs.items() if key not in ("labels", "fused_lm_head")}  # no loss
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        devices = {p.device for p in self.scored.parameters.values()} - {torch.device("cpu")}
        kind = next(iter(devices)).type if devices else "cuda"
        self._running = True
        try:
            fork = torch.random.fork_rng(list(devices), device_type=kind)
            with torch.no_grad(), fork, without_checkpointing(self.entry):
                torch.func.functional_call(self.entry, moved, args, kwargs)
            assert self._hidden is not None
            return self._hidden
        finally:
            self._running, self._hidden = False, None

    def _nudge_all(
        self, call: tuple[tuple[Any, ...], dict[str, Any]], hidden: torch.Tensor | None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Part -> the nudged hidden state and eps."""
        started = time.perf_counter()
        found = {}
        for part, direction in self.directions.items():
            norm = foreach.length_of(direction)
            if part not in self.steps.length:
                if norm == 0:
                    continue  # the drift before the first step
                hidden = self._run(call, {}) if hidden is None else hidden
                tried = self._search(call, hidden.detach(), part, norm)
                if tried is not None:
                    found[part] = tried
            else:
                eps = self.steps.length[part] / torch.where(norm == 0, 1.0, norm)
                found[part] = self._nudge(call, part, eps), eps
        self.seconds += time.perf_counter() - started
        return found

    def _nudge(self, call: tuple[tuple[Any, ...], dict[str, Any]], part: str, eps: torch.Tensor) -> torch.Tensor:
        direction, parameters = self.directions[part], self.scored.parameters
        there = {name: p.detach().to(direction[name].dtype) for name, p in parameters.items()}
        moved = foreach.added(there, foreach.scaled(direction, -eps))
        return self._run(call, {self._names[name]: tensor.to(parameters[name].dtype) for name, tensor in moved.items()})

    def _search(
        self, call: tuple[tuple[Any, ...], dict[str, Any]], hidden: torch.Tensor, part: str, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the first step's length by trying, or nothing where no response token is reached by the nudge."""
        if not norm.isfinite():
            raise FloatingPointError(not_finite(part))
        wanted = self.steps.effect_wanted(self.decoder, self.scored.device)
        size = foreach.length_of({name: p.detach().to(norm.dtype) for name, p in self.scored.parameters.items()})
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
        self.steps.length[part], self.steps.longest[part] = eps * norm, longest
        return nudged, eps

    def _effect(self, hidden: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        rows = self.batch.rows
        dtype = accumulation_dtype(hidden)
        squares = (t[:, -rows.shape[1] :].to(dtype).square().sum(-1).masked_fill(~rows, 0) for t in (change, hidden))
        changed, whole = (square.sum() for square in squares)
        return (changed / whole).sqrt()

    def _measure(self, hidden: torch.Tensor, nudged: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        wanted = self.steps.effect_wanted(self.decoder, self.scored.device)
        for part, (moved, eps) in nudged.items():
            change = hidden - moved
            self.steps.learn(part, self._effect(hidden, change), wanted)
            self.changes[part] = change, eps
