"""`alphatoken_weights`: value and select the response tokens of one batch, without training on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import nn

from .batches.batch import Batch
from .batches.read import read_batch
from .config import AlphaTokenConfig, read_config
from .directions.drift import refuse_other_base
from .directions.estimate import fisher_of_batches
from .directions.fisher import Fisher
from .directions.gradients import loss_gradients
from .directions.path import Path
from .directions.source import Moves, Source
from .directions.target import Target
from .estimators import estimator_class
from .estimators.base import Estimator, Memory, Task
from .estimators.others import Others
from .losses.logps import token_logps
from .losses.preference import LOSSES, check_loss, pair_logps, with_reference
from .models.changes import undoing
from .models.decoder import last_hidden
from .models.forwards import rows_without_graph
from .models.modes import without_noise
from .models.processes import in_any
from .models.reference import refuse_itself
from .models.sites import Scored, find_scored
from .models.start import adopt_start
from .models.structure import unwrap
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
    path: Path | str | None = None,
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
    path: Path | str | None = None,
    beta: float = 0.1,
    return_values: Literal[True],
) -> tuple[torch.Tensor, TokenValues]: ...


@undoing
def alphatoken_weights(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: Mapping[str, Any] | Batch,
    *,
    target: TargetLike = None,
    fisher: Fisher | None = None,
    config: AlphaTokenConfig | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    path: Path | str | None = None,
    beta: float = 0.1,
    return_values: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, TokenValues]:
    """Value every response token of a batch and keep the top `rho` share (arXiv 2606.01635, Eq. 12).

    The forward runs without dropout, and has no graph but that of norm, head and loss. Values are then made as the
    estimator does: ghost and exact run the scored blocks again, one at a time; difference and path compare with a
    second forward. Gradients, hooks, modes and the random state are left as they were, also when an error is raised.

    Args:
        model (`nn.Module`): causal LM with LoRA adapters, or with linears that are trained themselves.
        ref_model (`nn.Module` or `None`): the reference; `None` for the same network with adapters off, or with its
            adapter "ref".
        batch (`Mapping`): an SFT batch (`input_ids`, `labels`, `attention_mask` or packed `position_ids`) or
            preference pairs (stacked with `completion_mask`, chosen first, or separate `chosen_*` / `rejected_*`).
        target (`Target` or batches, *optional*): the validation gradient. By default the other sequences of the batch
            stand in for the validation set; for pairs, the chosen answers of the other pairs.
        fisher (`Fisher`, *optional*): the reference's Fisher. By default estimated on this one batch (for
            `estimator="path"`, on the target batches), from labels drawn from the reference's own predictions.
        config (`AlphaTokenConfig`, *optional*): settings; by default `AlphaTokenConfig()`.
        optimizer (`torch.optim.Optimizer`, *optional*): the Adam in training. Values are then those of the step that it
            takes, not of a step along the gradient (directions/preconditioning.py). Needs a target.
        path (`Path` or `str`, *optional*): for `estimator="path"`, theta* (`make_path`), or the name of an adapter of
            the model that holds it. By default it is made at each call, from target batches and Fisher; a batch with
            `path_logps` needs none.
        beta (`float`): beta of the DPO loss that values pairs; its errors are +omega d on chosen answers and -omega d
            on rejected ones.
        return_values (`bool`): return `(weights, TokenValues)`.

    Returns:
        `torch.Tensor`: `(B, T)` float32, aligned with the labels: 1 for tokens that are kept and 0 elsewhere; with
        `threshold="soft"` between 0 and 1. For `chosen_*` / `rejected_*` keys, stacked with the chosen answers first.
        With `return_values`, these and the `TokenValues`.

    Raises:
        ValueError: the batch, the model's adapters, the target or the Fisher do not fit, or beta is not a number above
            0; the message says what to do.
        FloatingPointError: values are not finite; the message names the layer.

    Example:
        >>> weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher)
        >>> sft_loss(model, batch, weights).backward()
    """
    config = read_config(config)
    read = read_batch(batch)
    check_loss("sigmoid", beta, 0.0)
    if config.rho >= 1.0 and not return_values:
        return read.at_labels(read.rows.float())
    if fisher is not None:
        adopt_start(model, fisher.start)
    scored = find_scored(model, config.scored_layers, config.scope)
    given: dict[str, Any] = {"target": target, "fisher": fisher, "optimizer": optimizer}
    source = Source(model, ref_model, config=config, path=path, **given)
    if ref_model is not None:
        refuse_itself(model, ref_model)
    estimator = estimator_class(config.estimator)
    drifts = fisher is not None or source.needs_fisher or (source.drifts and not estimator.in_forward)
    if drifts and ref_model is not None:
        refuse_other_base(model, scored, ref_model)
    memory = estimator.memory(config)
    memory.check(source)
    if fisher is not None:
        fisher.check_base(model)
        source.drifts = True  # with a Fisher the drift is reported, whatever its weight
    by_batch = fisher is None and source.drifts and not estimator.in_forward  # its Fisher, not the target's
    empty = not bool(read.rows.any())
    if not (empty or source.validates or estimator.in_forward):
        Others.of(read)  # an error before the work
    # What is estimated here is of all processes' batches: one without a response takes part.
    together = by_batch or source.batches is not None
    if in_any(not empty, scored.device) if together else not empty:
        if by_batch:
            source.fisher = fisher_of_batches(model, scored, ref_model, [read.chosen()], dense=config.fisher == "dense")
        if empty:
            memory.prepare(source, scored, read)
    values = _nothing(estimator, scored, read) if empty else _valued(source, memory, scored, read, beta, return_values)
    weights = select(values, read, config).float()
    return (weights, values) if return_values else weights


def _nothing(estimator: type[Estimator], scored: Scored, batch: Batch) -> TokenValues:
    """The values of a batch without a response token."""
    dtype = accumulation_dtype(next(iter(scored.parameters.values())))
    total, *terms = (batch.labels.new_zeros(batch.shape, dtype=dtype) for _ in range(1 + len(estimator.terms)))
    return TokenValues(total, **dict(zip(estimator.terms, terms, strict=True)))


def weights_by_others(
    scored: Scored, batch: Batch, source: Source, beta: float
) -> tuple[torch.Tensor, TokenValues | None]:
    """Weights and values of a batch whose sequences are valued by each other, with the source's Fisher."""
    check_loss("sigmoid", beta, 0.0)
    empty = not bool(batch.rows.any())
    if not empty:
        Others.of(batch)  # an error before the work
    if source.drifts and source.ref_model is not None:
        refuse_other_base(source.model, scored, source.ref_model)
    source.ensure_fisher(scored, batch)  # of all processes' batches: one without a response takes part
    if empty:
        return torch.zeros(batch.shape, device=batch.labels.device), None
    memory = estimator_class(source.config.estimator).memory(source.config)
    own = copy.copy(source)
    own.moves = Moves()  # the gate counts steps
    values = _valued(own, memory, scored, batch, beta, False)
    return select(values, batch, source.config).float(), values


