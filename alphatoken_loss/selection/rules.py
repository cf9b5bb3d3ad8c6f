"""Other ways to choose the tokens to train on, in the form that this library's losses, gate and trainers take.

They are here to compare with: at random, by excess loss, and by the log-ratio of policy and reference. Thresholds and
alignment are those of `alphatoken_weights`, so at equal `rho` each keeps the same share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..losses.logps import token_logps
from ..models.modes import without_noise
from ..models.reference import reference_mode
from .thresholds import keep_mask

SELECTIONS = ("alphatoken", "random", "excess_loss", "log_ratio")


def check_selection(name: str) -> None:
    """Raise ValueError for a selection that does not exist."""
    if name not in SELECTIONS:
        raise ValueError(f"selection is {name!r}; it must be one of {', '.join(map(repr, SELECTIONS))}.")


def random_weights(
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: str = "batch",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Keep a random share of the response tokens, each as likely as any other.

    Args:
        batch (`Mapping`): an SFT batch or preference pairs, in any form `alphatoken_weights` takes.
        rho (`float`): share to keep, in (0, 1].
        threshold_scope (`str`): `"batch"`, that share of the micro-batch (of each branch, for pairs), or `"sequence"`,
            of each sequence.
        generator (`torch.Generator`, *optional*): draws one number per entry of the labels, on its own device. By
            default torch's global one for the CPU.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels; chosen
        rows first for pairs.

    Raises:
        ValueError: the batch or an option does not fit.
    """
    read = read_batch(batch)
    device = torch.device("cpu") if generator is None else generator.device
    values = torch.rand(read.shape, generator=generator, device=device, dtype=torch.float64)
    return _select(values.to(read.labels.device), read, rho, threshold_scope)


def excess_loss_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: str = "batch",
) -> torch.Tensor:
    """Keep the tokens of the largest excess loss, l_t(model) - l_t(reference) with l_t = -log p(y_t | y_<t).

    This is the selective language modeling of RHO-1 (arXiv 2404.07965): `model` is the model in training and
    `ref_model` one that was trained on clean data, and what is kept is what the first has still to learn and the second
    has learned. Token Cleaning (arXiv 2502.01968) ranks by the same difference with its base model as `model` and its
    tuned reference as `ref_model`; it takes one threshold over the whole data set, where this takes one per batch or
    sequence.

    Args:
        model (`nn.Module`): causal LM.
        ref_model (`nn.Module` or `None`): the reference. `None`: the same network with its adapter "ref" on (load the
            adapter that was tuned on clean data under this name); without one the adapters are switched off, and then
            the kept tokens are those that tuning has made worse, which is neither paper's rule.
        batch (`Mapping`): an SFT batch or preference pairs; of pairs, either branch is ranked by this same difference.
        rho (`float`): share to keep, in (0, 1].
        threshold_scope (`str`): `"batch"` or `"sequence"`, see `random_weights`.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels. Ties with
        the threshold are kept, so where model and reference agree on everything, so is everything.

    Raises:
        ValueError: the batch or an option does not fit, or there is no reference.
    """
    read = read_batch(batch)
    return _select(-_log_ratio(model, ref_model, read, rho), read, rho, threshold_scope)


def log_ratio_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: str = "batch",
) -> torch.Tensor:
    """Keep the tokens of preference pairs by r_t = log pi(y_t | y_<t) - log pi_ref(y_t | y_<t), the implicit reward.

    Of chosen answers the tokens of the highest r_t, of rejected answers those of the lowest, each branch with a
    threshold of its own: the tokens on which the two models tell better from worse. SePO (arXiv 2408.13518) picks
    tokens so, with a DPO-tuned oracle as `model`. With an adapter that has not been trained every r_t is 0, and every
    token is kept.

    Args:
        model (`nn.Module`): pi, the policy.
        ref_model (`nn.Module` or `None`): pi_ref; `None` for the same network with adapters off, or with its adapter
            "ref". It is run in any case: sums that the batch brings say nothing of single tokens.
        batch (`Mapping`): preference pairs, stacked (chosen first) or with separate `chosen_*` / `rejected_*` keys.
        rho (`float`): share to keep, in (0, 1].
        threshold_scope (`str`): `"batch"` or `"sequence"`, see `random_weights`.

    Returns:
        `torch.Tensor`: `(2P, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels, chosen
        first.

    Raises:
        ValueError: the batch holds no pairs, an option does not fit, or there is no reference.
    """
    read = read_batch(batch, pairs=True)
    ratio = _log_ratio(model, ref_model, read, rho)
    chosen, rejected = ratio.chunk(2)
    return _select(torch.cat([chosen, -rejected]), read, rho, threshold_scope)


def _log_ratio(model: nn.Module, ref_model: nn.Module | None, batch: Batch, rho: float) -> torch.Tensor:
    """`(B, T)` log p(model) - log p(reference) at the labels, without dropout; zeros where nothing depends on it."""
    if rho >= 1.0 or not bool(batch.rows.any()):
        return torch.zeros(batch.shape, device=batch.labels.device)
    with torch.no_grad():
        with without_noise(model):
            logps = token_logps(model, batch)
        with reference_mode(model, ref_model) as reference, without_noise(reference):
            return logps - token_logps(reference, batch).to(logps)


def _select(values: torch.Tensor, batch: Batch, rho: float, scope: str) -> torch.Tensor:
    AlphaTokenConfig(rho=rho, threshold_scope=scope)  # type: ignore[arg-type]  # its checks of both
    groups = batch.groups(scope).roll(1, 1)  # no row stands in the last column
    return keep_mask(values.to(batch.labels.device), groups, rho=rho).float()
