"""`alphatoken_weights`: value and select the response tokens of one batch, without training on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import nn

from .batches import Batch, read_batch
from .blocks import Scored, find_scored
from .config import AlphaTokenConfig
from .fisher import Fisher, fisher_of_batches
from .ghost import Direction, Others, accumulation_dtype, ghost_values
from .logps import token_logps
from .preference import LOSSES, check_loss, pair_logps, reference_logps
from .replay import capture_without_graph
from .selection import keep_mask
from .target import Target, estimate_target
from .values import TokenValues

TargetLike = Target | Iterable[Mapping[str, Any]] | None


@overload
def alphatoken_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    target: TargetLike = None,
    fisher: Fisher | None = None,
    config: AlphaTokenConfig | None = None,
    beta: float = 0.1,
    return_values: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def alphatoken_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    target: TargetLike = None,
    fisher: Fisher | None = None,
    config: AlphaTokenConfig | None = None,
    beta: float = 0.1,
    return_values: Literal[True],
) -> tuple[torch.Tensor, TokenValues]: ...


def alphatoken_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    target: TargetLike = None,
    fisher: Fisher | None = None,
    config: AlphaTokenConfig | None = None,
    beta: float = 0.1,
    return_values: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TokenValues]:
    """Value every response token of a batch and keep the top `rho` share (arXiv 2606.01635, Eq. 12).

    The forward keeps no graph but that of norm, head and loss; the last K blocks are then run back through one at a
    time, without dropout. No gradient, hook, mode or random state is left changed, also when an error is raised.

    Args:
        model (`nn.Module`): causal LM with LoRA adapters, or with linears that are trained themselves.
        ref_model (`nn.Module` or `None`): the reference; `None` for the same network with adapters off, or with its
            adapter "ref".
        batch (`Mapping`): an SFT batch (`input_ids`, `labels`, `attention_mask` or packed `position_ids`) or
            preference pairs (stacked with `completion_mask`, chosen first, or separate `chosen_*` / `rejected_*`).
        target (`Target` or batches, *optional*): the validation gradient. By default the other sequences of the batch
            stand in for the validation set; for pairs, the chosen answers of the other pairs.
        fisher (`Fisher`, *optional*): the reference's Fisher. By default estimated on this one batch, from labels
            drawn from the reference's own predictions.
        config (`AlphaTokenConfig`, *optional*).
        beta (`float`): of the DPO loss whose errors value pairs, +omega d on chosen and -omega d on rejected answers.
        return_values (`bool`): return `(weights, TokenValues)`.

    Returns:
        `torch.Tensor`: `(B, T)` float32, 1 for tokens that are kept and 0 elsewhere, aligned with the labels. For
        `chosen_*` / `rejected_*` keys, stacked with the chosen answers first.

    Raises:
        ValueError: the batch, the model's adapters, the target or the Fisher do not fit; the message says what to do.
        FloatingPointError: values are not finite; the message names the layer.

    Example:
        >>> weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher)
        >>> sft_loss(model, batch, weights).backward()
    """
    config = config or AlphaTokenConfig()
    read = read_batch(batch)
    check_loss("sigmoid", beta, 0.0)
    if config.rho >= 1.0 and not return_values:
        return read.at_labels(read.rows.float())
    scored = find_scored(model, config.scored_layers)
    if not bool(read.rows.any()):
        nothing = torch.zeros(read.shape, device=read.labels.device)
        return (nothing, TokenValues(*[nothing] * 8)) if return_values else nothing
    if fisher is None and config.stability_weight > 0:
        dense = config.fisher == "dense"
        fisher = fisher_of_batches(model, scored, ref_model, [read.chosen()], dense=dense)
    elif fisher is not None:
        fisher.check_base(model)
    if target is not None and not isinstance(target, Target):
        target = estimate_target(model, scored, target)
    direction, components = stack_direction(scored, target, fisher, ref_model)
    if target is None:
        Others.of(read)  # an error before the work
    loss_sum = _LossSum(model, ref_model, read, beta)
    capture, rows = capture_without_graph(model, scored, read, loss_sum)
    others = Others.of(read, loss_sum.omega) if target is None else None
    values = ghost_values(
        capture,
        rows,
        direction,
        components,
        causal_window=config.causal_window,
        stability_weight=config.stability_weight,
        norms=return_values,
        others=others,
    )
    weights = select(values, read, config).float()
    return (weights, values) if return_values else weights


def select(values: TokenValues, batch: Batch, config: AlphaTokenConfig) -> torch.Tensor:
    """`(B, T)` bool at the labels: the tokens that are kept."""
    groups = batch.groups(config.threshold_scope).roll(1, 1)  # no row stands in the last column
    return keep_mask(values.total, groups, rho=config.rho)


def stack_direction(
    scored: Scored,
    target: Target | None,
    fisher: Fisher | None,
    ref_model: nn.Module | None,
) -> tuple[Direction, tuple[str, ...]]:
    """Parameter name -> `(J, *shape)`: the target gradient and the drift gradient, whichever there are."""
    parts: list[Mapping[str, torch.Tensor]] = []
    components: list[str] = []
    if target is not None:
        target.check(scored)
        parts.append(target.gradients)
        components.append("target")
    if fisher is not None:
        parts.append(fisher.drift(scored, ref_model))
        components.append("drift")
    direction = {
        name: torch.stack([part[name].to(p.device, accumulation_dtype(p)) for part in parts])
        for name, p in scored.parameters.items()
        if parts
    }
    return direction, tuple(components)


class _LossSum:
    """The loss whose gradient values the batch: a sum over response tokens, or over pairs.

    Attributes:
        omega (`torch.Tensor` or `None`): `(P,)`, beta * sigmoid(-s) of each pair, once the loss was computed.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, beta: float) -> None:
        self.batch, self.beta = batch, beta
        self.ref_logps = reference_logps(model, ref_model, batch) if batch.pairs else None
        self.omega: torch.Tensor | None = None

    def __call__(self, model: nn.Module) -> torch.Tensor:
        logps = token_logps(model, self.batch)
        if self.ref_logps is None:
            return -logps.sum()
        pairs = pair_logps(self.batch, logps, self.ref_logps)
        self.omega = self.beta * (-self.beta * pairs.delta.detach()).sigmoid()
        return LOSSES["sigmoid"](pairs, self.beta, 0.0).sum()
