"""Steps down the validation loss and the drift, what they come to on held-out rows, and which rate is taken."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..losses.logps import token_logps
from ..losses.preference import LOSSES, pair_logps
from ..models import tensors
from ..models.modes import without_noise
from ..models.processes import all_counts, all_rows, all_sum
from ..models.sites import Scored
from .drift import drift
from .fisher import Fisher
from .gradients import Loss, scored_gradients
from .path import accumulated, run_at


@dataclass
class Walk:
    """Steps at one rate.

    Attributes:
        end: parameters after the last step.
        held: after each step, of each held-out row (pair) its part of their mean loss; empty without such rows.
        lowest: parameters where this loss was lowest.
    """

    rate: float
    taken: int = 0
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)
    lowest: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """Mean loss of the held-out rows after each step; infinite where it is not finite."""
        sums = [float(rows.sum()) for rows in self.held]
        return [loss if math.isfinite(loss) else math.inf for loss in sums]

    @property
    def turn(self) -> int:
        """The step after which the loss was lowest, from 1; 0 if it is not known."""
        losses = self.losses
        least = min(losses, default=math.inf)
        return losses.index(least) + 1 if math.isfinite(least) else 0


def mildest(walks: Sequence[Walk], *, to_the_end: bool) -> Walk:
    """Of walks from the hottest rate to the mildest, the mildest that is as good as the best.

    As good is a loss of the held-out rows that is not above the lowest by more than a standard error of the
    difference, by rows (the one-standard-error rule of Breiman et al., 1984). A few rows cannot tell such walks apart,
    and a hotter one is the noisier path: each token is valued along it, and the model may begin at its end.

    Args:
        to_the_end: compare the losses after the last steps, else the lowest ones.
    """

    def rows(walk: Walk) -> torch.Tensor:
        return walk.held[-1 if to_the_end else walk.turn - 1]

    best = min(walks, key=lambda walk: walk.losses[-1] if to_the_end else min(walk.losses))
    for walk in reversed(walks):
        above = rows(walk) - rows(best)
        if len(above) > 1 and float(above.sum()) <= len(above) ** 0.5 * float(above.std()):
            return walk
    return best


STEP_ROWS = 8  # rows (pairs) in each process that a step is taken on at least, if there are so many


class Goal:
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

    def walk(self, steps: int, rate: float, bar: tqdm[Any], *, keep: str = "") -> Walk:
        """Adam steps from where the adapter is, down the loss of the next batch and the drift. `keep` names the
        parameters that are kept, "end" or "lowest"."""
        there = accumulated({name: tensor.clone() for name, tensor in self.scored.parameters.items()})
        optimizer, walk = torch.optim.Adam(list(there.values()), lr=rate), Walk(rate)
        for step in range(steps):
            gradients = self.gradients(step, there)
            if self.fisher is not None:
                pull = _drift_at(self.model, self.scored, there, self.fisher, self.ref_model)
                gradients = tensors.added(gradients, pull, self.config.stability_weight)
            for name, tensor in there.items():
                tensor.grad = gradients[name]
            optimizer.step()
            walk.taken += 1
            if self.judges:
                walk.held.append(self.held_out_losses(there))
                if keep == "lowest" and walk.turn == walk.taken:
                    walk.lowest = {name: tensor.detach().clone() for name, tensor in there.items()}
            bar.update()
        if keep == "end":
            walk.end = {name: tensor.detach() for name, tensor in there.items()}
        return walk

    def tell_if_useless(self, loss: float) -> None:
        """Warn if the held-out rows have no lower loss at theta* than where the path begins."""
        before = float(self.held_out_losses(self.scored.parameters).sum())
        if before <= loss < math.inf:  # else nothing is finite, which is an error
            warnings.warn(
                f"theta* does not lower the loss of target rows that it was not made of ({before:.3f} before, "
                f"{loss:.3f} at it): values along the path to it may say nothing. Give more clean rows, or train on "
                "all tokens (rho=1.0).",
                stacklevel=5,
            )

    def gradients(self, step: int, there: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradient at `there` of the mean loss of a step's batches, over all processes."""
        place = step % len(self.groups)
        counts = all_counts(self._counts[place], self.scored.device)
        # A gradient of a mean over many tokens would be too small for float16; a sum over a pair's, too large.
        many = max(counts[1] if self.pairs else counts[0], 1)
        found = {name: torch.zeros_like(tensor) for name, tensor in there.items()}
        for batch in self.groups[place]:
            moved = _placed(self.scored.parameters, there, grad=True)
            loss = _sum_of(self._losses(batch, counts), times=many)
            run = partial(scored_gradients, scored=_live(self.scored, moved), batch=batch, loss=loss)
            found = tensors.added(found, run_at(self.model, moved, run))
        all_sum(list(found.values()))
        return {name: gradient / many for name, gradient in found.items()}

    def held_out_losses(self, there: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each held-out row (pair) of all processes its part of their mean loss."""
        moved, found = _placed(self.scored.parameters, there), [torch.zeros(0)]
        with torch.no_grad(), without_noise(self.model):
            for batch in self.held_out:
                told = batch.rows.any(1)  # rows without a response token tell nothing
                told = told.view(2, -1).any(0) if batch.pairs else told
                found.append(run_at(self.model, moved, self._losses(batch, self._held))[told])
        return all_rows(torch.cat([each.double().cpu() for each in found]))

    def _losses(self, batch: Batch, counts: Sequence[int]) -> Loss:
        """Of each row (pair) its part of the mean over `counts` chosen tokens and pairs."""
        tokens, pairs = (max(count, 1) for count in counts)

        def losses(model: nn.Module) -> torch.Tensor:
            logps = token_logps(model, batch)
            if batch.ref_logps is None:
                return -logps.sum(1) / tokens
            both = pair_logps(batch, logps)
            preferred = LOSSES["sigmoid"](both, self.config.path_beta, 0.0) / pairs
            return preferred - self.config.path_likelihood * both.chosen / tokens

        return losses


def unpacked(batches: Sequence[Batch]) -> list[Batch]:
    """Batches with a response token; of packed ones, batches of their sequences: a row is what is held out, and
    counted."""
    parts = [part for batch in batches for part in batch.unpacked(STEP_ROWS)]
    return [part for part in parts if bool(part.rows.any())]


def _sum_of(losses: Loss, times: float) -> Loss:
    return lambda model: losses(model).sum() * times


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
    """Neighbours together, until they are `STEP_ROWS` rows: how many run together does not decide what a step is."""
    groups: list[list[Batch]] = []
    rows = STEP_ROWS
    for batch in batches:
        if rows >= STEP_ROWS:
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
