"""Log-probabilities of a batch's labels, without whole logits where that saves memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..batches.batch import IGNORE, Batch
from ..models.structure import causal_lm, find_decoder, learns_prompts, refuse_encoder_decoder
from .head import arguments, chunk_of, head_of, is_plain, logits_of_hidden, may_be_plain


def token_logps(model: nn.Module, batch: Batch, *, fused: bool | None = None) -> torch.Tensor:
    """Log-probability of each label given what precedes it: -CE(logits[:, t - 1], labels[:, t]) at column t.

    Args:
        fused (`bool`, *optional*): use TRL's fused LM head, which never holds `(B, T, vocabulary)` logits. Where TRL
            has none: chunks of rows, whose logits are computed again in the backward. By default it is used where it
            saves memory: TRL's kernels are for accelerators, and compute in float32.

    Returns:
        `torch.Tensor`: `(B, T)` float32 (float64 for a float64 model), 0 where the label is -100 and in column 0.
    """
    refuse_encoder_decoder(model)
    if fused is None:
        fused = _fused_pays(model)
    if not fused:
        return _logps_at_columns(model, batch)
    with _fused_head(model):
        logps = model(**{**batch.inputs, "use_cache": False}, labels=batch.labels, fused_lm_head=True).log_probs
    return F.pad(logps, (1, 0))


def _logps_at_columns(model: nn.Module, batch: Batch) -> torch.Tensor:
    """With the head only at columns where some row has a label to predict: prompts and padding cost it nothing."""
    labels, following = batch.labels, _following(batch.labels)
    wanted = (following != IGNORE).any(0)
    # Finding columns waits for an accelerator, and virtual tokens would shift them.
    if wanted.device.type != "cpu" or learns_prompts(model) or "logits_to_keep" not in arguments(causal_lm(model)):
        logits = model(**{**batch.inputs, "use_cache": False}).logits
        return logps_of_logits(logits[:, -labels.shape[1] :], labels)  # virtual tokens stand before
    columns = wanted.nonzero().flatten()
    logits = model(**{**batch.inputs, "use_cache": False}, logits_to_keep=columns).logits
    logps = _scores(logits.flatten(0, 1), following[:, columns].flatten()).view(len(labels), -1)
    return logps.new_zeros(labels.shape).index_copy(1, columns + 1, logps)


def policy_logps(
    model: nn.Module, batch: Batch, *, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """What a loss is made of, of the model in training.

    Args:
        whole (`bool`): the model's outputs are wanted.

    Returns:
        `tuple`: log-probabilities of the labels `(B, T)`; of a mixture of experts that returns it, the loss that
        balances its router, with its coefficient, as the model's own loss has it; and the outputs, where they were
        wanted.
    """
    config = causal_lm(model).config.get_text_config()  # type: ignore[union-attr, operator]
    routed = batch.inputs.get("output_router_logits", getattr(config, "output_router_logits", False))
    if not (whole or routed):
        return token_logps(model, batch, fused=fused_pays(model, batch)), None, None
    outputs = model(**{**batch.inputs, "use_cache": False})
    logps = logps_of_logits(outputs.logits[:, -batch.shape[1] :], batch.labels)  # virtual tokens stand before
    balance = getattr(outputs, "aux_loss", None)
    balance = None if balance is None else config.router_aux_loss_coef * balance.to(logps.device)
    return logps, balance, outputs if whole else None


def fused_pays(model: nn.Module, batch: Batch) -> bool:
    """Whether TRL's fused head saves memory, and is right for this model: told by a forward of its own, once."""
    return _fused_pays(model) and is_plain(model, batch)


def _fused_pays(model: nn.Module) -> bool:
    """Not on a CPU, in float64, with virtual tokens, or where the head is adapted, quantised or does not make logits
    alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if learns_prompts(model) or not may_be_plain(model):
        return False
    head = head_of(model)
    weight: Any = head.weight
    plain = not isinstance(head, BaseTunerLayer) and weight.is_floating_point()
    return plain and weight.device.type != "cpu" and weight.dtype != torch.float64


def logps_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same from logits `(B, T, vocabulary)`. The labels are shifted, since shifting the logits would copy them."""
    following = _following(labels).to(logits.device)
    logps = _scores(logits.flatten(0, 1), following.flatten())
    return F.pad(logps.view(labels.shape)[:, :-1], (1, 0))


def logps_of_rows(model: nn.Module, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(N,)` of labels `(N,)` from rows `(N, hidden)` of the last hidden state, without grad and a
    chunk of rows at a time."""
    base = causal_lm(model)
    size = chunk_of(base)
    with torch.no_grad():
        found = [
            _scores(logits_of_hidden(base, some), wanted.to(some.device))
            for some, wanted in zip(rows.split(size), labels.split(size), strict=True)
        ]
    return torch.cat(found).to(rows.device)


def _following(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _scores(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(logits, following, ignore_index=IGNORE, reduction="none")


@dataclass
class _LogProbs(ModelOutput):
    log_probs: torch.Tensor | None = None


def chunked_logps(base: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `(B, T - 1)` of `labels[:, 1:]` from last hidden states, a chunk of rows at a time.

    Only rows before a label go through the head, as in TRL's; their number is waited for. Each chunk's logits are freed
    after its forward, and computed again for its backward.
    """
    device = head_of(base).weight.device
    hidden, following = hidden[:, :-1].to(device), labels[:, 1:].to(device)  # type: ignore[arg-type]
    counts, size = following != IGNORE, chunk_of(base)

    def score(rows: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        return _scores(logits_of_hidden(base, rows), following)

    found = [
        checkpoint(score, rows, wanted, use_reentrant=False, preserve_rng_state=False)
        for rows, wanted in zip(hidden[counts].split(size), following[counts].split(size), strict=True)
    ]
    logps = torch.cat(found)
    return logps.new_zeros(counts.shape).masked_scatter(counts, logps)  # with a graph, even where nothing counts


@functools.cache
def _trls_head() -> Callable[[nn.Module], None] | None:
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    return add_fused_lm_head


def _add_chunked_head(base: nn.Module) -> None:
    """Set `forward` on the instance, as TRL's `add_fused_lm_head` does, to one that uses `chunked_logps`."""

    def forward(*args: Any, labels: torch.Tensor, fused_lm_head: bool, **kwargs: Any) -> _LogProbs:
        hidden = find_decoder(base)(*args, **kwargs).last_hidden_state
        return _LogProbs(chunked_logps(base, hidden, labels))

    base.forward = forward


@contextlib.contextmanager
def _fused_head(model: nn.Module) -> Iterator[None]:
    """Let the model return log-probabilities instead of logits, for one forward."""
    base = causal_lm(model)
    before = base.__dict__.get("forward")
    try:
        (_trls_head() or _add_chunked_head)(base)
        yield
    finally:
        if before is None:
            base.__dict__.pop("forward", None)
        else:
            base.__dict__["forward"] = before
