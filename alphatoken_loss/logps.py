"""Log-probabilities of a batch's labels, without whole logits where that saves memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .batches import IGNORE, Batch
from .blocks import causal_lm, learns_prompts


def token_logps(
    model: nn.Module, batch: Batch, labels: torch.Tensor | None = None, *, fused: bool | None = None
) -> torch.Tensor:
    """Log-probability of each label given what precedes it: -CE(logits[:, t - 1], labels[:, t]) at column t.

    Args:
        labels (`torch.Tensor`, *optional*): `(B, T)`, by default the batch's.
        fused (`bool`, *optional*): use TRL's fused LM head, which never holds `(B, T, vocabulary)` logits. By default
            where it saves memory: its kernels are for accelerators, and compute in float32.

    Returns:
        `torch.Tensor`: `(B, T)` float32 (float64 for a float64 model), 0 where the label is -100 and in column 0.
    """
    labels = batch.labels if labels is None else labels
    if fused is None:
        fused = _fused_pays(model)
    if not fused:
        return _logps_at_columns(model, batch, labels)
    with _fused_head(model):
        logps = model(**{**batch.inputs, "use_cache": False}, labels=labels, fused_lm_head=True).log_probs
    return F.pad(logps, (1, 0))


def _logps_at_columns(model: nn.Module, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    """With the head only at columns where some row has a label to predict: prompts and padding cost it nothing."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    wanted = (following != IGNORE).any(0)
    # Finding columns waits for an accelerator, and virtual tokens would shift them.
    if wanted.device.type != "cpu" or learns_prompts(model) or "logits_to_keep" not in _arguments(causal_lm(model)):
        logits = model(**{**batch.inputs, "use_cache": False}).logits
        return logps_of_logits(logits[:, -labels.shape[1] :], labels)  # virtual tokens stand before
    columns = wanted.nonzero().flatten()
    logits = model(**{**batch.inputs, "use_cache": False}, logits_to_keep=columns).logits
    logps = _logps_of_following(logits, following[:, columns])
    found = logps.new_zeros(labels.shape)
    return found.index_copy(1, columns + 1, logps)


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _fused_pays(model: nn.Module) -> bool:
    """Not on a CPU, in float64, with virtual tokens, or where the head is more than the matrix the fused one reads."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if learns_prompts(model):
        return False

    head = causal_lm(model).get_output_embeddings()  # type: ignore[operator]
    weight = head.weight
    plain = not isinstance(head, BaseTunerLayer) and weight.is_floating_point()
    return plain and weight.device.type != "cpu" and weight.dtype != torch.float64


def logps_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same from logits `(B, T, vocabulary)`; labels are shifted rather than logits, which would be copied."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return F.pad(_logps_of_following(logits, following)[:, :-1], (1, 0))


def _logps_of_following(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten(0, 1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    logps = -F.cross_entropy(flat, following.to(flat.device).flatten(), ignore_index=IGNORE, reduction="none")
    return logps.view(following.shape)


@contextlib.contextmanager
def _fused_head(model: nn.Module) -> Iterator[None]:
    """TRL's fused LM head for the time of one forward: `add_fused_lm_head` sets `forward` on the instance."""
    from trl.trainer.utils import add_fused_lm_head

    base = causal_lm(model)
    before = base.__dict__.get("forward")
    try:
        add_fused_lm_head(base)
        yield
    finally:
        if before is None:
            base.__dict__.pop("forward", None)
        else:
            base.__dict__["forward"] = before
