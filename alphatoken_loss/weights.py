"""`alphatoken_weights`: value and select the response tokens of one batch, without training on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import nn

from . import foreach
from .batches import Batch, read_batch
from .blocks import Scored, find_scored
from .config import AlphaTokenConfig
from .difference import Difference, Steps
from .exact import Exact
from .fisher import Fisher, fisher_of_batches
from .ghost import Ghost, Others, accumulation_dtype
from .logps import token_logps
from .precondition import preconditioned
from .preference import LOSSES, check_loss, pair_logps, reference_logps
from .replay import loss_gradients, rows_without_graph
from .selection import keep_mask
from .target import Target, estimate_target
from .values import TokenValues

Parts = dict[str, Mapping[str, torch.Tensor]]
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


def select(values: TokenValues, batch: Batch, config: AlphaTokenConfig) -> torch.Tensor:
    """`(B, T)` bool at the labels: the tokens that are kept."""
    groups = batch.groups(config.threshold_scope).roll(1, 1)  # no row stands in the last column
    if config.threshold == "zero":
        return (groups >= 0) & (values.total > 0)
    return keep_mask(values.total, groups, rho=config.rho)


def check_target(target: object, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError for an optimizer without a target."""
    if target is None and optimizer is not None:
        raise ValueError(
            "An optimizer was given without a target. The other sequences of a batch, which stand in for one, are not "
            "preconditioned: pass target, or no optimizer."
        )


def directions(
    scored: Scored,
    target: Target | None,
    fisher: Fisher | None,
    ref_model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Parts:
    """Part of the value, "target" and "drift", whichever there are -> parameter name -> its gradient, as the optimizer
    will scale it where one is given."""
    parts: Parts = {}
    if target is not None:
        target.check(scored)
        parts["target"] = target.gradients
    if fisher is not None:
        parts["drift"] = fisher.drift(scored, ref_model)
    parts = {
        name: {n: part[n].to(p.device, accumulation_dtype(p)) for n, p in scored.parameters.items()}
        for name, part in parts.items()
    }
    if optimizer is not None:
        parts.update(preconditioned(parts, scored.parameters, optimizer))
    return parts


def estimator_of(
    model: nn.Module,
    scored: Scored,
    batch: Batch,
    config: AlphaTokenConfig,
    parts: Parts,
    steps: Steps,
    *,
    apart: bool,
    in_graph: bool = False,
) -> Ghost | Exact | Difference:
    """The estimator that the config names, for one forward of one batch.

    Args:
        apart (`bool`): value adaptation and stability apart. The ghost estimator always does; the others need a pass
            for each.
        in_graph (`bool`): see `Ghost`.
    """
    if config.estimator == "ghost":
        return Ghost(scored, batch, config, parts, in_graph=in_graph)
    if not apart:
        total = parts.get("target")
        if "drift" in parts:
            drift, weight = parts["drift"], config.stability_weight
            total = foreach.scaled(drift, weight) if total is None else foreach.added(total, drift, weight)
        parts = {} if total is None else {"total": total}
    if config.estimator == "exact":
        return Exact(scored, batch, config, parts)
    return Difference(model, scored, batch, config, parts, steps)


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
