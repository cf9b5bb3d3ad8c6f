"""Where a run's directions come from: the target, estimated anew as the model moves, and the Fisher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..models.processes import in_any
from ..models.reference import refuse_itself
from ..models.sites import Scored
from ..models.start import Start, adopt_start, resume_start, see_start, start_of
from ..models.tensors import fingerprint
from .drift import refuse_other_base
from .estimate import fisher_of_batches
from .fisher import Fisher
from .parts import Parts, directions
from .path import Path
from .target import Target, estimate_target, in_parts

_ALLOWED = "Give validation batches (mappings of names to tensors), a Target, or None."


class Source:
    """Target, Fisher and optimizer of a run, and the schedule by which the target is estimated anew.

    Args:
        target (`Target`, SFT batches or `None`): a `Target`, used as it is, or batches to estimate it from.
        fisher (`Fisher`, *optional*): by default estimated at the first step, from the target batches or, without
            them, from the first batch.
        optimizer (`torch.optim.Optimizer`, *optional*): the Adam whose steps are valued.
        path (`Path` or `str`, *optional*): theta*, or the name of an adapter of the model that holds it.

    Attributes:
        drifts (`bool`): whether the drift is a direction; by default if its weight is above 0.
        estimated (`bool`): the Fisher was estimated here.
        age (`int`): age of `target`, or of the path, in optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None,
        *,
        target: Target | Iterable[Mapping[str, Any] | Batch] | None,
        fisher: Fisher | None,
        config: AlphaTokenConfig,
        optimizer: torch.optim.Optimizer | None = None,
        path: Path | str | None = None,
    ) -> None:
        _check_kind("model", model, nn.Module, "Load it first, with AutoModelForCausalLM.from_pretrained.")
        _check_kind("fisher", fisher, Fisher, "Read a saved one with Fisher.load.")
        _check_kind("path", path, (Path, str), "Read a saved one with alphatoken_loss.Path.load.")
        if target is None and optimizer is not None:
            raise ValueError(
                "An optimizer was given without a target. The other sequences of a batch, which stand in for one, are "
                "not preconditioned: pass target, or no optimizer."
            )
        self.model, self.ref_model, self.config = model, ref_model, config
        see_start(model)  # what the model is now, before the first step
        self._fisher: Fisher | None = None
        self.fisher, self.optimizer = fisher, optimizer
        self.target = target if isinstance(target, Target) else None
        self.given = self.target
        self.path = Path.of_adapter(model, path, config=config) if isinstance(path, str) else path
        self.batches: list[Mapping[str, Any] | Batch] | None = None
        if target is not None and not isinstance(target, Target):
            self.batches = as_batches(target, "target", _ALLOWED)
            if not self.batches:
                raise ValueError(f"target holds no batches. {_ALLOWED}")
        self.drifts = config.stability_weight > 0
        self.age = 0
        self.estimated = False
        self._slices: list[list[Batch]] = []
        self._turn = 0  # of the slices
        self._most: int | None = None  # rows of a batch of them
        self.moves = Moves()
        self._fitting: Scored | None = None  # what the estimates were last seen to fit

    @property
    def fisher(self) -> Fisher | None:
        return self._fisher

    @fisher.setter
    def fisher(self, fisher: Fisher | None) -> None:
        if fisher is not None and fisher is not self._fisher:
            adopt_start(self.model, fisher.start)
        self._fisher = fisher

    @property
    def validates(self) -> bool:
        """Whether there is a target; else the sequences of a batch are valued against each other."""
        return self.target is not None or self.batches is not None

    @property
    def needs_fisher(self) -> bool:
        """Whether a Fisher will be needed, and there is none."""
        stays = self.path is not None and self.config.path_every is None
        return self.fisher is None and self.drifts and self.validates and not stays

    @property
    def drift_fisher(self) -> Fisher | None:
        """The Fisher if the drift counts, else None."""
        return self.fisher if self.drifts else None

    def check(self, scored: Scored) -> None:
        """Read the target's batches, and check that a given target and Fisher fit the model.

        Raises:
            ValueError: a batch can't be read, or one was made for other parameters or (a Fisher) another base; or the
                reference is the model itself.
        """
        if self.ref_model is not None:
            refuse_itself(self.model, self.ref_model)
            if self.drift_fisher is not None or self.needs_fisher:
                refuse_other_base(self.model, scored, self.ref_model)
        try:
            self._slices = in_parts(self.batches or [], self.config.target_parts)
        except (TypeError, ValueError) as error:
            error.args = (f"A batch of the target: {error}",)
            raise
        for part in (self.target, self.drift_fisher):
            if part is not None:
                part.check(scored)
        if self.drift_fisher is not None:
            self.drift_fisher.check_base(self.model)

    def limit_rows(self, rows: int) -> None:
        """Divide the target's batches into smaller ones, of at most `rows` rows (pairs): memory ran out."""
        if rows == self._most:
            return
        self._most = rows
        self.batches = self.batches and _at_most(map(read_batch, self.batches), rows)
        self._slices = [_at_most(part, rows) for part in self._slices]

    def directions(self, scored: Scored, batch: Batch) -> Parts:
        """The directions for the next forward. Before, a target that is old enough is estimated anew."""
        self.ensure_fisher(scored, batch)
        self._refresh(scored)
        return directions(scored, self.target, self.drift_fisher, self.ref_model, self.optimizer)

    def ensure_fisher(self, scored: Scored, batch: Batch) -> None:
        """Estimate the Fisher if it is needed and none was given."""
        self._drop_unfit(scored)
        if not self.drifts:
            return
        if self.fisher is None:
            batches = [batch.chosen()]
            if self.batches is not None:
                batches = [part.chosen() for part in self.target_batches(scored)]
            elif not in_any(bool(batch.rows.any()), scored.device):
                return  # nothing to value in any process, and nothing to estimate from
            dense = self.config.fisher == "dense"
            self.fisher = fisher_of_batches(self.model, scored, self.ref_model, batches, dense=dense)
            self.estimated = True
        self.fisher = self.fisher.to(scored.device)  # else each step would copy a loaded one, and wait

    def target_batches(self, scored: Scored) -> list[Batch]:
        """The target's batches, read, on the device of the scored parameters."""
        return [read_batch(batch).to(scored.device) for batch in self.batches or []]

    def count(self, scored: Scored) -> None:
        """Count the optimizer step that was taken since the last call, if any."""
        if self.moves.since(scored):
            self.age += 1

    def state_dict(self, scored: Scored | None) -> dict[str, Any]:
        """The target's gradients, if it was estimated from batches, and the age of it or of the path, after the last
        step; where training started, and the Fisher that was estimated here: tensors and numbers, which `torch.load`
        takes."""
        if scored is not None:  # else nothing is valued
            self.count(scored)
        held = self.target if self.batches is not None and self.target is not None else Target({}, 0)
        state = {"target": dict(held.gradients), "tokens": held.tokens, "age": self.age, "turn": self._turn}
        return {"estimator": self.config.estimator, **state, **_beginning(self)}

    def load_state_dict(self, state: Mapping[str, Any], scored: Scored | None) -> None:
        _check_state(state, self.config.estimator)
        _begin_again(self, state, scored)
        if state["target"] and scored is not None:
            target = Target(state["target"], state["tokens"])
            target.check(scored)
            here = {name: target.gradients[name].to(p.device) for name, p in scored.parameters.items()}
            self.target = Target(here, target.tokens)
        self.age, self._turn = state["age"], state["turn"]
        self.moves, self._fitting = Moves(), None

    def drop_bad_target(self) -> bool:
        """Drop an estimated target if it is not finite, and return whether. The next is made from all batches."""
        if self.batches is None or self.target is None:
            return False
        if all(bool(gradient.isfinite().all()) for gradient in self.target.gradients.values()):
            return False
        self.target, self.age, self._turn = None, 0, 0
        return True

    def _refresh(self, scored: Scored) -> None:
        """Count optimizer steps, and estimate the target anew when it is old enough."""
        self.count(scored)
        if self.batches is None or (self.target is not None and self.age < self.config.target_every):
            return
        decay = self.config.target_decay
        if self.target is None or decay is None:
            self.target = estimate_target(self.model, scored, self.batches)
        else:
            held = self.target
            if not self._turn:  # the first is from all parts, but counts as a later one, from one part
                held = Target(held.gradients, held.tokens / self.config.target_parts)  # on every process alike
            part = self._slices[self._turn % len(self._slices)] if self._slices else []
            self.target = held.averaged(estimate_target(self.model, scored, part), decay)
            self._turn += 1
        self.age = 0  # not before: if estimating fails, the next try makes it

    def _drop_unfit(self, scored: Scored) -> None:
        """Drop what was estimated here of other parameters: adapters were switched, frozen or trained since."""
        if scored is self._fitting:
            return
        if self.batches is not None and self.target is not None and not _fits(self.target, scored):
            self.target, self._turn = None, 0
        if self.estimated and self._fisher is not None and not _fits(self._fisher, scored):
            self._fisher, self.estimated = None, False
        self._fitting = scored


