"""A penalty that holds response tokens to another model: KL(other || policy).

For one response token it is sum_v p_other(v) (log p_other(v) - log p(v)). compare.py computes it, and its gradient at
the last hidden state, some rows at a time.

The gradient gate masks every gradient that passes it, and values tokens by it. So the penalty's gradient must not pass
the gate: it is taken back from the last hidden state to the gate's output (through the final norm, where the gate is at
the last block), and is then added at the gate's input.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..checks import check_choice, is_number
from ..models.changes import IN_CONTEXT, Changes
from ..models.decoder import last_hidden
from ..models.forwards import SECOND_FORWARD, check_batch, hidden_of, refuse_packed_with_cache
from ..models.modes import (
    HOOKS_INSIDE_CHECKPOINT,
    autocast_without_cache,
    checkpointed,
    saved_tensors_hooked,
    unhooked,
    without_noise,
)
from ..models.reference import reference_mode, refuse_itself
from ..models.start import has_adapters, start_of
from ..models.structure import find_decoder, learns_prompts, unwrap
from .compare import KL_OVER, Compared, compare, in_whole, rows_at
from .head import check_head, head_of, logits_of_hidden

KL_ON = ("all", "dropped")


def check_kl_coef(kl_coef: float) -> None:
    """Raise ValueError where this cannot be the weight of a penalty."""
    if not is_number(kl_coef) or not 0 <= kl_coef < math.inf:
        raise ValueError(
            f"kl_coef is {kl_coef!r}; it is the weight of a KL beside the loss and must be a finite number of at least "
            "0. Use 0 for no penalty."
        )


def check_kl_options(on: str, over: str) -> None:
    """Raise ValueError for an option that is not known."""
    check_choice("kl_on", on, KL_ON)
    check_choice("kl_over", over, KL_OVER)


class _Attached(torch.autograd.Function):
    """A scalar whose gradient is known already: at some positions of a hidden state, and at parameters of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        hidden: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        of_head: list[torch.Tensor],
        counted: list[bool],
        *head: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(index, rows, *of_head)
        ctx.shape, ctx.counted = hidden.shape, counted  # not the Penalty itself, which holds this graph
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.counted[0] = True
        index, rows, *of_head = ctx.saved_tensors
        whole = rows.new_zeros(ctx.shape)
        whole.view(-1, ctx.shape[-1]).index_copy_(0, index, rows * scale)
        return None, whole, None, None, None, None, *(gradient * scale for gradient in of_head)


INSIDE_CHECKPOINT = (
    "This version of transformers runs a block's hooks inside its checkpoint, where a KL beside token values cannot be "
    "taken. Use transformers 5.23 or newer, no gradient checkpointing, kl_coef=0, or "
    'estimator="difference".'
)


GATED = (
    "A KL was asked for inside the context of an AlphaToken, whose gate would mask its gradient too. Give kl_coef to "
    "that context, `with alphatoken(batch, kl_coef=...) as step`, and add step.kl to the loss."
)


def refuse_inside_checkpoint(blocks: list[nn.Module]) -> None:
    """Raise ValueError, before the forward, where a gate at the last block would lie inside its checkpoint."""
    if HOOKS_INSIDE_CHECKPOINT and any([checkpointed(block) for block in blocks]):
        raise ValueError(INSIDE_CHECKPOINT)


