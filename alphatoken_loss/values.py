"""The values of a batch's tokens, as they are reported."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenValues:
    """Values of the response tokens of a batch (arXiv 2606.01635, Eq. 12).

    Each field is `(B, T)` in float32 (float64 for a float64 model), aligned with the batch's labels: entry [b, t]
    belongs to the token labels[b, t], and is 0 where the label is -100 and in column 0. Higher is better: a positive
    value means that a gradient step on this token alone lowers the validation loss (target terms) or the
    Fisher-weighted drift from the reference (drift terms), to first order and up to the step's size.

    Attributes:
        total: adaptation + stability_weight * stability. From the path estimator: how much lower the token's loss is at
            the end of the path, in nats (for a rejected answer, the negative).
        adaptation: the target terms. `None` from the difference and exact estimators where only the total was asked
            for, as in a training step; `None` from the path estimator.
        stability: the drift terms, without stability_weight; `None` likewise.
        direct_target, causal_target, direct_drift, causal_drift: the four terms of Eqs. 8 to 11, from the ghost
            estimator alone; `None` from the others.
        grad_norm: the ghost norm, the length of the position's own gradient over the scored adapters; `None` where it
            was not asked for, and from the other estimators.
    """

    total: torch.Tensor
    adaptation: torch.Tensor | None = None
    stability: torch.Tensor | None = None
    direct_target: torch.Tensor | None = None
    causal_target: torch.Tensor | None = None
    direct_drift: torch.Tensor | None = None
    causal_drift: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None
