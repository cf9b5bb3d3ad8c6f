"""Should tokens be masked at all? What the path to theta* gains in training rows, beside clean ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..directions.follow import make_path
from ..directions.path import Path
from ..directions.source import as_batches
from ..losses.logps import token_logps
from ..models.changes import undoing
from ..models.modes import without_noise
from ..models.processes import all_rows, in_any
from ..models.sites import find_scored
from ..models.structure import unwrap

_FOLDS = 4
_MASKED_BELOW = 0.5  # the upper end of the share's interval; see docs/evidence-toy.md, "How much to mask"
_ALLOWED = "Give batches (mappings of names to tensors) in SFT form."


@dataclass(frozen=True)
class SharedGain:
    """How much lower theta* makes the loss, in nats a token.

    Attributes:
        clean (`float`): of clean rows, each at a theta* that was made of others.
        training (`float`): of training rows, the mean over these theta*.
        interval (`tuple`): confidence interval of `share`, a twentieth of it outside, by the rows of both (Fieller's,
            with Student's t). An end is infinite where too few clean rows were held out to tell that theta* helps.
    """

    clean: float
    training: float
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        """`training / clean`; NaN where theta* does not help with clean rows."""
        return self.training / self.clean if self.clean > 0 else float("nan")

    @property
    def rho(self) -> float:
        """The share of tokens to keep, for `AlphaTokenConfig.best(rho=...)`: (1 + share) / 2, from a half to three
        quarters; or 1.

        If a part p of the training tokens gains what clean tokens do, and the rest loses as much, `share` is
        p - (1 - p). 1 where `interval` reaches a half, so that less than a quarter of the tokens may lead elsewhere: a
        mask drops right tokens too, and where few are wrong it did harm. 1 also where theta* does not help with clean
        rows: then nothing tells what to drop.
        """
        if not self.clean > 0 or self.interval[1] >= _MASKED_BELOW:
            return 1.0
        return max((1 + self.share) / 2, 0.5)

    def __str__(self) -> str:
        if not self.clean > 0:
            return (
                f"theta* does not lower the loss of clean rows that it was not made of ({self.clean:+.3f} nats a "
                "token): values along this path would say nothing. Give more clean rows. Keep 1.00."
            )
        low, high = self.interval
        if math.isinf(low) and math.isinf(high):
            return (
                f"theta* gains {self.training:+.3f} nats a token in training rows and {self.clean:+.3f} in clean ones, "
                "which are too few, or too unlike each other, to tell the two apart. Give more clean rows. Keep 1.00."
            )
        return (
            f"theta* gains {self.training:+.3f} nats a token in training rows and {self.clean:+.3f} in clean ones: a "
            f"share of {self.share:.2f} (95 %: {low:.2f} to {high:.2f}). Near 1, training rows are like the clean "
            "ones, and there is little to mask; near 0 or below, at least half of their tokens lead elsewhere. "
            f"Keep {self.rho:.2f}."
        )


@undoing
def shared_gain(
    model: nn.Module,
    target: Iterable[Mapping[str, Any] | Batch] | Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]] | Mapping[str, Any],
    *,
    config: AlphaTokenConfig | None = None,
    progress: bool = True,
) -> SharedGain:
    """Ask before training whether training rows are like the clean ones, or full of tokens that lead elsewhere.

    Each quarter of the clean rows is held out once. theta* is made of the others (`make_path`, with the validation loss
    alone), and the mean of log p(theta*) - log p(theta) over response tokens, in nats, is taken of the rows held out
    and of training rows. Rate and steps are those that the first trial finds. Nothing of the model is changed. In
    distributed runs each process gives its share of both kinds of rows, and all get the same answer.

    Args:
        model (`nn.Module`): the model as training would begin.
        target (`Iterable`): batches of clean examples of the target task, in SFT form; at least two rows.
        batches (`Iterable`): batches of training rows, in SFT form; a sample is enough.
        config (`AlphaTokenConfig`, *optional*): what is scored, and `path_steps`, `path_rate`; by default a trial
            finds these two.
        progress (`bool`): show progress bars.

    Returns:
        `SharedGain`

    Raises:
        ValueError: there are no training rows, the clean rows are fewer than two, one of either has no response token,
            or a batch is of preference pairs.

    Example:
        >>> print(shared_gain(model, clean_batches, training_batches))
    """
    config = replace(config or AlphaTokenConfig(), estimator="path", stability_weight=0.0, path_holdout=0.0)
    device = find_scored(model, config.scored_layers, config.scope).device
    read = {
        name: [batch.to(device) for batch in map(read_batch, as_batches(given, name, _ALLOWED)) if batch.rows.any()]
        for name, given in (("target", target), ("batches", batches))
    }
    for name, some in read.items():
        if any(batch.pairs for batch in some):
            raise ValueError(f"{name} holds preference pairs. Give their chosen answers, in SFT form.")
        if not _any_rows(some, device):
            raise ValueError(
                f"{name} holds no response token (no label other than -100), or no batch at all, as a generator does "
                "that was used up. Give some rows with one."
            )
    read["target"] = [part for batch in read["target"] for part in batch.unpacked()]
    folds = [_apart(read["target"], fold) for fold in range(_FOLDS)]
    folds = [(made, held) for made, held in folds if _any_rows(made, device) and _any_rows(held, device)]
    if not folds:
        raise ValueError("Fewer than two rows of the target have a response token. Give more clean rows.")
    clean, training = [], []
    for made, held in folds:
        path = make_path(model, made, config=config, progress=progress)
        config = replace(config, path_steps=path.steps, path_rate=path.rate)
        with tqdm(total=len(held) + len(read["batches"]), desc="Gain", unit="batch", disable=not progress) as bar:
            clean.append(_gains(model, path, held, bar))
            training.append(_gains(model, path, read["batches"], bar))
    gains = torch.cat(clean), torch.stack(training).mean(0)
    means = [float(sums[:, 0].sum() / sums[:, 1].sum()) for sums in gains]
    return SharedGain(means[0], means[1], _interval(*gains))


def _apart(batches: Iterable[Batch], fold: int) -> tuple[list[Batch], list[Batch]]:
    """Batches without every fourth of the rows with a response token, and batches of these; `fold` says which."""
    kept, held, seen = [], [], 0
    for batch in batches:
        some = batch.rows.any(1).nonzero().flatten()
        out = (torch.arange(seen, seen + len(some), device=some.device) % _FOLDS) == fold
        seen += len(some)
        kept += [batch.of_rows(some[~out])] if bool((~out).any()) else []
        held += [batch.of_rows(some[out])] if bool(out.any()) else []
    return kept, held


def _any_rows(batches: Iterable[Batch], device: torch.device) -> bool:
    """Whether any process has a response token in these."""
    return in_any(any(bool(batch.rows.any()) for batch in batches), device)


def _gains(model: nn.Module, path: Path, batches: Iterable[Batch], bar: tqdm[Any]) -> torch.Tensor:
    """`(sequences, 2)` float64: of each the nats gained over its response tokens, and their number."""
    found, inner = [torch.zeros(0, 2, dtype=torch.float64)], unwrap(model)
    for batch in batches:
        with torch.no_grad(), without_noise(inner):
            before = token_logps(inner, batch)
        gained = (path.logps(inner, batch) - before).double()
        each = torch.stack([gained, batch.at_labels(batch.rows).double()]).flatten(1).cpu()
        numbers = batch.segments.flatten().cpu()
        found.append(torch.zeros(2, int(numbers.max()) + 1, dtype=each.dtype).index_add_(1, numbers, each).T)
        bar.update()
    rows = all_rows(torch.cat(found))
    return rows[rows[:, 1] > 0]


def _interval(clean: torch.Tensor, training: torch.Tensor) -> tuple[float, float]:
    """95 % of the ratio of the training rows' mean gain to the clean rows', by Fieller's theorem.

    In it are the ratios r at which training - r * clean may be 0, by Student's t: 1, where the difference may be 0. If
    the clean gain itself may be 0, there is no bound on one side, or on both.
    """
    (here, own), (there, other) = _mean(clean), _mean(training)
    squared = _student(min(len(clean), len(training)) - 1) ** 2
    # r is in the interval if least * r^2 - 2 * here * there * r + rest <= 0.
    least, rest = here**2 - squared * own, there**2 - squared * other
    apart = (there - here) ** 2 > squared * (own + other)
    if not (least > 0 or (least < 0 and apart)):
        return -math.inf, math.inf
    half = math.sqrt(max((here * there) ** 2 - least * rest, 0.0))
    low, high = sorted((here * there + sign * half) / least for sign in (-1, 1))
    if least > 0:
        return low, high
    return (-math.inf, low) if there < here else (high, math.inf)  # between the two, where 1 is, is none


def _mean(rows: torch.Tensor) -> tuple[float, float]:
    """Nats gained a token, and the variance of that, of rows that count by their tokens; infinite of one row."""
    count, (nats, tokens) = len(rows), rows.sum(0).tolist()
    mean = nats / tokens
    residuals = float((rows[:, 0] - mean * rows[:, 1]).square().sum())
    return mean, count / (count - 1) * residuals / tokens**2 if count > 1 else math.inf


def _student(freedom: int) -> float:
    """Student's t, of which a fortieth is above."""
    if freedom < 1:
        return math.inf
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2  # Cornish and Fisher


_FEW = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # of 1 to 7 degrees of freedom
