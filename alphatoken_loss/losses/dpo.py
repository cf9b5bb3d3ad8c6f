"""The preference loss: plain, with token weights, or valued on the way by an `AlphaToken`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches.read import read_batch
from ..models.changes import undoing
from .logps import policy_logps
from .preference import LOSSES, check_loss, pair_logps, with_reference
from .weighting import Valuing, Weights, checked_weights, columns_of, valuing


@undoing
def dpo_loss(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any],
    weights: Weights = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    negative_weights: bool = False,
    return_metrics: bool = False,
) -> Any:
    """Preference loss of a batch of pairs, with the gradient of low-value tokens switched off (Eq. 14).

    The loss has the value of the full sequences; only the gradient of each token's log-probability is multiplied by its
    weight. For `"sigmoid"` it is omega * sum_t (w_t+ grad l_t+ - w_t- grad l_t-), omega = beta * sigmoid(-s). Of a
    mixture of experts with `output_router_logits` the loss that balances its router is added, as TRL does.

    Args:
        model (`nn.Module`): the policy.
        ref_model (`nn.Module` or `None`): the reference; `None` for the policy with adapters off, or with its adapter
            "ref" on. It is not run if the batch has `ref_chosen_logps` and `ref_rejected_logps`.
        batch (`Mapping`): stacked pairs with `completion_mask`, chosen first, or `chosen_*` / `rejected_*` keys.
        weights (`torch.Tensor` or `AlphaToken`, *optional*): `None` for the plain loss; `(2P, T)` floats aligned with
            the labels, chosen first; or an `AlphaToken`: it values this batch in the batch's own backward pass, and its
            `path_kl` is added.
        beta (`float`): inverse temperature of the implicit reward, in 1 / nats.
        loss_type (`str`): as TRL's: sigmoid, hinge, ipo, robust, exo_pair, apo_zero or apo_down.
        label_smoothing (`float`): assumed share of flipped preferences, for robust and exo_pair alone.
        negative_weights (`bool`): allow weights below 0, which reverse a token's gradient.
        return_metrics (`bool`): return `(loss, metrics)`, detached means over pairs by TRL's names: rewards/chosen,
            rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected.

    Returns:
        `torch.Tensor`: scalar, the mean over pairs.

    Raises:
        ValueError: the batch holds no pairs, the weights are not of their shape, not finite or negative, or an option
            is not known.
    """
    check_loss(loss_type, beta, label_smoothing)
    read = read_batch(batch, pairs=True, columns=columns_of(weights))
    full = with_reference(model, ref_model, read)
    kl = None
    if isinstance(weights, torch.Tensor):
        weights = checked_weights(weights, read, negative=negative_weights)
        logps, balance, _ = policy_logps(model, read)
        weighted = logps * read.at_labels(weights.to(logps).roll(-1, 1))
        logps = weighted + (logps - weighted).detach()
    else:
        alike = isinstance(weights, Valuing) and weights.ref_model is ref_model  # one reference is asked once
        with valuing(model, full if alike else read, weights, beta=beta) as step:
            logps, balance, _ = policy_logps(model, read)
        kl = None if step is None else step.kl
    pairs = pair_logps(full, logps)
    loss = LOSSES[loss_type](pairs, beta, label_smoothing).mean()
    for more in (kl, balance):  # of a mixture of experts the router's loss, as in TRL
        loss = loss if more is None else loss + more
    if not return_metrics:
        return loss
    chosen, rejected = beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach()
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": pairs.chosen.detach().mean(),
        "logps/rejected": pairs.rejected.detach().mean(),
    }
    return loss, metrics
