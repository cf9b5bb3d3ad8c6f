"""Ways to train that the library does not have: weights from the forward's own logits, and losses of pairs.

A rule takes `(B, T, V)` logits and `(B, T)` log-probabilities, both at the labels (column t predicts the label at t)
and without grad, and returns `(B, T)` weights. The loss is sum_t w_t l_t over the number N of response tokens, as the
papers have it: a small weight is a small gradient, not one made up for by the others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .rows import Batch

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def at_labels(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, T, V)` logits and `(B, T)` log-probabilities in float32 at the labels; column 0, which nothing predicts, and
    labels of -100 have log-probability 0."""
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False).logits
    logits = F.pad(logits[:, :-1].float(), (0, 0, 1, 0))
    counted = F.pad(labels[:, 1:] != -100, (1, 0))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none").view(labels.shape)
    return logits, -losses * counted


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of the prediction, in nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def eaft(logits: torch.Tensor, logps: torch.Tensor, top: int = 20) -> torch.Tensor:
    """Entropy-adaptive fine-tuning (arXiv 2601.02151): the entropy of the `top` most likely tokens, renormalised, over
    its greatest value log(top)."""
    top = min(top, logits.shape[-1])
    return entropy(logits.topk(top, -1).values) / math.log(top)


def dft(logits: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): the label's own probability."""
    return logps.exp()


def stm(logps: torch.Tensor, threshold: float = 2.5) -> torch.Tensor:
    """Selective token masking (arXiv 2501.14315): `(B, T)` 1 where the base's perplexity of the label, 1 / p, is at
    most the threshold, else 0."""
    return (-logps).exp().le(threshold).float()


RULES: dict[str, Rule] = {"eaft": eaft, "dft": dft}


def self_weighted_loss(model: Any, batch: Batch, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, weighted by a rule of this same forward, and the weights."""
    logits, logps = at_labels(model, batch)
    counted = F.pad(batch["labels"][:, 1:] != -100, (1, 0))
    weights = rule(logits.detach(), logps.detach()) * counted
    return -(weights * logps).sum() / counted.sum().clamp(min=1), weights


@contextlib.contextmanager
def base_of(model: Any) -> Iterator[Any]:
    """The model without its adapters."""
    with torch.no_grad(), model.disable_adapter():
        yield model


def answer_logps(model: Any, batch: Batch) -> torch.Tensor:
    """`(2P,)` log-probabilities of whole answers in float32, chosen first."""
    return at_labels(model, {**batch, "labels": answers_of(batch)})[1].sum(1)


def answers_of(batch: Batch) -> torch.Tensor:
    """`(2P, T)` labels of a batch of pairs."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def pair_loss(
    model: Any, batch: Batch, *, beta: float, smoothing: float = 0.0, likelihood: float = 0.0
) -> torch.Tensor:
    """DPO with smoothed labels (Mitchell's conservative DPO) and with the likelihood of chosen answers besides
    (arXiv 2404.19733): the mean over pairs of

        -(1 - smoothing) log sigmoid(s) - smoothing log sigmoid(-s) + likelihood * mean_t l_t(chosen)

    where s = beta * (log-ratio of chosen - log-ratio of rejected). The batch brings `ref_chosen_logps` and
    `ref_rejected_logps`.
    """
    logps = answer_logps(model, batch)
    chosen, rejected = logps.chunk(2)
    s = beta * ((chosen - batch["ref_chosen_logps"]) - (rejected - batch["ref_rejected_logps"]))
    loss = -(1 - smoothing) * F.logsigmoid(s) - smoothing * F.logsigmoid(-s)
    tokens = batch["completion_mask"][: len(chosen), 1:].sum(1).clamp(min=1)
    return (loss - likelihood * chosen / tokens).mean()
