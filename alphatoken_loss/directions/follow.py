"""The path to theta*: a few Adam steps down the validation loss and the drift.

They begin where the adapter is, and lower J(theta) = validation loss + lambda * 0.5 * sum F dW^2. The other estimators
value tokens along its gradient D. The steps are taken on copies of the scored parameters, which take their place while
the model runs. The model's own are never written to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..losses.logps import token_logps
from ..losses.preference import LOSSES, pair_logps, reference_logps
from ..models import tensors
from ..models.changes import undoing
from ..models.modes import autocast_without_cache, refuse_inference_mode, without_noise
from ..models.processes import all_counts, all_sum
from ..models.sites import Scored, find_scored
from ..models.structure import unwrap
from .drift import drift
from .estimate import fisher_of_batches
from .fisher import Fisher, base_of
from .gradients import Loss, scored_gradients
from .path import Path, accumulated, run_at


@undoing
def make_path(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Batch],
    *,
    ref_model: nn.Module | None = None,
    fisher: Fisher | None = None,
    config: AlphaTokenConfig | None = None,
    steps: int | None = None,
    rate: float | None = None,
    progress: bool = True,
) -> Path:
    """Go from where the adapter is to theta*: Adam steps down the validation loss and the drift.

    Each step takes the next batch, or the next few until they are 8 rows (pairs). Dropout is off and nothing is random,
    so the same batches give the same theta*. For SFT batches the loss is the mean of -log p over response tokens. For
    preference pairs it is the DPO loss plus `path_likelihood` times the mean of -log p over the tokens of chosen
    answers. If rate or number of steps is not given, a trial finds those that lower the loss of a held-out quarter of
    the rows most, and theta* is then made with no row held out; with `path_holdout`, theta* is where the loss of that
    share was lowest. Parameters, gradients, modes and the random state are left as they were, also when an error is
    raised. In distributed runs each process gives its share of the batches and gets the same theta*.

    Args:
        model (`nn.Module`): the model in training; the path begins at its present values.
        batches (`Iterable`): validation batches, of SFT or of pairs, all of one kind.
        ref_model (`nn.Module`, *optional*): the reference of drift and DPO; by default the model with adapters off, or
            with its adapter "ref".
        fisher (`Fisher`, *optional*): by default estimated from the batches, with labels drawn from the reference.
        config (`AlphaTokenConfig`, *optional*): what is scored, `stability_weight` and the `path_` fields.
        steps (`int`, *optional*): by default `path_steps`.
        rate (`float`, *optional*): Adam's learning rate; by default `path_rate`.
        progress (`bool`): show a progress bar.

    Returns:
        `Path`

    Raises:
        ValueError: there is no batch, none has a response token, or SFT batches and pairs are mixed; steps or rate are
            not above 0; `path_holdout` can hold nothing out.
        FloatingPointError: theta* is not finite.

    Example:
        >>> path = make_path(model, validation_batches, fisher=fisher)
        >>> alphatoken = AlphaToken(model, path=path, config=AlphaTokenConfig(estimator="path"))
    """
    config = config or AlphaTokenConfig(estimator="path")
    if isinstance(batches, Mapping | Batch):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; it must be validation batches, of SFT or of pairs.")
    given: dict[str, Any] = {"path_steps": steps, "path_rate": rate}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    scored = find_scored(model, config.scored_layers, config.scope)
    read = [read_batch(batch).to(scored.device) for batch in batches]
    if config.stability_weight > 0 and fisher is None:
        chosen = [batch.chosen() for batch in read]
        fisher = fisher_of_batches(model, scored, ref_model, chosen, dense=config.fisher == "dense")
    return follow(model, scored, read, fisher, ref_model=ref_model, config=config, hide=not progress)


def follow(
    model: nn.Module,
    scored: Scored,
    batches: Sequence[Batch],
    fisher: Fisher | None,
    *,
    ref_model: nn.Module | None,
    config: AlphaTokenConfig,
    hide: bool | None = None,
) -> Path:
    """`make_path` for scored modules and batches that are read; `hide=None` shows the bar in a terminal only."""
    refuse_inference_mode()
    inner = unwrap(model)
    drifting = fisher if config.stability_weight > 0 else None
    batches = [part for batch in batches for part in batch.unpacked(_ROWS)]  # a row is what is held out, and counted
    batches = [_with_reference(batch, inner, ref_model) for batch in batches if bool(batch.rows.any())]
    goal = _Goal(inner, scored, batches, config, drifting, ref_model, config.path_holdout)
    if config.path_holdout > 0 and not goal.judges:
        raise ValueError(
            f"path_holdout is {config.path_holdout}, but the target is one row, or the rows to be held out have no "
            "response token. Give more rows, or set path_holdout=0."
        )
    steps, rate = config.path_steps, config.path_rate
    most, known = (_PAIR_STEPS, _PAIR_RATES) if goal.pairs else (_STEPS, _RATES)
    rates = (rate,) if rate else known
    searched = goal
    if config.path_holdout == 0 and not (steps and rate):
        searched = _Goal(inner, scored, batches, config, drifting, ref_model, HELD_OUT)
    tries = len(rates) if searched.judges else 0
    again = searched is not goal or not tries  # on all rows
    if not (steps and rate) and not tries:
        warnings.warn(
            "The target is one row, or no row that could be held out has a response token. So path_rate and path_steps "
            f"were not tried: {steps or most} steps at {rates[0]} may learn it by heart. Give more rows, or set both.",
            stacklevel=3,
        )
    bar = tqdm(total=(steps or most) * (tries + again), desc="Path", unit="step", disable=hide)
    with bar, autocast_without_cache(scored.device.type):  # each step has tensors of its own, which a cache would keep
        walks = (searched.walk(steps or most, each, bar, keep=not again) for each in rates[:tries])
        to_the_end = steps and again  # else it may end before, where the loss is lowest
        best = min(walks, key=lambda walk: walk.losses[-1] if to_the_end else walk.least, default=_Walk(rates[0]))
        if again:
            best = goal.walk(steps or best.turn or most, best.rate, bar)
    found = best.end if again else best.lowest
    if not found or not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise FloatingPointError(
            f"theta* is not finite after {len(best.losses)} steps at a rate of {best.rate}. Lower path_rate, and look "
            "at the validation batches and the Fisher."
        )
    return Path(found, len(best.losses) if again else best.turn, base_of(inner), best.rate)


@dataclass
class _Walk:
    """Steps at one rate.

    Attributes:
        end: parameters after the last step.
        losses: loss of the held-out rows after each step; infinite if there are none, or if it is not finite.
        lowest: parameters where this loss was lowest.
    """

    rate: float
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    lowest: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def least(self) -> float:
        return min(self.losses)

    @property
    def turn(self) -> int:
        """The step after which the loss was lowest, from 1; 0 if it is not known."""
        return self.losses.index(self.least) + 1 if self.losses and math.isfinite(self.least) else 0


_ROWS = 8  # rows (pairs) in each process that a step is taken on at least, if there are so many
HELD_OUT = 0.25  # share of the rows by which rate and number of steps are chosen
_RATES, _PAIR_RATES = (3e-3, 1e-3, 3e-4), (1e-3, 3e-4, 1e-4)  # tried; the first if no row can be held out
_STEPS, _PAIR_STEPS = 16, 24  # taken at most


class _Goal:
    """The validation loss along a path.

    Attributes:
        pairs (`bool`): whether its batches are preference pairs.
        groups (`list`): for each step, the batches that it is taken on.
        held_out (`list`): the last `share` of each batch's rows, on which no step is taken.
        judges (`bool`): whether any process has such rows.
    """

    def __init__(
        self,
        model: nn.Module,
        scored: Scored,
        batches: Sequence[Batch],
        config: AlphaTokenConfig,
        fisher: Fisher | None,
        ref_model: nn.Module | None,
        share: float,
    ) -> None:
        self.model, self.ref_model, self.scored, self.config = model, ref_model, scored, config
        self.fisher = None if fisher is None else fisher.to(scored.device)
        pairs, plain = all_counts([sum(b.pairs for b in batches), sum(not b.pairs for b in batches)], scored.device)
        if not pairs + plain:
            raise ValueError("The target batches hold no response token (no label other than -100). Give some.")
        if pairs and plain:
            raise ValueError("The target holds SFT batches and preference pairs. Give batches of one kind.")
        self.pairs = pairs > 0
        self.groups: list[list[Batch]] = []
        self.held_out: list[Batch] = []
        for group in _grouped(batches):
            kept, held = apart(group, share)
            self.groups.append(kept)
            self.held_out += held
        self.groups = self.groups or [[]]  # a process without a batch still takes part in the sums
        self._counts = [_counts_of(group) for group in self.groups]
        self._held = all_counts(_counts_of(self.held_out), scored.device)
        self.judges = self._held[0] > 0

    def walk(self, steps: int, rate: float, bar: tqdm[Any], *, keep: bool = True) -> _Walk:
        """Adam steps from where the adapter is, down the loss of the next batch and the drift. Without `keep` only its
        losses are told."""
        there = accumulated({name: tensor.clone() for name, tensor in self.scored.parameters.items()})
        optimizer, walk = torch.optim.Adam(list(there.values()), lr=rate), _Walk(rate)
        for step in range(steps):
            gradients = self.gradients(step, there)
            if self.fisher is not None:
                pull = _drift_at(self.model, self.scored, there, self.fisher, self.ref_model)
                gradients = tensors.added(gradients, pull, self.config.stability_weight)
            for name, tensor in there.items():
                tensor.grad = gradients[name]
            optimizer.step()
            loss = self.held_out_loss(there) if self.judges else math.inf
            walk.losses.append(loss if math.isfinite(loss) else math.inf)
            if keep and self.judges and loss == walk.least and walk.turn == step + 1:
                walk.lowest = {name: tensor.detach().clone() for name, tensor in there.items()}
            bar.update()
        if keep:
            walk.end = {name: tensor.detach() for name, tensor in there.items()}
        return walk

    def gradients(self, step: int, there: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradient at `there` of the mean loss of a step's batches, over all processes."""
        place = step % len(self.groups)
        counts = all_counts(self._counts[place], self.scored.device)
        found = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
        for batch in self.groups[place]:
            moved = _placed(self.scored.parameters, there, grad=True)
            run = partial(scored_gradients, scored=_live(self.scored, moved), batch=batch,
                          loss=self._loss(batch, counts))  # fmt: skip
            found = tensors.added(found, run_at(self.model, moved, run))
        all_sum(list(found.values()))
        return found

    def held_out_loss(self, there: Mapping[str, torch.Tensor]) -> float:
        """The mean loss of the held-out rows, over all processes."""
        moved = _placed(self.scored.parameters, there)
        total = torch.zeros((), dtype=next(iter(there.values())).dtype, device=self.scored.device)
        with torch.no_grad(), without_noise(self.model):
            for batch in self.held_out:
                total += run_at(self.model, moved, self._loss(batch, self._held)).to(total)
        all_sum([total])
        return float(total)

    def _loss(self, batch: Batch, counts: Sequence[int]) -> Loss:
        """A batch's part of the mean over `counts` chosen tokens and pairs."""
        tokens, pairs = (max(count, 1) for count in counts)

        def loss(model: nn.Module) -> torch.Tensor:
            logps = token_logps(model, batch)
            if batch.ref_logps is None:
                return -logps.sum() / tokens
            both = pair_logps(batch, logps, torch.cat(batch.ref_logps))
            preferred = LOSSES["sigmoid"](both, self.config.path_beta, 0.0).sum() / pairs
            return preferred - self.config.path_likelihood * both.chosen.sum() / tokens

        return loss


