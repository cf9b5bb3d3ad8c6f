"""A penalty that holds every response token to the reference: KL(reference || policy), with no whole logits.

Per response token it is sum_v p_ref(v) (log p_ref(v) - log p(v)), over the whole vocabulary. All it needs of either
model is the last hidden state and the LM head, so logits are formed for some rows at a time, and their gradient,
p(v) - p_ref(v), is taken back to the hidden state at once: what is kept is one row of gradient per response token.

A gradient gate masks what passes it, and values tokens by that. The penalty therefore joins the graph before the gate:
its gradient is taken back from the last hidden state to the gated one (through the final norm, for a gate at the last
block), and handed to the hidden state that the gate was given.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..models.changes import Changes
from ..models.forwards import PACKED_WITH_CACHE, SECOND_FORWARD, check_batch
from ..models.modes import HOOKS_INSIDE_CHECKPOINT, saved_tensors_hooked, unhooked, without_noise
from ..models.reference import reference_mode
from ..models.start import start_of
from ..models.structure import causal_lm, find_decoder, learns_prompts, unwrap
from ..models.tensors import accumulation_dtype
from .logps import logits_of_hidden

_ROWS, _LOGITS = 256, 2**25  # of which logits live at a time, and at most how many logits


def check_kl_coef(kl_coef: float) -> None:
    """Raise ValueError for what is no weight of a penalty."""
    number = isinstance(kl_coef, (int, float)) and not isinstance(kl_coef, bool)
    if not number or not 0 <= kl_coef < math.inf:
        raise ValueError(
            f"kl_coef is {kl_coef!r}; it is the weight of the KL to the reference beside the loss and must be a finite "
            "number of at least 0. Use 0 for no penalty."
        )


class _Attached(torch.autograd.Function):
    """A total whose gradient was taken beforehand: rows at some positions of a hidden state, and of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        hidden: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        of_head: list[torch.Tensor],
        *head: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(index, rows, *of_head)
        ctx.shape = hidden.shape
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, rows, *of_head = ctx.saved_tensors
        whole = rows.new_zeros(ctx.shape)
        whole.view(-1, ctx.shape[-1]).index_copy_(0, index, rows * scale)
        return None, whole, None, None, None, *(gradient * scale for gradient in of_head)