class Penalty:
    """The penalty of one batch, made in the forward that runs inside `watching()`.

    Args:
        model (`nn.Module`): the policy.
        batch (`Batch`): the batch that the policy runs on.
        kl_coef (`float`): what the KL is multiplied by.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the sum over response tokens is divided by; by
            default their number.
        ref_model (`nn.Module` or `None`): the reference; `None` for the policy with adapters off or "ref" on. It runs
            without dropout and without grad, right after the policy's decoder.
        on (`str`): take it on `"all"` response tokens, or on the `"dropped"` ones. What the sum is divided by is the
            same in both cases.
        over (`str`): the whole `"vocabulary"`, or `"without_label"`, see `compare`.
        dropped (`Callable`, *optional*): called when the forward has passed the gate; returns `(B, T)` bool, True at
            the rows whose tokens are dropped.
        compared (`Callable`, *optional*): called at the same moment; returns a comparison with another model at all
            response rows, where one was made already. Then no reference is run.

    Attributes:
        kl (`torch.Tensor` or `None`): kl_coef * KL, a scalar with graph, once the forward has run.
        total (`torch.Tensor` or `None`): the KL summed over response tokens, in nats, detached.
        counted (`bool`): whether a backward has reached it.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        kl_coef: float,
        num_items_in_batch: int | torch.Tensor | None = None,
        ref_model: nn.Module | None = None,
        on: str = "all",
        over: str = "vocabulary",
        dropped: Callable[[], torch.Tensor] | None = None,
        compared: Callable[[], Compared | None] | None = None,
    ) -> None:
        self.model, self.batch = unwrap(model), batch
        self.ref_model = None if ref_model is None else unwrap(ref_model)
        self.coef, self.num_items = kl_coef, num_items_in_batch
        self.on, self.over = on, over
        self.dropped, self.compared = dropped, compared
        check_head(self.model, batch)
        if self.ref_model is not None:
            refuse_itself(self.model, self.ref_model)
            check_head(self.ref_model, batch)
        self.kl: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self._counted = [False]
        self._gated: tuple[torch.Tensor, torch.Tensor] | None = None
        self._round_gate = False
        self._between = contextlib.ExitStack()
        self._running = False

    @property
    def counted(self) -> bool:
        return self._counted[0]

    def around(self, gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same gate; what it is given and returns is noted, since the penalty's gradient goes round it."""
        self._round_gate = True

        def passing(hidden: torch.Tensor) -> torch.Tensor:
            if HOOKS_INSIDE_CHECKPOINT and saved_tensors_hooked():
                raise ValueError(INSIDE_CHECKPOINT)
            gated = gate(hidden)
            self._gated = hidden, gated
            # The graph between gate and decoder's output is walked twice, but offloaded tensors come back only once.
            self._between.enter_context(unhooked())
            return gated

        return passing

    @contextlib.contextmanager
    def watching(self) -> Iterator[Penalty]:
        """Make the penalty in the forward of the model that runs inside. Enter it after the gate has set its hooks.

        Raises:
            RuntimeError: the model is in a context whose gate this penalty does not know, and which would mask it.
        """
        if IN_CONTEXT in vars(self.model) and not self._round_gate:
            raise RuntimeError(GATED)
        training = torch.is_grad_enabled()
        decoder = find_decoder(self.model)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._running or torch.is_grad_enabled() != training:
                return
            if self.kl is not None:
                raise RuntimeError(SECOND_FORWARD)
            refuse_packed_with_cache(self.batch, decoder, kwargs)
            hidden = hidden_of(output)
            check_batch(self.batch, *hidden.shape[:2], virtual=learns_prompts(self.model))
            self._between.close()
            gated, self._gated = self._gated, None
            self._running = True
            try:
                with autocast_without_cache(hidden.device.type):
                    self._make(hidden, gated)
            finally:
                self._running = False

        with Changes() as changes:
            changes.hook(decoder, after, with_kwargs=True)
            try:
                yield self
            finally:
                self._between.close()
                self._gated = None

    def _make(self, hidden: torch.Tensor, gated: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        rows, length = self._rows(), self.batch.shape[1]
        trained = [p for p in head_of(self.model).parameters() if p.requires_grad]
        found = None if self.compared is None else self.compared()
        if found is None:
            found = self._against_reference(hidden, rows, trained)
        kl, gradient = found.kl, found.gradient
        found.gradient = None  # it lives on in the graph alone
        if self.on == "dropped":
            taken = rows.flatten()[found.index].to(kl.device)
            kl = kl.masked_fill(~taken, 0)
            gradient = None if gradient is None else gradient.masked_fill_(~taken[:, None], 0)
        self.total = total = kl.sum()
        if gradient is not None and (hidden.requires_grad or trained):
            here = in_whole(found.index, length, hidden)
            before, gate = gated or (hidden, hidden)
            if gate is not hidden:
                whole = torch.zeros_like(hidden).flatten(0, 1).index_copy_(0, here, gradient).view_as(hidden)
                (whole,) = torch.autograd.grad(hidden, gate, whole, retain_graph=True)
                positions = hidden.shape[:2].numel()  # Gemma 3n has several streams, each with these positions
                streams = torch.arange(0, whole.shape[:-1].numel(), positions, device=here.device)
                here = (streams[:, None] + here).flatten()
                gradient = whole.flatten(0, -2)[here]
            total = _Attached.apply(total, before, here, gradient, found.of_head, self._counted, *trained)
        count = self.batch.rows.sum() if self.num_items is None else torch.as_tensor(self.num_items)
        self.kl = self.coef * total / count.to(total.device).clamp(min=1)

    def _rows(self) -> torch.Tensor:
        """`(B, T)` bool, the rows that it is taken on."""
        if self.on == "all":
            return self.batch.rows
        assert self.dropped is not None
        return self.batch.rows & self.dropped().to(self.batch.rows.device)

    def _against_reference(self, hidden: torch.Tensor, rows: torch.Tensor, trained: list[nn.Parameter]) -> Compared:
        length, (index, labels) = self.batch.shape[1], self.batch.predicting
        if self.on == "dropped":
            taken = rows.flatten()[index]
            index, labels = index[taken], labels[taken]
        with torch.no_grad(), reference_mode(self.model, self.ref_model) as reference, without_noise(reference):
            wanted = rows_at(last_hidden(reference, self.batch), index, length)
        with without_noise(head_of(self.ref_model or self.model)):
            return compare(
                self.model,
                rows_at(hidden.detach(), index, length),
                wanted,
                index,
                labels,
                over=self.over,
                reference_logits=self._reference_logits(),
                trained=trained,
            )

    def _reference_logits(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The reference's LM head: the model's own where nothing in that is trained, or was."""
        if self.ref_model is not None or not self._head_moves():
            return functools.partial(logits_of_hidden, self.ref_model or self.model)

        def at_reference(hidden: torch.Tensor) -> torch.Tensor:
            with reference_mode(self.model, None) as reference:
                return logits_of_hidden(reference, hidden)

        return at_reference

    def _head_moves(self) -> bool:
        head, started = head_of(self.model), start_of(self.model).tensors
        own = {id(parameter) for parameter in head.parameters()}
        moved = (id(parameter) for name, parameter in self.model.named_parameters() if name in started)
        return has_adapters(head) or (bool(started) and not own.isdisjoint(moved))
