"""Compare two models at the same positions: log-probabilities of the labels, and a KL.

All logits of a batch never exist together. They are made from the two last hidden states, for some rows at a time, and
the KL's gradient at these logits is taken back to the policy's hidden state at once. So what is kept is one row of the
hidden state's size for each position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.modes import autocast_without_cache, without_noise
from ..models.tensors import accumulation_dtype
from .head import chunk_of, head_of, logits_of_hidden

ROWS = 256  # that are compared at a time, at most: several tensors of their logits' size exist then
KL_OVER = ("vocabulary", "without_label")


@dataclass
class Compared:
    """What two models predict at `N` rows.

    Attributes:
        index (`torch.Tensor`): `(N,)`, the rows' flat positions in the batch.
        logps, wanted_logps (`torch.Tensor`): `(N,)`, log-probabilities of the labels under the policy and the other.
        kl (`torch.Tensor`): `(N,)`, KL(other || policy) in nats.
        gradient (`torch.Tensor` or `None`): `(N, hidden)`, of each row's KL at the policy's hidden state.
        of_head (`list`): gradients of the summed KL at trained parameters of the policy's head.
    """

    index: torch.Tensor
    logps: torch.Tensor
    wanted_logps: torch.Tensor
    kl: torch.Tensor
    gradient: torch.Tensor | None
    of_head: list[torch.Tensor]


def compare(
    model: nn.Module,
    hidden: torch.Tensor,
    wanted: torch.Tensor,
    index: torch.Tensor,
    labels: torch.Tensor,
    *,
    over: str = "vocabulary",
    reference_logits: Callable[[torch.Tensor], torch.Tensor] | None = None,
    trained: Sequence[nn.Parameter] = (),
) -> Compared:
    """Compare a policy with another model, row by row.

    Args:
        model (`nn.Module`): the policy.
        hidden, wanted (`torch.Tensor`): `(N, hidden)` rows of the last hidden states of the policy and the other,
            detached.
        index (`torch.Tensor`): `(N,)`, where the rows are in the batch.
        labels (`torch.Tensor`): `(N,)`, what the rows predict.
        over (`str`): take the KL over the whole `"vocabulary"`; or `"without_label"`: leave the label out of both
            distributions, and scale the rest to a sum of 1 (arXiv 2605.29498).
        reference_logits (`Callable`, *optional*): the head of the other model, by default the policy's.
        trained (`Sequence`): trained parameters of the policy's head; the KL has a gradient there too.
    """
    reference_logits = reference_logits or (lambda rows: logits_of_hidden(model, rows))
    dtype = accumulation_dtype(hidden)
    with_grad = torch.is_grad_enabled()
    found: list[list[torch.Tensor]] = [[], [], []]
    gradient = torch.empty_like(hidden) if with_grad else None
    of_head = [torch.zeros_like(p, dtype=accumulation_dtype(p)) for p in trained]
    size = min(ROWS, chunk_of(model))
    with without_noise(head_of(model)), autocast_without_cache(hidden.device.type):
        for start in range(0, hidden.shape[0], size):
            here = slice(start, start + size)
            chunk = hidden[here].requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                logits = logits_of_hidden(model, chunk)
            with torch.no_grad():
                reference = reference_logits(wanted[here]).to(logits.device)
                _check_vocabulary(logits, reference)
                *figures, error = _compare(logits.detach(), reference, labels[here].to(logits.device), over, dtype)
            for figure, part in zip(found, figures, strict=True):
                figure.append(part)
            if gradient is not None:
                at_rows, *at_head = torch.autograd.grad(logits, [chunk, *trained], error.to(logits.dtype))
                gradient[here] = at_rows
                for whole, part in zip(of_head, at_head, strict=True):
                    whole += part
    nothing = torch.zeros(0, dtype=dtype, device=hidden.device)
    logps, wanted_logps, kl = (torch.cat(parts).to(hidden.device) if parts else nothing for parts in found)
    of_head = [g.to(p.dtype) for g, p in zip(of_head, trained, strict=True)]
    return Compared(index, logps, wanted_logps, kl, gradient, of_head)


def in_whole(index: torch.Tensor, length: int, hidden: torch.Tensor) -> torch.Tensor:
    """Flat positions in a batch of `length` -> those in its hidden state, which may begin with virtual tokens."""
    index, virtual = index.to(hidden.device), hidden.shape[1] - length
    return index + (index // length + 1) * virtual if virtual else index


def rows_at(hidden: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
    """`(N, hidden)`, the rows of a hidden state at flat positions in a batch of `length`."""
    return hidden.flatten(0, 1)[in_whole(index, length, hidden)]


def _check_vocabulary(logits: torch.Tensor, reference: torch.Tensor) -> None:
    if logits.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"The reference predicts {reference.shape[-1]} tokens and the model {logits.shape[-1]}; a KL needs one "
            "vocabulary. Give a reference with the model's tokenizer, and its embeddings resized alike."
        )


def _compare(
    logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor, over: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row: log-probabilities of the label, KL(reference || policy), and its gradient at the policy's logits."""
    at = labels[:, None]
    logp, wanted = logits.log_softmax(-1, dtype), reference.log_softmax(-1, dtype)
    own, other = logp.gather(1, at)[:, 0], wanted.gather(1, at)[:, 0]
    if over == "without_label":
        logp, wanted = (rows.scatter_(1, at, -torch.inf).log_softmax(-1) for rows in (logp, wanted))
    p = wanted.exp()
    # A token of probability 0 under the reference (-inf) adds nothing.
    kl = wanted.sub_(logp).mul_(p).masked_fill_(p == 0, 0).sum(-1)
    return own, other, kl, logp.exp_().sub_(p)