@undoing
def _valued(source: Source, memory: Memory, scored: Scored, batch: Batch, beta: float, apart: bool) -> TokenValues:
    model, ref_model, estimator = source.model, source.ref_model, estimator_class(source.config.estimator)
    parts = memory.prepare(source, scored, batch)
    task = Task(model, scored, batch, source.config, parts, memory, apart=apart, ref_model=ref_model)
    if estimator.in_forward:
        return _value_in_forward(estimator, task)
    batch = with_reference(model, ref_model, batch)
    if source.validates or estimator.values_others:
        return _value(estimator, task, _LossSum(batch, beta), against_others=not source.validates)
    return _against_others(estimator, replace(task, batch=batch), beta)


def _value_in_forward(estimator: type[Estimator], task: Task) -> TokenValues:
    watched, inner = estimator(task), unwrap(task.model)
    with torch.no_grad(), without_noise(inner), watched.watching(lambda hidden: hidden):
        last_hidden(inner, task.batch)
    return watched.forward_values()


def _value(estimator: type[Estimator], task: Task, loss_sum: _LossSum, *, against_others: bool = False) -> TokenValues:
    watched = estimator(task)
    rows = rows_without_graph(task.model, watched.watching, loss_sum)
    if against_others:
        task.others = Others.of(task.batch, loss_sum.omega)
    return watched.values(rows)


def _against_others(estimator: type[Estimator], task: Task, beta: float) -> TokenValues:
    """Value each sequence (pair) against the mean gradient of the others: a forward and a backward for each."""
    model, scored, batch = task.model, task.scored, task.batch
    own = [(rows, alone, int(alone.chosen().rows.sum())) for rows, alone in batch.sequences()]
    gradients = [loss_gradients(model, scored.parameters, alone.chosen()) for _, alone, _ in own]
    dtype = accumulation_dtype(next(iter(scored.parameters.values())))
    whole = {name: torch.stack([g[name].to(dtype) for g in gradients]).sum(0) for name in scored.parameters}
    tokens = sum(count for _, _, count in own)
    found: dict[str, torch.Tensor] = {}
    for (places, alone, count), gradient in zip(own, gradients, strict=True):
        rest = {name: (whole[name] - g.to(dtype)) / max(tokens - count, 1) for name, g in gradient.items()}
        against = replace(task, batch=alone, parts={"target": rest, **task.parts})
        values = _value(estimator, against, _LossSum(alone, beta))
        for name in ("total", "adaptation", "stability"):
            value = getattr(values, name)
            if value is not None:
                found.setdefault(name, torch.zeros(batch.shape, dtype=value.dtype, device=value.device))
                found[name][places] += value
    return TokenValues(**found)


class _LossSum:
    """The loss by whose gradient a batch `with_reference` is valued: a sum over response tokens, or over pairs.

    Attributes:
        omega (`torch.Tensor` or `None`): `(P,)`, beta * sigmoid(-s) of each pair, when the loss has been computed.
    """

    def __init__(self, batch: Batch, beta: float) -> None:
        self.batch, self.beta = batch, beta
        self.omega: torch.Tensor | None = None

    def __call__(self, model: nn.Module) -> torch.Tensor:
        logps = token_logps(model, self.batch)
        if not self.batch.pairs:
            return -logps.sum()
        pairs = pair_logps(self.batch, logps)
        self.omega = self.beta * (-self.beta * pairs.delta.detach()).sigmoid()
        return LOSSES["sigmoid"](pairs, self.beta, 0.0).sum()
