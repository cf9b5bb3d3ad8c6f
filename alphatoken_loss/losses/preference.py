"""Preference losses on sequence log-probabilities, as TRL's DPOTrainer defines them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batches.batch import Batch
from ..checks import is_number
from ..models.modes import without_noise
from ..models.reference import reference_mode, refuse_itself
from .logps import fused_pays, token_logps


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of answers, `(P,)` each, and the numbers of their tokens."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        return self.rejected - self.ref_rejected

    @property
    def delta(self) -> torch.Tensor:
        return self.chosen_ratio - self.rejected_ratio


def _ipo(pairs: Pairs, beta: float, _: float) -> torch.Tensor:
    # arXiv 2310.12036, Eq. 17, with log-ratios averaged per token as TRL does.
    delta = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (delta - 1 / (2 * beta)) ** 2


def _robust(pairs: Pairs, beta: float, smoothing: float) -> torch.Tensor:
    # arXiv 2403.00409: smoothing is the rate at which labels are flipped.
    kept, flipped = F.logsigmoid(beta * pairs.delta), F.logsigmoid(-beta * pairs.delta)
    return (-(1 - smoothing) * kept + smoothing * flipped) / (1 - 2 * smoothing)


def _exo_pair(pairs: Pairs, beta: float, smoothing: float) -> torch.Tensor:
    # arXiv 2402.00856, Eq. 16: KL(policy || smoothed preference) over the two answers.
    score = beta * pairs.delta
    kept, flipped = F.logsigmoid(score) - math.log1p(-smoothing), F.logsigmoid(-score) - math.log(smoothing)
    return score.sigmoid() * kept + (-score).sigmoid() * flipped


LOSSES: dict[str, Callable[[Pairs, float, float], torch.Tensor]] = {
    "sigmoid": lambda pairs, beta, _: -F.logsigmoid(beta * pairs.delta),
    "hinge": lambda pairs, beta, _: torch.relu(1 - beta * pairs.delta),
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "apo_zero": lambda pairs, beta, _: (
        1 - (beta * pairs.chosen_ratio).sigmoid() + (beta * pairs.rejected_ratio).sigmoid()
    ),
    "apo_down": lambda pairs, beta, _: (beta * pairs.chosen_ratio).sigmoid() + 1 - (beta * pairs.delta).sigmoid(),
}


def check_loss(loss_type: str, beta: float, smoothing: float) -> None:
    """Raise ValueError for a loss or an option that is not known."""
    if not isinstance(loss_type, str) or loss_type not in LOSSES:
        raise ValueError(
            f"loss_type is {loss_type!r}; dpo_loss knows {', '.join(LOSSES)}. For another loss, run your own inside "
            "`with alphatoken(batch):`."
        )
    for name, value in (("beta", beta), ("label_smoothing", 0 if smoothing is False else smoothing)):
        if not _is_scalar(value):
            raise ValueError(f"{name} is {value!r}; it must be a number.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta!r}; it must be positive and finite.")
    if smoothing and loss_type not in ("robust", "exo_pair"):
        raise ValueError(
            f'label_smoothing is {smoothing!r}, which the loss "{loss_type}" has none of. Use "robust" or "exo_pair", '
            "or label_smoothing=0."
        )
    allowed = 0 < smoothing < 0.5 if loss_type == "exo_pair" else 0 <= smoothing < 0.5
    if not allowed:
        least = "in (0, 0.5) for exo_pair" if loss_type == "exo_pair" else "in [0, 0.5)"
        raise ValueError(f"label_smoothing is {smoothing!r}; it must be {least}.")


def _is_scalar(value: Any) -> bool:
    return is_number(value) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def reference_logps(model: nn.Module, ref_model: nn.Module | None, batch: Batch) -> torch.Tensor:
    """`(2P,)` log-probabilities of the answers under the reference: those in the batch, or from a forward."""
    if batch.ref_logps is not None:
        return torch.cat(batch.ref_logps)
    if ref_model is not None:
        refuse_itself(model, ref_model)
    with torch.no_grad(), reference_mode(model, ref_model) as reference, without_noise(reference):
        return token_logps(reference, batch, fused=fused_pays(reference, batch)).sum(1)


def with_reference(model: nn.Module, ref_model: nn.Module | None, batch: Batch) -> Batch:
    """The same batch; pairs have the log-probabilities of their answers under the reference."""
    if not batch.pairs:
        return batch
    chosen, rejected = reference_logps(model, ref_model, batch).chunk(2)
    return replace(batch, ref_logps=(chosen, rejected))


def pair_logps(batch: Batch, logps: torch.Tensor) -> Pairs:
    """From `(2P, T)` token log-probabilities of a batch `with_reference`, chosen first."""
    assert batch.ref_logps is not None
    chosen, rejected = logps.sum(1).chunk(2)
    ref_chosen, ref_rejected = (of_reference.to(chosen) for of_reference in batch.ref_logps)
    # Counted as TRL does: all labels, also one in column 0, which no position predicts.
    tokens = (batch.labels != -100).sum(1).clamp(min=1)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *tokens.chunk(2))
