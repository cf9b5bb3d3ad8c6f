"""What every watched forward of the model has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from .changes import Changes
from .modes import refuse_inference_mode, without_noise
from .structure import COMPILED, unwrap

PACKED_WITH_CACHE = (
    "The batch is packed and the model was called with a cache, which makes transformers attend across sequence "
    "borders. Call it with use_cache=False."
)
SECOND_FORWARD = (
    "A second forward with grad ran in one AlphaToken context, which values one batch by one forward. Open a context "
    "for each forward; a reference belongs under torch.no_grad()."
)


def refuse_compiled_call() -> None:
    """Raise ValueError in a hook that torch.compile traces: the code that it makes would run without the hooks."""
    if torch.compiler.is_dynamo_compiling():  # `is_compiling` is also true where another thread compiles
        from torch._dynamo import graph_break  # imported already

        graph_break()  # so that the error is raised; without it, dynamo would compile in another way
        raise ValueError(f"What torch.compile returned was run: {COMPILED}")


def renew_forward(module: nn.Module, changes: Changes) -> None:
    """Make torch.compile compile again, where hooks refuse it. Code that it made earlier is guarded against another
    `forward`, but not against hooks."""
    changes.put(vars(module), "forward", functools.partial(module.forward))


def check_batch(batch: Batch, size: int, length: int, *, virtual: bool = False) -> None:
    """Check that a forward ran on the batch that is valued; `virtual` tokens may come before its own.

    Raises:
        ValueError: it did not.
    """
    if size != batch.shape[0] or (length < batch.shape[1] if virtual else length != batch.shape[1]):
        raise ValueError(
            f"The model ran on a batch of shape {(size, length)}, but the batch being valued has shape {batch.shape}. "
            "Give the context the batch that the model runs on."
        )


def refuse_other_rows(batch: Batch, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """A hook: raise ValueError if a decoder with grad is called on other tokens than the batch's, of the same shape."""
    ids, own = kwargs.get("input_ids", args[0] if args else None), batch.inputs.get("input_ids")
    if not (torch.is_grad_enabled() and isinstance(ids, torch.Tensor) and isinstance(own, torch.Tensor)):
        return
    if ids.shape != own.shape or ids.data_ptr() == own.data_ptr():  # mostly the same tensor: nothing is waited for
        return
    if not torch.equal(ids, own.to(ids.device)):
        raise ValueError(
            "The model ran on other input_ids than those of the batch being valued, so that the mask would fall on "
            "other tokens. Give the context the batch that the model runs on."
        )


def hidden_of(output: Any) -> torch.Tensor:
    """The last hidden state of what a decoder returned."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def with_hidden(output: Any, gated: torch.Tensor) -> Any:
    """What a decoder returned, with another tensor in the place of its last hidden state, also where that is listed
    among all hidden states."""
    hidden = hidden_of(output)
    if isinstance(output, tuple):
        return _placed(output, hidden, gated)
    output.last_hidden_state = gated
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = _placed(output.hidden_states, hidden, gated)
    return output


def _placed(part: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(part, tuple):
        return tuple(_placed(each, old, new) for each in part)
    return new if part is old else part


def refuse_packed_with_cache(batch: Batch, decoder: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if a decoder is called with a cache on a packed batch."""
    caching = kwargs.get("use_cache")
    caching = getattr(decoder.config, "use_cache", False) if caching is None else caching
    if caching and batch.packed:
        raise ValueError(PACKED_WITH_CACHE)


def rows_without_graph(
    model: nn.Module,
    watching: Callable[[Callable[[torch.Tensor], torch.Tensor]], AbstractContextManager[None]],
    loss_sum: Callable[[nn.Module], torch.Tensor],
) -> torch.Tensor:
    """The loss's gradient at the hidden state that a watched forward passes to its callback; no graph before it."""
    leaves: list[torch.Tensor] = []

    def cut(hidden: torch.Tensor) -> torch.Tensor:
        leaves.append(hidden.detach().requires_grad_())
        torch.set_grad_enabled(True)  # for norm, head and loss; `no_grad` below puts it back
        return leaves[0]

    refuse_inference_mode()
    inner = unwrap(model)  # a distributed wrapper would take this forward for a training step's
    with without_noise(inner):
        with torch.no_grad(), watching(cut):
            loss = loss_sum(inner)
        (rows,) = torch.autograd.grad(loss, leaves)
    return rows
