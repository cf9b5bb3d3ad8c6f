"""`alphatoken_weights`: value and select the response tokens of one batch, without training on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import nn

from .batches.batch import Batch
from .batches.read import read_batch
from .config import AlphaTokenConfig
from .directions.estimate import fisher_of_batches
from .directions.fisher import Fisher
from .directions.gradients import loss_gradients
from .directions.parts import Parts, check_target, directions
from .directions.target import Target, estimate_target
from .estimators.ghost import Ghost
from .estimators.others import Others
from .estimators.steps import Steps
from .estimators.table import estimator_of
from .losses.logps import token_logps
from .losses.preference import LOSSES, check_loss, pair_logps, reference_logps
from .models.forwards import rows_without_graph
from .models.sites import Scored, find_scored
from .models.tensors import accumulation_dtype
from .selection.thresholds import select
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
    optimizer: torch.optim.Optimizer | None = None,
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
    optimizer: torch.optim.Optimizer | None = None,
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
    optimizer: torch.optim.Optimizer | None = None,
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
        optimizer (`torch.optim.Optimizer`, *optional*): the Adam in training, for values of the step that it takes
            rather than of a step along the gradient (precondition.py). Needs a target.
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
    scored = find_scored(model, config.scored_layers, config.estimator)
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
    if target is None:
        check_target(target, optimizer)
        Others.of(read)  # an error before the work
    loss_sum = _LossSum(model, ref_model, read, beta)
    parts = directions(scored, target, fisher, ref_model, optimizer)
    if target is None and config.estimator != "ghost":
        values = _against_others(model, scored, read, config, parts, loss_sum, apart=return_values)
    else:
        estimator = estimator_of(model, scored, read, config, parts, Steps(config.difference_rms), apart=return_values)
        rows = rows_without_graph(model, partial(estimator.watching, training=False), loss_sum)
        if target is None:
            assert isinstance(estimator, Ghost)
            estimator.others = Others.of(read, loss_sum.omega)
        values = estimator.values(rows, norms=return_values)
    weights = select(values, read, config).float()
    return (weights, values) if return_values else weights


def _against_others(
    model: nn.Module,
    scored: Scored,
    batch: Batch,
    config: AlphaTokenConfig,
    parts: Parts,
    loss_sum: _LossSum,
    *,
    apart: bool,
) -> TokenValues:
    """Each sequence (pair) against the mean gradient of the others, which takes a forward and a backward for each."""
    own = [(rows, alone, int(alone.chosen().rows.sum())) for rows, alone in batch.sequences()]
    gradients = [loss_gradients(model, scored.parameters, alone.chosen()) for _, alone, _ in own]
    dtype = accumulation_dtype(next(iter(scored.parameters.values())))
    whole = {name: torch.stack([g[name].to(dtype) for g in gradients]).sum(0) for name in scored.parameters}
    tokens = sum(count for _, _, count in own)
    steps = Steps(config.difference_rms)
    found: dict[str, torch.Tensor] = {}
    for (places, alone, count), gradient in zip(own, gradients, strict=True):
        rest = {name: (whole[name] - g.to(dtype)) / max(tokens - count, 1) for name, g in gradient.items()}
        estimator = estimator_of(model, scored, alone, config, {"target": rest, **parts}, steps, apart=apart)
        watching = partial(estimator.watching, training=False)
        values = estimator.values(rows_without_graph(model, watching, loss_sum.of(places, alone)))
        for name in ("total", "adaptation", "stability"):
            value = getattr(values, name)
            if value is not None:
                found.setdefault(name, torch.zeros(batch.shape, dtype=value.dtype, device=value.device))
                found[name][places] += value
    return TokenValues(**found)


class _LossSum:
    """The loss whose gradient values the batch: a sum over response tokens, or over pairs.

    Attributes:
        omega (`torch.Tensor` or `None`): `(P,)`, beta * sigmoid(-s) of each pair, once the loss was computed.
    """

    def __init__(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, beta: float) -> None:
        self.batch, self.beta = batch, beta
        self.ref_logps = reference_logps(model, ref_model, batch) if batch.pairs else None
        self.omega: torch.Tensor | None = None

    def of(self, rows: torch.Tensor, alone: Batch) -> _LossSum:
        """The same loss of some of the rows, `alone`."""
        part = copy.copy(self)
        part.batch = alone
        part.ref_logps = None if self.ref_logps is None else self.ref_logps[rows]
        return part

    def __call__(self, model: nn.Module) -> torch.Tensor:
        logps = token_logps(model, self.batch)
        if self.ref_logps is None:
            return -logps.sum()
        pairs = pair_logps(self.batch, logps, self.ref_logps)
        self.omega = self.beta * (-self.beta * pairs.delta.detach()).sigmoid()
        return LOSSES["sigmoid"](pairs, self.beta, 0.0).sum()