class Moves:
    """Whether the scored parameters have changed since they were last looked at.

    Optimizers that write through raw pointers (bitsandbytes) leave version counters alone; then the bits tell.
    """

    def __init__(self) -> None:
        self._seen: tuple[list[int], torch.Tensor] | None = None

    def since(self, scored: Scored) -> bool:
        parameters = [p.detach() for p in scored.parameters.values()]
        before, self._seen = self._seen, ([p._version for p in parameters], fingerprint(parameters))
        return before is not None and (before[0] != self._seen[0] or not torch.equal(before[1], self._seen[1]))


def _fits(made: Target | Fisher, scored: Scored) -> bool:
    try:
        made.check(scored)
    except ValueError:
        return False
    return not isinstance(made, Target) or made.gradients.keys() == scored.parameters.keys()


def _beginning(source: Source) -> dict[str, Any]:
    """Of a state, what tells where drift and KL are measured from: the start, and the Fisher that was estimated."""
    of_fisher = {"fisher": source.fisher.state_dict()} if source.estimated and source.fisher is not None else {}
    return {"start": vars(start_of(source.model)), **of_fisher}


def _begin_again(source: Source, state: Mapping[str, Any], scored: Scored | None) -> None:
    if "start" in state:
        resume_start(source.model, Start(**state["start"]))
    if "fisher" in state and scored is not None and (source.fisher is None or source.estimated):
        fisher = Fisher(**state["fisher"], start=start_of(source.model))
        fisher.check(scored)
        source.fisher, source.estimated = fisher.to(scored.device), True


