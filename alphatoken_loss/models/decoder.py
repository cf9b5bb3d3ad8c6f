"""One forward of the decoder that is watched, and can be run again with other parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..batches.batch import Batch
from .changes import Changes
from .forwards import (
    SECOND_FORWARD,
    check_batch,
    hidden_of,
    refuse_compiled_call,
    refuse_packed_with_cache,
    renew_forward,
    with_hidden,
)
from .layout import modules_of
from .modes import may_draw, without_checkpointing
from .structure import causal_lm, find_decoder, learns_prompts, runs_apart, unwrap


@dataclass(frozen=True)
class Call:
    """How the decoder (with virtual tokens, the whole model) was called; tensors are references, not copies."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DecoderForward:
    """Watches the one forward that values a batch.

    Args:
        model (`nn.Module`): the model that runs.
        batch (`Batch`): what it runs on.
        parameters (`dict`): the parameters that `again` replaces, by their names in `model.named_parameters()`; if
            empty, the forward is only watched.
        training (`bool`): whether to watch the forward with grad, or the one without.

    Attributes:
        seen (`bool`): whether it has run.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, parameters: Mapping[str, torch.Tensor], *, training: bool
    ) -> None:
        self.batch, self.training = batch, training
        self.decoder = find_decoder(model)
        own = {id(p) for module in modules_of(self.decoder) for p in module._parameters.values()}
        # Virtual tokens of prompt learning are made outside the decoder: then `again` runs the whole model.
        self.virtual = not all(id(p) in own for p in parameters.values()) or learns_prompts(model)
        self.entry = unwrap(model) if self.virtual else self.decoder
        self._parameters = parameters
        self._dtypes = {name: p.dtype for name, p in parameters.items()}
        self._devices = {p.device for p in parameters.values()} - {torch.device("cpu")}
        self.seen = False
        self._running = False
        self._hidden: torch.Tensor | None = None  # of a forward that `again` runs

    @contextlib.contextmanager
    def watching(
        self,
        on_hidden: Callable[[Call, torch.Tensor], torch.Tensor],
        *,
        on_call: Callable[[Call], object] | None = None,
    ) -> Iterator[None]:
        """Call `on_call` before the forward, and pass its last hidden state `(B, T, hidden)` through `on_hidden`.

        Raises:
            RuntimeError: a second such forward runs.
            ValueError: the forward's shape is not the batch's, or it has a cache.
        """
        call: Call | None = None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal call
            if self._running or torch.is_grad_enabled() != self.training:
                return
            if self.seen:
                raise RuntimeError(SECOND_FORWARD)
            refuse_compiled_call()
            self._check_call(args, kwargs)
            self.seen = True
            call = Call(args, kwargs)
            if on_call is not None:
                on_call(call)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            nonlocal call
            if self._running:
                self._hidden = hidden_of(output)
                return None
            if call is None:
                return None
            watched, call = call, None
            hidden = hidden_of(output)
            check_batch(self.batch, hidden.shape[0], hidden.shape[1], virtual=self.virtual)
            return with_hidden(output, on_hidden(watched, hidden))

        with Changes() as changes:
            renew_forward(self.entry, changes)
            changes.hook(self.entry, before, before=True, with_kwargs=True)
            changes.hook(self.decoder, after)
            yield

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Forwards that run inside, of another model or of this one in another mode, are not watched."""
        self._running = True
        try:
            yield
        finally:
            self._running, self._hidden = False, None

    def again(self, call: Call, moved: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Run the same call again, without grad and from the same random state; return the last hidden state `(B, T,
        hidden)`. Tensors of `moved` take the place of the parameters of these names, which are not written to."""
        kwargs = {k: v for k, v in call.kwargs.items() if k not in ("labels", "fused_lm_head")}  # no loss
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        placed = {id(self._parameters[name]): tensor.to(self._dtypes[name]) for name, tensor in moved.items()}
        self._running = True
        try:
            with torch.no_grad(), self._forked_noise(), without_checkpointing(self.entry), Changes() as changes:
                changes.replace(self.entry, placed)
                changes.keep_modes()
                self.entry(*call.args, **kwargs)
            assert self._hidden is not None
            return self._hidden
        finally:
            self._running, self._hidden = False, None

    def _forked_noise(self) -> AbstractContextManager[None]:
        """Random numbers are drawn again afterwards. They are the process', so this is left where none are drawn."""
        if not may_draw(self.entry):
            return contextlib.nullcontext()
        kind = next(iter(self._devices)).type if self._devices else "cuda"
        return torch.random.fork_rng(list(self._devices), device_type=kind)

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.virtual:
            return
        if self._parameters and any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError(
                "The model was called with a cache, to which a second forward would append. Call it with "
                "use_cache=False and without past_key_values."
            )
        refuse_packed_with_cache(self.batch, self.decoder, kwargs)


def last_hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The last hidden state `(B, T, hidden)` of a model on a batch; any virtual tokens stand before the batch's."""
    decoder = find_decoder(model)
    device = causal_lm(model).get_input_embeddings().weight.device  # type: ignore[operator]
    inputs = {**batch.to(device).inputs, "use_cache": False, "return_dict": True}
    if not learns_prompts(model) and runs_apart(model):
        return decoder(**inputs).last_hidden_state
    kept: list[torch.Tensor] = []
    with Changes() as changes:
        changes.hook(decoder, lambda module, args, output: kept.append(output.last_hidden_state))
        model(**inputs, logits_to_keep=1)
    return kept[0]