class Penalty:
    """The penalty of one batch, from the forward that runs while it is watching.

    Args:
        model (`nn.Module`): the policy.
        batch (`Batch`): the batch that the policy runs on.
        kl_coef (`float`): what the KL is multiplied by.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the sum over response tokens is divided by; by
            default their number.
        ref_model (`nn.Module` or `None`): the reference; `None` for the policy with adapters off or "ref" on. It runs
            without dropout and without grad, right after the policy's decoder.

    Attributes:
        kl (`torch.Tensor` or `None`): kl_coef * KL, a scalar with graph, once the forward has run.
        total (`torch.Tensor` or `None`): the KL summed over response tokens, in nats, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        kl_coef: float,
        num_items_in_batch: int | torch.Tensor | None = None,
        ref_model: nn.Module | None = None,
    ) -> None:
        self.model, self.batch = unwrap(model), batch
        self.ref_model = None if ref_model is None else unwrap(ref_model)
        self.coef, self.num_items = kl_coef, num_items_in_batch
        self.kl: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self._gated: tuple[torch.Tensor, torch.Tensor] | None = None
        self._between = contextlib.ExitStack()
        self._running = False

    def around(self, gate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same gate, noted as the one that the penalty's gradient goes round."""

        def passing(hidden: torch.Tensor) -> torch.Tensor:
            if HOOKS_INSIDE_CHECKPOINT and saved_tensors_hooked():
                raise ValueError(
                    "This version of transformers runs a block's hooks inside its checkpoint, where a KL beside token "
                    "values cannot be taken. Use transformers 5.21 or newer, no gradient checkpointing, kl_coef=0, or "
                    'estimator="difference".'
                )
            gated = gate(hidden)
            self._gated = hidden, gated
            # What lies between gate and decoder's output is walked twice, and offloaded tensors come back only once.
            self._between.enter_context(unhooked())
            return gated

        return passing

    @contextlib.contextmanager
    def watching(self) -> Iterator[Penalty]:
        """Make the penalty in the forward of the model that runs inside; enter it after the gate's own hooks."""
        training = torch.is_grad_enabled()
        decoder = find_decoder(self.model)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._running or torch.is_grad_enabled() != training:
                return
            if self.kl is not None:
                raise RuntimeError(SECOND_FORWARD)
            caching = kwargs.get("use_cache")
            caching = getattr(decoder.config, "use_cache", False) if caching is None else caching
            if caching and self.batch.packed:
                raise ValueError(PACKED_WITH_CACHE)
            hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
            check_batch(self.batch, *hidden.shape[:2], virtual=learns_prompts(self.model))
            self._between.close()
            gated, self._gated = self._gated, None
            self._running = True
            try:
                with _autocast_without_cache(hidden.device.type):
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
        rows = self.batch.rows
        index = rows.flatten().nonzero().flatten()  # the one wait for the device; else prompts would cost a head too
        with torch.no_grad(), reference_mode(self.model, self.ref_model) as reference, without_noise(reference):
            wanted = _last_hidden(reference, self.batch)
            wanted = wanted.flatten(0, 1)[_in_whole(index, rows.shape, wanted)]
        here = _in_whole(index, rows.shape, hidden)
        own = hidden.detach().flatten(0, 1)[here]
        trained = [p for p in _head(self.model).parameters() if p.requires_grad]
        with without_noise(_head(self.model), _head(self.ref_model or self.model)):
            self.total, gradient, of_head = self._in_chunks(own, wanted, trained)
        total = self.total
        if hidden.requires_grad or (trained and torch.is_grad_enabled()):
            before, gate = gated or (hidden, hidden)
            if gate is not hidden:
                whole = torch.zeros_like(hidden).flatten(0, 1).index_copy_(0, here, gradient).view_as(hidden)
                (whole,) = torch.autograd.grad(hidden, gate, whole, retain_graph=True)
                positions = hidden.shape[:2].numel()  # of each of Gemma 3n's several streams
                streams = torch.arange(0, whole.shape[:-1].numel(), positions, device=here.device)
                here = (streams[:, None] + here).flatten()
                gradient = whole.flatten(0, -2)[here]
            total = _Attached.apply(total, before, here, gradient, of_head, *trained)
        count = rows.sum() if self.num_items is None else torch.as_tensor(self.num_items)
        self.kl = self.coef * total / count.to(total.device).clamp(min=1)

    def _in_chunks(
        self, own: torch.Tensor, wanted: torch.Tensor, trained: list[nn.Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The summed KL of hidden rows `(N, hidden)`, and its gradient at the policy's and at trained head weights."""
        dtype = accumulation_dtype(own)
        total = torch.zeros((), dtype=dtype, device=own.device)
        gradient = torch.empty_like(own)
        of_head = [torch.zeros_like(p, dtype=accumulation_dtype(p)) for p in trained]
        with_grad = torch.is_grad_enabled()
        size = min(_ROWS, max(1, _LOGITS // causal_lm(self.model).config.get_text_config().vocab_size))  # type: ignore[union-attr, operator]
        for start in range(0, own.shape[0], size):
            here = slice(start, start + size)
            chunk = own[here].requires_grad_(with_grad)
            logits = logits_of_hidden(self.model, chunk)
            with torch.no_grad():
                reference = self._reference_logits(wanted[here]).to(logits.device)
                _check_vocabulary(logits, reference)
                kl, error = _kl(logits.detach(), reference, dtype)
                total += kl.to(total.device)
            if with_grad:
                found = torch.autograd.grad(logits, [chunk, *trained], error.to(logits.dtype))
                gradient[here] = found[0]
                for whole, part in zip(of_head, found[1:], strict=True):
                    whole += part
        return total, gradient, [g.to(p.dtype) for g, p in zip(of_head, trained, strict=True)]

    def _reference_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        unlike = _adapted(_head(self.model)) or bool(start_of(self.model).tensors)  # a head that is trained itself
        if self.ref_model is not None or not unlike:
            return logits_of_hidden(self.ref_model or self.model, hidden)
        with reference_mode(self.model, None) as reference:
            return logits_of_hidden(reference, hidden)


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[operator]
    return head


def _adapted(head: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in head.modules())


def _autocast_without_cache(device: str) -> torch.autocast:
    """Autocast as it is, but casts made here, some without a graph, are not those that the model goes on with."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def _in_whole(index: torch.Tensor, shape: torch.Size, hidden: torch.Tensor) -> torch.Tensor:
    """Flat positions in a batch of `shape` -> in a hidden state that may have virtual tokens before the batch's own."""
    index, virtual = index.to(hidden.device), hidden.shape[1] - shape[1]
    return index + (index // shape[1] + 1) * virtual if virtual else index


def _last_hidden(model: nn.Module, batch: Batch) -> torch.Tensor:
    """`(B, T, hidden)`, with any virtual tokens before it."""
    decoder = find_decoder(model)
    device = causal_lm(model).get_input_embeddings().weight.device  # type: ignore[operator]
    inputs = {**batch.to(device).inputs, "use_cache": False, "return_dict": True}
    if not learns_prompts(model):
        return decoder(**inputs).last_hidden_state
    kept: list[torch.Tensor] = []
    with Changes() as changes:
        changes.hook(decoder, lambda module, args, output: kept.append(output.last_hidden_state))
        model(**inputs, logits_to_keep=1)
    return kept[0]


def _check_vocabulary(logits: torch.Tensor, reference: torch.Tensor) -> None:
    if logits.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"The reference predicts {reference.shape[-1]} tokens and the model {logits.shape[-1]}; a KL needs one "
            "vocabulary. Give a reference with the model's tokenizer, and its embeddings resized alike."
        )


def _kl(logits: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || policy) summed over rows, and its gradient at the policy's logits, both `(N, vocabulary)`."""
    logp, wanted = logits.log_softmax(-1, dtype), reference.log_softmax(-1, dtype)
    p = wanted.exp()
    # A token that the reference rules out (-inf) adds nothing.
    total = wanted.sub_(logp).mul_(p).masked_fill_(p == 0, 0).sum()
    return total, logp.exp_().sub_(p)