def _check_state(state: Mapping[str, Any], estimator: str) -> None:
    missing = {"target", "age", "turn"} - set(state)
    if missing:
        raise ValueError(f"The state has no {sorted(missing)[0]!r}. Give what state_dict() of an AlphaToken gave.")
    came = state.get("estimator", estimator)
    if came != estimator:
        raise ValueError(f'The state is of estimator="{came}", and this one is "{estimator}". Give the same settings.')


def _check_kind(name: str, value: object, kinds: Any, how: str) -> None:
    if value is not None and not isinstance(value, kinds):
        raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__name__}. {how}")


def _at_most(batches: Iterable[Batch], rows: int) -> list[Any]:
    found: list[Batch] = []
    for batch in itertools.chain.from_iterable(batch.unpacked(rows) for batch in batches):
        places = range(0, batch.size, rows)
        found += [batch] if batch.size <= rows else [batch.part(slice(i, i + rows)) for i in places]
    return found


def as_batches(given: Any, name: str, allowed: str) -> list[Mapping[str, Any] | Batch]:
    """The batches that were given under a name, whatever they were given in.

    Raises:
        TypeError: it is something else; the message says what is `allowed`.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is a {type(given).__name__}. {allowed}")
    batches = [given] if isinstance(given, Mapping | Batch) else list(given)
    for batch in batches:
        if not isinstance(batch, Mapping | Batch):
            raise TypeError(f"{name} holds a {type(batch).__name__}. {allowed}")
    return batches
