"""Weights that are known before a batch's forward: random ones, or by a reference model. They are here for comparison.

Thresholds and alignment are those of `alphatoken_weights`: with the same `rho`, the same share is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..checks import is_number
from ..config import AlphaTokenConfig
from ..losses.forward import Forward
from ..losses.logps import token_logps
from ..models.modes import without_noise
from ..models.reference import reference_mode
from .base import Selection
from .thresholds import keep_share


def random_weights(
    batch: Mapping[str, Any] | Batch,
    *,
    rho: float = 0.5,
    threshold_scope: Literal["batch", "sequence"] = "batch",
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
    threshold_scope: Literal["batch", "sequence"] = "batch",
) -> torch.Tensor:
    """Keep the tokens with the largest excess loss, l_t(model) - l_t(reference), l_t = -log p(y_t | y_<t).

    This is the selective language modeling of RHO-1 (arXiv 2404.07965): `model` is in training, and `ref_model` was
    trained on clean data. What the second has learned and the first has not yet is kept. Token Cleaning
    (arXiv 2502.01968) ranks by the same difference, with its base model as `model` and its tuned reference as
    `ref_model`. It has one threshold for a whole data set; here each batch or sequence has its own.

    Args:
        model (`nn.Module`): causal LM.
        ref_model (`nn.Module` or `None`): the reference. `None`: the same network with its adapter "ref" on (load the
            adapter that was tuned on clean data under this name). Without one, adapters are switched off; then those
            tokens are kept that tuning has made worse, which is neither paper's rule.
        batch (`Mapping`): an SFT batch or preference pairs; both branches of pairs are ranked by the same difference.
        rho (`float`): share to keep, in (0, 1].
        threshold_scope (`str`): `"batch"` or `"sequence"`, see `random_weights`.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels. Ties with
        the threshold are kept: if model and reference agree everywhere, all tokens are kept.

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
    threshold_scope: Literal["batch", "sequence"] = "batch",
) -> torch.Tensor:
    """Keep the tokens of preference pairs by r_t = log pi(y_t | y_<t) - log pi_ref(y_t | y_<t), the implicit reward.

    In chosen answers the tokens with the highest r_t are kept, in rejected answers those with the lowest; each branch
    has a threshold of its own. SePO (arXiv 2408.13518) chooses tokens so, with a DPO-tuned oracle as `model`. With an
    adapter that has not been trained every r_t is 0, and every token is kept.

    Args:
        model (`nn.Module`): pi, the policy.
        ref_model (`nn.Module` or `None`): pi_ref; `None` for the same network with adapters off, or with its adapter
            "ref". It always runs: sums in the batch do not tell single tokens apart.
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


def stm_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    perplexity: float = 2.5,
) -> torch.Tensor:
    """Drop the tokens that the model found unlikely before it was tuned: keep where exp(l_t(reference)) <= perplexity.

    Selective token masking (arXiv 2501.14315), whose threshold is `2.5`, a probability of `0.4`. There the perplexity
    of a token, 1 / p(y_t | y_<t), is that of the model that tuning starts from.

    Args:
        model (`nn.Module`): causal LM.
        ref_model (`nn.Module` or `None`): the model that tuning starts from; `None` for `model` with adapters off, or
            with its adapter "ref". For the perplexity of the model as it is now, pass the model itself.
        batch (`Mapping`): an SFT batch or preference pairs, in any form `alphatoken_weights` takes.
        perplexity (`float`): the largest perplexity that is kept, at least 1.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels; chosen
        rows first for pairs. No share is fixed: if all tokens are unlikely, none is kept.

    Raises:
        ValueError: the batch or an option does not fit, or there is no reference.
    """
    _check_perplexity(perplexity)
    read = read_batch(batch)
    if not bool(read.rows.any()):
        return torch.zeros(read.shape, device=read.labels.device)
    with torch.no_grad(), reference_mode(model, ref_model) as reference, without_noise(reference):
        return _likely(token_logps(reference, read), read, perplexity)


def _likely(logps: torch.Tensor, batch: Batch, perplexity: float) -> torch.Tensor:
    response = batch.at_labels(batch.rows)
    return (response & (logps.to(response.device) >= -math.log(perplexity))).float()


def _check_perplexity(perplexity: float) -> None:
    if not is_number(perplexity) or not 1 <= perplexity < math.inf:
        raise ValueError(
            f"perplexity is {perplexity!r}; it is the largest perplexity of a token that is kept and must be a finite "
            "number of at least 1 (2.5 in the paper)."
        )


def _log_ratio(model: nn.Module, ref_model: nn.Module | None, batch: Batch, rho: float) -> torch.Tensor:
    """`(B, T)` log p(model) - log p(reference) at the labels, without dropout; zeros if nothing depends on them."""
    if rho >= 1.0 or not bool(batch.rows.any()):
        return torch.zeros(batch.shape, device=batch.labels.device)
    with torch.no_grad():
        with without_noise(model):
            logps = token_logps(model, batch)
        with reference_mode(model, ref_model) as reference, without_noise(reference):
            return logps - token_logps(reference, batch).to(logps)


def _select(values: torch.Tensor, batch: Batch, rho: float, scope: Literal["batch", "sequence"]) -> torch.Tensor:
    AlphaTokenConfig(rho=rho, threshold_scope=scope)  # its checks of both
    return keep_share(values, batch, rho, scope)


@dataclass
class Random(Selection):
    """See `random_weights`."""

    def before(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return random_weights(batch, **self._share(), generator=generator)


@dataclass
class ExcessLoss(Selection):
    """See `excess_loss_weights`."""

    @property
    def reference(self) -> bool:
        return True

    def before(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None) -> torch.Tensor:
        return excess_loss_weights(model, ref_model, batch, **self._share())


@dataclass
class LogRatio(Selection):
    """See `log_ratio_weights`."""

    pairs: ClassVar[bool] = True

    @property
    def reference(self) -> bool:
        return True

    def before(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None) -> torch.Tensor:
        return log_ratio_weights(model, ref_model, batch, **self._share())


@dataclass
class Stm(Selection):
    """See `stm_weights`.

    Args:
        perplexity (`float`): the largest perplexity that is kept.
        of (`str`): the perplexity under the `"reference"`, as in the paper, which runs a forward; or under the
            `"model"` as it is now, from the training forward.
    """

    perplexity: float = 2.5
    of: Literal["reference", "model"] = "reference"

    def __post_init__(self) -> None:
        _check_perplexity(self.perplexity)
        if self.of not in ("reference", "model"):
            raise ValueError(f"of is {self.of!r}; it must be 'reference' or 'model', whose perplexity counts.")

    @property
    def reference(self) -> bool:
        return self.of == "reference"

    def before(
        self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None
    ) -> torch.Tensor | None:
        if not self.reference:
            return None
        return stm_weights(model, ref_model, batch, perplexity=self.perplexity)

    def after(self, forward: Forward) -> torch.Tensor:
        return _likely(forward.logps, forward.batch, self.perplexity)
