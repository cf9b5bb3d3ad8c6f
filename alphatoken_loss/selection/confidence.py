"""Weights by what the model itself predicts, from the forward that trains: no validation data, no reference.

Each rule exists twice: as a function of a model and a batch, which runs a forward of its own, and as a selection, which
uses the training forward. No gradient goes through the weights, as in the papers. In the gate the sum of the weighted
losses is divided by what the loss divides by (all response tokens), as there; `sft_loss` divides by the sum of weights
unless `num_items_in_batch` is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..checks import check_int, is_number
from ..config import AlphaTokenConfig
from ..losses.forward import Forward, forward_of
from .base import Selection
from .thresholds import keep_share


def eaft_weights(
    model: nn.Module, batch: Mapping[str, Any] | Batch, *, top_k: int = 20, alpha: float = 1.0
) -> torch.Tensor:
    """Weigh each token by how unsure the model is of it: w_t = (H_t / ln K)^alpha.

    H_t is the entropy over the K likeliest tokens at t, with their probabilities scaled to a sum of 1. This is
    entropy-adaptive fine-tuning (arXiv 2601.02151), there with K = 20 and alpha = 1. Where the model is sure of a
    prediction and wrong, the weight is small, and so is the step.

    Args:
        model (`nn.Module`): causal LM.
        batch (`Mapping`): an SFT batch or preference pairs, in any form `alphatoken_weights` takes.
        top_k (`int`): K, at least 2.
        alpha (`float`): exponent, above 0.

    Returns:
        `torch.Tensor`: `(B, T)` float32 in [0, 1], 0 where there is no label; chosen rows first for pairs.

    Raises:
        ValueError: the batch or an option does not fit.
    """
    return _weights(Eaft(AlphaTokenConfig(), top_k, alpha), model, batch)


def dft_weights(model: nn.Module, batch: Mapping[str, Any] | Batch) -> torch.Tensor:
    """Weigh each token by its own probability: w_t = p(y_t | y_<t).

    Dynamic fine-tuning (arXiv 2508.05629), the `loss_type="dft"` of TRL's SFTTrainer: the same gradient, while the
    loss that is reported stays that of SFT.

    Args:
        model (`nn.Module`): causal LM.
        batch (`Mapping`): an SFT batch or preference pairs, in any form `alphatoken_weights` takes.

    Returns:
        `torch.Tensor`: `(B, T)` float32 in [0, 1], 0 where there is no label; chosen rows first for pairs.
    """
    return _weights(Dft(AlphaTokenConfig()), model, batch)


def low_loss_weights(
    model: nn.Module,
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: Literal["batch", "sequence"] = "batch",
) -> torch.Tensor:
    """Keep the share of tokens with the lowest loss, l_t = -log p(y_t | y_<t): what the model nearly knows.

    Args:
        model (`nn.Module`): causal LM.
        batch (`Mapping`): an SFT batch or preference pairs, in any form `alphatoken_weights` takes.
        rho (`float`): share to keep, in (0, 1].
        threshold_scope (`str`): `"batch"` or `"sequence"`, see `random_weights`.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere; chosen rows first for pairs.
    """
    return _weights(LowLoss(AlphaTokenConfig(rho=rho, threshold_scope=threshold_scope)), model, batch)


def high_loss_weights(
    model: nn.Module,
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: Literal["batch", "sequence"] = "batch",
) -> torch.Tensor:
    """Keep the share of tokens with the highest loss: what the model knows least. See `low_loss_weights`."""
    return _weights(HighLoss(AlphaTokenConfig(rho=rho, threshold_scope=threshold_scope)), model, batch)


def _weights(selection: Selection, model: nn.Module, batch: Mapping[str, Any] | Batch) -> torch.Tensor:
    read = read_batch(batch)
    if not bool(read.rows.any()):
        return torch.zeros(read.shape, device=read.labels.device)
    with torch.no_grad():
        return selection.after(forward_of(model, read)).to(read.labels.device, torch.float32)


@dataclass
class Eaft(Selection):
    """See `eaft_weights`."""

    top_k: int = 20
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k, least=2, hint="It is 20 in the paper.")
        if not is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}; it must be a finite number above 0 (1 in the paper).")

    def after(self, forward: Forward) -> torch.Tensor:
        share = forward.top_entropies(self.top_k) / math.log(self.top_k)
        return share.clamp(min=0) ** self.alpha


@dataclass
class Dft(Selection):
    """See `dft_weights`."""

    def after(self, forward: Forward) -> torch.Tensor:
        batch = forward.batch
        return forward.logps.exp().to(batch.labels.device).masked_fill(~batch.at_labels(batch.rows), 0)


@dataclass
class LowLoss(Selection):
    """See `low_loss_weights`."""

    def after(self, forward: Forward) -> torch.Tensor:
        return keep_share(forward.logps, forward.batch, self.config.rho, self.config.threshold_scope)


@dataclass
class HighLoss(Selection):
    """See `high_loss_weights`."""

    def after(self, forward: Forward) -> torch.Tensor:
        return keep_share(-forward.logps, forward.batch, self.config.rho, self.config.threshold_scope)
