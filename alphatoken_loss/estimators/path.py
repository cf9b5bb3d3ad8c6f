"""The path estimator: by how much a token's loss changes along the path to theta*.

The other estimators multiply a token's gradient with D, the gradient of J(theta) = validation loss + lambda * drift.
Here some steps down J lead to theta* (directions/follow.py), and the value of a token is the integral of its gradient
along this path. That is a difference of losses, and needs no gradient:

    value(t) = l_t(theta) - l_t(theta*),    l_t = -log p(y_t | y_<t), in nats;

for a rejected answer of a pair its negative. With lambda = 0 it is the excess loss of RHO-1 (arXiv 2404.07965). It
takes one more forward without grad (none if the batch has the log-probabilities at theta*). The values are known as
soon as the forward has run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..directions.follow import follow
from ..directions.parts import Parts
from ..directions.path import Path
from ..directions.source import Source
from ..losses.compare import Compared, compare, rows_at
from ..losses.forward import Forward, outputs_of
from ..losses.head import check_head, head_of
from ..losses.logps import logps_of_rows
from ..models.decoder import Call, DecoderForward, last_hidden
from ..models.modes import autocast_without_cache, without_noise
from ..models.reference import reference_mode
from ..models.sites import Scored
from ..models.structure import unwrap
from ..models.tensors import accumulation_dtype, fingerprint
from ..values import TokenValues
from .base import Estimator, Memory, Task, check_weights_finite

_PART = "path"
_APPLIED = "applied"  # in the state: whether training has begun at theta*
_MADE = ("steps", "base", "rate")  # there too: the path's other fields
COLUMN = "path_logps"  # of a batch: the labels' log-probabilities at theta*, (B, T)


class PathMemory(Memory):
    """Keeps theta*, which is made when it is first needed, and again every `path_every` steps."""

    def __init__(self, config: AlphaTokenConfig) -> None:
        super().__init__(config)
        self._known: tuple[Path, tuple[str, ...]] | None = None  # the one that was checked last, and what it moved
        self._whole: Scored | None = None  # what was last seen to be all that is trained
        self._applied = False
        self._stays = self._left = False  # training that begins at theta* is still there, or is so no more
        self.kl = config.path_kl
        # theta* is then where training begins, or what a KL holds it to: values would cost a forward.
        self.keeps_all = config.rho >= 1.0 and (not config.path_kl or config.path_from == "reference")

    def check(self, source: Source) -> None:
        if source.optimizer is not None:
            raise ValueError(
                'An optimizer was given, but estimator="path" values tokens by where the path ends, not by a step. '
                "Give none (precondition=False)."
            )
        if source.path is None and source.given is not None:
            raise ValueError(
                'target is a Target, one gradient, but estimator="path" trains theta* on validation examples. Give '
                "target their batches, or path, made with make_path(model, batches)."
            )
        needing = [f"{name}={value}" for name in ("path_kl", "path_start") if (value := getattr(self.config, name))]
        if needing and source.path is None and source.batches is None:
            raise ValueError(
                f"{needing[0]} needs theta*, but there are neither target batches nor a path. Give target validation "
                "batches (clean examples of the target task), or path, made with make_path(model, batches)."
            )
        if self.config.path_every is not None and source.batches is None:
            raise ValueError(
                f"path_every is {self.config.path_every}, but there are no target batches to go on with. Give target "
                "validation batches, or set path_every=None."
            )

    def prepare(self, source: Source, scored: Scored, batch: Batch) -> Parts:
        source.count(scored)
        self._stays = self._is_there(source, scored)
        if COLUMN in batch.columns:
            check_column(self.config, source.path)
            if self._whole is not scored:
                check_whole(source.model, scored)
                self._whole = scored
            # Where theta is theta* all values are 0; the column, of another batch's rounding, would make noise of them.
            if not self._stays:
                return {}
        check_head(source.model, batch)
        return self._path(source, scored, batch)

    def _path(self, source: Source, scored: Scored, batch: Batch) -> Parts:
        every = self.config.path_every
        if source.path is None:
            source.path = self._follow(source, scored, batch)
        elif every is not None and source.age >= every:
            steps, rate = self.config.path_renewal_steps, self.config.path_renewal_rate
            source.path = self._follow(source, scored, batch, path_steps=steps, path_rate=rate)
        names = tuple(scored.parameters)
        if self._known is None or self._known[0] is not source.path or self._known[1] != names:
            source.path = source.path.to(scored.device)
            source.path.check(scored)
            source.path.check_base(source.model)
            self._known = source.path, names
        return {_PART: source.path.parameters}

    def begin(self, source: Source, scored: Scored, batch: Batch, *, needed: bool) -> Parts:
        parts = super().begin(source, scored, batch, needed=needed)
        if self.config.path_start and not self._applied:  # whatever is masked
            self._path(source, scored, batch)
            assert source.path is not None
            source.path.apply(source.model)
            source.moves.since(scored)  # not a step of the optimizer
            self._applied = True
        return parts

    def _is_there(self, source: Source, scored: Scored) -> bool:
        """Whether training that begins at theta* is still there: after a step too, at a learning rate of 0."""
        if not self.config.path_start or self._left:
            return False
        if source.age > 0 and source.path is not None:
            there, own = source.path.parameters, scored.parameters
            self._left = there.keys() != own.keys() or not torch.equal(
                fingerprint([p.detach() for p in own.values()]), fingerprint([there[n].to(p) for n, p in own.items()])
            )
        return not self._left

    def early(self, source: Source) -> bool:
        # At theta* itself values are 0 to the bit only if one head makes both log-probabilities.
        return self.kl > 0 or self._stays

    def state_dict(self, source: Source) -> dict[str, torch.Tensor]:
        """theta*. A resumed run cannot make it again: the path began where the adapter was then."""
        if source.path is None:
            return {}
        there = {f"{_PART}.{name}": tensor for name, tensor in source.path.parameters.items()}
        made = {name: torch.tensor(getattr(source.path, name), dtype=torch.float64) for name in _MADE}
        return {**there, **made, _APPLIED: torch.tensor(self._applied)}

    def load_state_dict(self, source: Source, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._applied = bool(state.get(_APPLIED, bool(state)))
        start = f"{_PART}."
        there = {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
        if there:
            made: dict[str, Any] = {name: state[name].tolist() for name in _MADE if name in state}  # or of before
            source.path = Path(there, int(made.get("steps", 0)), tuple(made.get("base", ())), made.get("rate", 0.0))

    def _follow(self, source: Source, scored: Scored, batch: Batch, **changes: Any) -> Path:
        if source.batches is None:
            raise ValueError(
                'estimator="path" was given neither a target nor a path, and the batch brings no path_logps. Give '
                "target validation batches, or path, made with make_path(model, batches)."
            )
        source.ensure_fisher(scored, batch)
        batches, config = source.target_batches(scored), replace(self.config, **changes)
        path = follow(source.model, scored, batches, source.drift_fisher, ref_model=source.ref_model, config=config)
        source.age = 0  # not before: if making it fails, the next try makes it
        return path


def check_column(config: AlphaTokenConfig, path: Path | None) -> None:
    """See that theta*'s log-probabilities of the labels are all of it that the settings need.

    Raises:
        ValueError: they are not.
    """
    needing = ["path_kl", "path_every", *(["path_start"] if path is None else [])]
    needs = [f"{name}={getattr(config, name)}" for name in needing if getattr(config, name)]
    if needs:
        raise ValueError(
            f"The data bring path_logps, but {needs[0]} needs theta* itself, of which these are only the labels' "
            "log-probabilities. Leave the column out, or set that to its default."
        )


def check_whole(model: nn.Module, scored: Scored) -> None:
    """See that log-probabilities at theta* can be computed before training: it holds all that is trained.

    Raises:
        ValueError: it does not.
    """
    beyond = [n for n, p in unwrap(model).named_parameters() if p.requires_grad and n not in scored.parameters]
    if beyond:
        raise ValueError(
            f"path_logps are computed once, but {beyond[0]} is trained and no part of theta* (num_layers leaves it "
            "out), so that they change as it does. Set num_layers=None, or leave the column out "
            "(precompute_path_log_probs=False)."
        )


class AlongPath(Estimator):
    """Values one batch by its own forward and one at theta* (see the module's docstring)."""

    scope = "anywhere"
    gate = "decoder"
    memory = PathMemory
    in_forward = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.batch, self.there = task.batch, task.parts.get(_PART)
        if not task.training:
            check_head(task.model, task.batch)
        self.forward = DecoderForward(task.model, task.batch, task.scored.parameters, training=task.training)
        self.found: Compared | None = None
        # (N,) response rows, and the log-probabilities of their labels: at theta*, and where values begin.
        self.index = self.wanted = self.origin = torch.empty(0)
        self._own: Forward | None = None  # what `origin` is still to be made from

    @property
    def seen(self) -> bool:
        return self.forward.seen

    @property
    def compared(self) -> Compared | None:
        return self.found

    def release(self) -> None:
        self.there = self._own = None

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Run a forward at theta* before the watched one, so that the graph of the latter is not held during it."""
        ahead: list[torch.Tensor] = []

        def go_ahead(call: Call) -> None:
            started = time.perf_counter()
            if self.there is not None:
                still = self.task.config.path_from == "reference"  # dropout would change the sign of values
                with without_noise(self.task.model) if still else contextlib.nullcontext():
                    ahead.append(self.forward.again(call, self.there))
            self.seconds += time.perf_counter() - started

        def leave(call: Call, hidden: torch.Tensor) -> torch.Tensor:
            if not self.task.training:
                go_ahead(call)
            started = time.perf_counter()
            self._keep(hidden.detach(), *ahead)
            ahead.clear()
            self.seconds += time.perf_counter() - started
            return on_hidden(hidden)

        def end(output: Any, kwargs: Mapping[str, Any]) -> None:
            started = time.perf_counter()
            if self._own is not None:
                self._own.take(output, kwargs)
                self._begin_at_own()
            self.seconds += time.perf_counter() - started

        late = self.task.training and not self.task.early
        with self.forward.watching(leave, on_call=go_ahead if self.task.training else None):
            with outputs_of(self.task.model, end) if late else contextlib.nullcontext():
                yield

    def _keep(self, hidden: torch.Tensor, ahead: torch.Tensor | None = None) -> None:
        """Keep what values and KL are made of; `ahead` is the hidden state at theta*."""
        task, batch, length = self.task, self.batch, self.batch.shape[1]
        index, labels = batch.predicting
        self.index = index
        if ahead is None:
            self.wanted = batch.columns[COLUMN].roll(-1, 1).flatten()[index].to(accumulation_dtype(hidden))
        elif task.training and task.kl_over is not None:
            own = rows_at(hidden, index, length)
            self.found = compare(task.model, own, rows_at(ahead, index, length), index, labels, over=task.kl_over)
            self.wanted = self.found.wanted_logps
        else:
            self.wanted = self._logps(rows_at(ahead, index, length), labels)
        if not task.valued:
            return
        if task.config.path_from == "reference":
            self.origin = self._reference_logps(index, labels)
        elif self.found is not None:
            self.origin = self.found.logps
        elif task.early or not task.training:
            self.origin = self._logps(rows_at(hidden, index, length), labels)
        else:
            self._own = Forward(unwrap(task.model), batch, hidden)

    def _logps(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(N,)` log-probabilities of labels, by the head as it is without noise."""
        with without_noise(head_of(self.task.model)), autocast_without_cache(rows.device.type):
            return logps_of_rows(self.task.model, rows, labels)

    def _begin_at_own(self) -> None:
        """Values begin where this forward is: with its own logits where there are some, so that no head runs again."""
        assert self._own is not None
        forward, self._own = self._own, None
        self.origin = forward.logps.roll(-1, 1).flatten()[self.index]
        forward.release()

    def _reference_logps(self, index: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(N,)` log-probabilities of the labels under the reference.

        If pairs are kept whole, only their sums count: sums that are known (in the batch, or by `dpo_loss`) are then
        spread evenly over the tokens.
        """
        batch, ref_model = self.batch, self.task.ref_model
        if batch.ref_logps is not None and self.task.config.threshold_scope == "pair":
            row = index // batch.shape[1]
            return (torch.cat(batch.ref_logps).to(index.device) / batch.rows.sum(1).clamp(min=1))[row]
        model = self.task.model
        with torch.no_grad(), reference_mode(model, ref_model) as reference, without_noise(reference):
            with self.forward.aside():
                rows = rows_at(last_hidden(reference, batch), index, batch.shape[1])
            return logps_of_rows(reference, rows, labels)

    def forward_values(self) -> TokenValues:
        if self._own is not None:  # the loss ran the head itself
            self._begin_at_own()
        gained = self.wanted - self.origin.to(self.wanted.device)
        if not gained.isfinite().all():
            self._blame()
        rows = torch.zeros(self.batch.labels.numel(), dtype=gained.dtype, device=self.index.device)
        values = rows.index_copy_(0, self.index, gained.to(rows.device)).view(self.batch.shape)
        if self.batch.pairs:
            values[self.batch.shape[0] // 2 :].neg_()
        return TokenValues(self.batch.at_labels(values))

    def values(self, rows: torch.Tensor) -> TokenValues:
        """The gradient is not used."""
        return self.forward_values()

    def _blame(self) -> None:
        """Raise an error that names what makes values not finite."""
        check_weights_finite(self.task.scored)
        if not self.origin.isfinite().all():  # then those at theta* tell nothing
            raise FloatingPointError(
                "Log-probabilities of the batch are not finite: the hidden state overflows. Use bf16 instead of "
                "float16, or float32."
            )
        if COLUMN in self.batch.columns:
            raise FloatingPointError("path_logps is not finite at a response token. Make the column again.")
        raise FloatingPointError(
            "Log-probabilities at theta* are not finite. Lower path_rate, or use bf16 instead of float16."
        )