def _with_reference(batch: Batch, model: nn.Module, ref_model: nn.Module | None) -> Batch:
    """Pairs with their log-probabilities under the reference."""
    if not batch.pairs:
        return batch
    chosen, rejected = reference_logps(model, ref_model, batch).chunk(2)
    return replace(batch, ref_logps=(chosen, rejected))


def _counts_of(batches: Sequence[Batch]) -> list[int]:
    """Numbers of response tokens (for pairs, of chosen answers) and of pairs in batches."""
    tokens = sum(int(batch.chosen().rows.sum()) for batch in batches)
    return [tokens, sum(batch.size for batch in batches if batch.pairs)]


def apart(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """The batches without the last `share` of the rows (pairs) of each, and batches of these.

    Of batches that hold one row, about every (1 / share)th is held out whole.
    """
    if not share:
        return list(batches), []
    kept: list[Batch] = []
    held: list[Batch] = []
    alone = 0
    for batch in batches:
        if batch.size > 1:
            end = batch.size - min(max(int(batch.size * share + 0.5), 1), batch.size - 1)
            kept.append(batch.part(slice(end)))
            held.append(batch.part(slice(end, batch.size)))
        else:
            alone += 1
            out = int(alone * share + 0.5) > int((alone - 1) * share + 0.5)
            (held if out else kept).append(batch)
    return (kept, held) if kept else (held, [])


def _grouped(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Neighbours together, until they are `_ROWS` rows: how many rows run together does not decide what a step is."""
    groups: list[list[Batch]] = []
    rows = _ROWS
    for batch in batches:
        if rows >= _ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(batch)
        rows += batch.size
    return groups


def _placed(
    parameters: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor], *, grad: bool = False
) -> dict[str, torch.Tensor]:
    return {name: there[name].detach().to(p, copy=True).requires_grad_(grad) for name, p in parameters.items()}


def _live(scored: Scored, moved: Mapping[str, torch.Tensor]) -> Scored:
    """The same scored modules, with the tensors that are in the place of `others` now."""
    return replace(scored, others={name: moved[name] for name in scored.others})


def _drift_at(
    model: nn.Module, scored: Scored, there: Mapping[str, torch.Tensor], fisher: Fisher, ref_model: nn.Module | None
) -> dict[str, torch.Tensor]:
    moved = {name: tensor.detach().requires_grad_() for name, tensor in there.items()}
    return run_at(model, moved, lambda _: drift(fisher, _live(scored, moved), ref_model))
