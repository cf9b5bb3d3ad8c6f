"""The supervised loss: plain, with token weights, or valued on the way by an `AlphaToken`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..models.changes import undoing
from .kl import Penalty, check_kl_coef, check_kl_options
from .logps import policy_logps
from .weighting import Weights, checked_weights, columns_of, valuing


@undoing
def sft_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    weights: Weights = None,
    *,
    ref_model: nn.Module | None = None,
    kl_coef: float = 0.0,
    kl_on: str = "all",
    kl_over: str = "vocabulary",
    num_items_in_batch: int | torch.Tensor | None = None,
    negative_weights: bool = False,
    return_outputs: bool = False,
) -> Any:
    """Supervised fine-tuning loss: sum_t w_t l_t / sum_t w_t with l_t = -log p(y_t | y_<t) (arXiv 2606.01635, Eq. 13),
    and `kl_coef` times the mean over all response tokens of KL(reference || model).

    Args:
        model (`nn.Module`): causal LM.
        batch (`Mapping`): `input_ids` and `labels` `(B, T)`, and the model's other inputs.
        weights (`torch.Tensor` or `AlphaToken`, *optional*):
            `None`: the model's own loss.
            A `(B, T)` tensor of finite floats, aligned with the labels: the weighted mean.
            An `AlphaToken`: this batch is valued in its own backward pass. The loss has the value without a mask, and
            the gradient of the mean over kept tokens (with `num_items_in_batch`: of their sum divided by it). The
            `AlphaToken`'s `path_kl` is added.
        ref_model (`nn.Module`, *optional*): the reference of the KL. By default the `AlphaToken`'s, or the model with
            adapters off, or with its adapter "ref".
        kl_coef (`float`): weight of the KL; token weights do not change it. With 0 no reference is run.
        kl_on (`str`): take the KL on `"all"` response tokens, or only on the `"dropped"` ones: those of weight 0 or,
            with `estimator="path"`, those that the `AlphaToken` drops. What the sum is divided by is the same.
        kl_over (`str`): take it over the whole `"vocabulary"`, or `"without_label"`: the label is left out of both
            distributions, and the rest is scaled to a sum of 1 (arXiv 2605.29498).
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): both sums are divided by this number instead, for
            gradient accumulation.
        negative_weights (`bool`): allow weights below 0, which lower a token's probability. The loss is divided by the
            sum of all weights, also of these, unless `num_items_in_batch` is given.
        return_outputs (`bool`): return `(loss, outputs)` with the model's outputs.

    Returns:
        `torch.Tensor`: scalar; a zero with a graph when no token counts.

    Raises:
        ValueError: the batch has no labels, the weights are not of their shape, not finite or negative, `kl_coef` is
            negative or not finite, or there is no reference of the model's vocabulary; or, with a KL, the model's
            logits are not its head times the last hidden state.
        RuntimeError: a KL is asked for inside the context of an `AlphaToken`, which would mask it.
    """
    check_kl_coef(kl_coef)
    check_kl_options(kl_on, kl_over)
    read = read_batch(batch, pairs=False, columns=columns_of(weights))
    options: dict[str, Any] = {"kl_coef": kl_coef, "num_items_in_batch": num_items_in_batch, "ref_model": ref_model}
    given: torch.Tensor | None = None
    watching: AbstractContextManager[Any] = nullcontext()
    if isinstance(weights, torch.Tensor):
        given = checked_weights(weights, read, negative=negative_weights)
        options["dropped"] = lambda: given.roll(-1, 1) == 0
    elif weights is not None:
        options |= {"kl_on": kl_on, "kl_over": kl_over, "mean_over_kept": num_items_in_batch is None}
        watching = valuing(model, read, weights, **options)
    elif kl_coef > 0 and kl_on == "dropped":
        raise ValueError('kl_on is "dropped", but without weights nothing is. Give weights, or kl_on="all".')
    if kl_coef > 0 and (given is not None or weights is None):
        watching = Penalty(model, read, **options, on=kl_on, over=kl_over).watching()
    with watching as penalised:
        if given is not None:
            logps, balance, outputs = policy_logps(model, read, whole=return_outputs)
            loss = _weighted_mean(logps, read, given, num_items_in_batch)
            loss = loss if balance is None else loss + balance
        else:
            count = read.rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            outputs = model(**{**read.inputs, "use_cache": False}, labels=read.labels, num_items_in_batch=count)
            loss = outputs.loss
    if penalised is not None and penalised.kl is not None:
        loss = loss + penalised.kl
    return (loss, outputs) if return_outputs else loss


def _weighted_mean(
    logps: torch.Tensor, batch: Batch, weights: torch.Tensor, num_items: int | torch.Tensor | None
) -> torch.Tensor:
    """Eq. 13."""
    weights = batch.at_labels(weights.to(logps).roll(-1, 1))
    total = weights.sum() if num_items is None else torch.as_tensor(num_items).to(logps)
    return -(weights * logps).sum() / torch.where(total == 0, torch.ones_like(total), total)
