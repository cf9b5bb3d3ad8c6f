"""The path to theta*: a few Adam steps down the validation loss and the drift.

They begin where the adapter is, and lower J(theta) = validation loss + lambda * 0.5 * sum F dW^2. The other estimators
value tokens along its gradient D. The steps are taken on copies of the scored parameters, which take their place while
the model runs. The model's own are never written to.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..losses.preference import with_reference
from ..models.changes import undoing
from ..models.modes import autocast_without_cache, refuse_inference_mode
from ..models.sites import Scored, find_scored
from ..models.structure import unwrap
from .drift import refuse_other_base
from .estimate import fisher_of_batches
from .fisher import Fisher, base_of
from .path import Path
from .walk import Goal, Walk, mildest, unpacked


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
    share was lowest. Of rates between whose losses those few rows cannot tell, the mildest is taken
    (`walk.mildest`). Parameters, gradients, modes and the random state are left as they were, also when an error is
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


HELD_OUT = 0.25  # share of the rows by which rate and number of steps are chosen
_RATES, _PAIR_RATES = (3e-3, 1e-3, 3e-4), (1e-3, 3e-4, 1e-4)  # tried; the first if no row can be held out
_STEPS, _PAIR_STEPS = 16, 24  # taken at most


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
    if drifting is not None and ref_model is not None:
        refuse_other_base(model, scored, ref_model)
    batches = [with_reference(inner, ref_model, batch) for batch in unpacked(batches)]
    goal = Goal(inner, scored, batches, config, drifting, ref_model, config.path_holdout)
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
        searched = Goal(inner, scored, batches, config, drifting, ref_model, HELD_OUT)
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
        keep = "" if again else "lowest"
        walks = [searched.walk(steps or most, each, bar, keep=keep) for each in rates[:tries]]
        to_the_end = bool(steps) and again  # else it may end before, where the loss is lowest
        best = mildest(walks, to_the_end=to_the_end) if walks else Walk(rates[0])
        if walks:
            searched.tell_if_useless(best.losses[-1] if to_the_end else min(best.losses))
        if again:
            best = goal.walk(steps or best.turn or most, best.rate, bar, keep="end")
    found = best.end if again else best.lowest
    if not found or not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise FloatingPointError(
            f"theta* is not finite after {best.taken} steps at a rate of {best.rate}. Lower path_rate, and look "
            "at the validation batches and the Fisher."
        )
    return Path(found, best.taken if again else best.turn, base_of(inner), best.rate)
