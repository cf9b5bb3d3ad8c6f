"""The gradient gate: token values computed and applied inside the ordinary backward pass, for any loss.

At the output of the last block (for the difference estimator, of the decoder) the gradient has one row per position,
and with a frozen head the row at t comes from token t + 1's loss alone. An identity there receives these rows in its
backward, values the tokens from them, zeroes the rows of low-value tokens and hands the rest down: what arrives at the
adapters is exactly the gradient of the masked loss, while the loss keeps its value.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .batches.batch import Batch
from .batches.read import read_batch
from .config import AlphaTokenConfig
from .directions.estimate import fisher_of_batches
from .directions.fisher import Fisher
from .directions.parts import Parts, check_target, directions
from .directions.target import Target, estimate_target, in_parts
from .estimators.difference import Difference
from .estimators.exact import Exact
from .estimators.ghost import Ghost
from .estimators.steps import Steps
from .estimators.table import estimator_of
from .estimators.values import NonFiniteRows
from .losses.kl import Penalty, check_kl_coef
from .models.modes import checkpointed, draws_noise, saved_tensors_hooked
from .models.sites import Scored, find_scored
from .models.structure import find_blocks, trained_behind
from .selection.thresholds import select
from .values import TokenValues
from .weights import alphatoken_weights


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, step: _Step) -> torch.Tensor:
        ctx.step = step
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.step.mask(rows), None


class _Step:
    """One batch on its way: from the forward that is captured to the backward that is masked."""

    def __init__(
        self,
        owner: AlphaToken,
        batch: Batch,
        estimator: Ghost | Exact | Difference,
        keep: torch.Tensor | None,
        mean_over_kept: bool,
    ) -> None:
        self.owner, self.batch, self.estimator = owner, batch, estimator
        self.keep, self.mean_over_kept = keep, mean_over_kept
        self.failed = False

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.requires_grad:
            raise ValueError(
                "The last block's output does not require grad, so no gradient will pass the gate. With reentrant "
                "checkpointing call model.enable_input_require_grads(); otherwise see that adapters are trainable."
            )
        return _Gate.apply(hidden, self)

    def mask(self, rows: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        if self.failed:
            raise RuntimeError("Valuing this batch failed in an earlier backward. Run its forward again.")
        if self.keep is None:
            started = time.perf_counter()
            try:
                self.failed = True
                self._value(rows)
                self.failed = False
            except NonFiniteRows:
                # An overflowing loss: what scales it (fp16) must see that.
                self.failed, self.keep = False, batch.rows
                self.owner.weights = self.owner.values = None
            finally:
                self.estimator.release()
                self.owner._seconds += self.estimator.seconds + time.perf_counter() - started
        assert self.keep is not None
        self.estimator.release()
        drop = F.pad(batch.rows & ~self.keep, (rows.shape[1] - batch.shape[1], 0))  # after any virtual tokens
        rows = rows.masked_fill(drop[..., None], 0)
        if self.mean_over_kept:
            rows = rows * (batch.rows.sum() / self.keep.sum().clamp(min=1))
        return rows

    def _value(self, rows: torch.Tensor) -> None:
        values = self.estimator.values(rows)
        weights = select(values, self.batch, self.owner.config)
        self.keep = weights.roll(-1, 1)
        self.owner._record(values, weights, self.batch)


class AlphaToken:
    """Masks low-value response tokens out of the gradient of any loss, one batch per context.

    Args:
        model (`nn.Module`): causal LM in training, with LoRA adapters or with linears that are trained themselves, or,
            for the difference estimator, with anything trained before its LM head. What follows the gate (the LM head;
            for the other estimators also the final norm) must be frozen.
        ref_model (`nn.Module` or `None`): the reference; `None` for the same network with adapters off, or with its
            adapter "ref".
        target (`Target` or SFT batches, *optional*): validation batches, from which the target gradient is estimated
            as `config.target_every`, `target_parts` and `target_decay` say; or a `Target`, used as it is. Without one,
            each batch is valued by its other sequences, at the cost of one more forward.
        fisher (`Fisher`, *optional*): from `estimate_fisher`. By default estimated at the first step from the target
            batches (or the first batch), with labels drawn from the reference's own predictions.
        config (`AlphaTokenConfig`, *optional*).
        optimizer (`torch.optim.Optimizer`, *optional*): the Adam that takes the steps: tokens are then valued by the
            step that it will take, whose scale differs by parameter, rather than by one along the gradient. Needs a
            target.

    Raises:
        ValueError: the model cannot be valued; the message says why and what to do.

    Attributes:
        weights (`torch.Tensor`): `(B, T)` float32 0/1 weights of the batch valued last, aligned with its labels.
        values (`TokenValues`): its values, in units of the loss that was sent backward (with an `optimizer`, up to a
            factor that depends on its state).
        kl (`torch.Tensor` or `None`): kl_coef * KL(reference || policy) of the last context's batch, a scalar with
            graph, once its forward has run; to be added to the loss.

    Example:
        >>> alphatoken = AlphaToken(model, target=validation_batches, fisher=fisher)
        >>> for batch in loader:
        ...     with alphatoken(batch):
        ...         loss = model(**batch).loss
        ...         loss.backward()
        ...     optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        *,
        target: Target | Iterable[Mapping[str, Any]] | None = None,
        fisher: Fisher | None = None,
        config: AlphaTokenConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        check_target(target, optimizer)
        self.model = model
        self.ref_model = ref_model
        self.config = config or AlphaTokenConfig()
        self.fisher = fisher
        self.optimizer = optimizer
        self.target = target if isinstance(target, Target) else None
        self.target_batches: list[Mapping[str, Any]] | None = None
        if target is not None and not isinstance(target, Target):
            self.target_batches = [target] if isinstance(target, Mapping) else list(target)
            if not self.target_batches:
                raise ValueError("target holds no batches. Give validation batches, a Target, or None.")
        self.weights: torch.Tensor | None = None
        self.values: TokenValues | None = None
        self._known: Scored | None = None
        self._state: tuple[list[int], torch.Tensor] | None = None
        self._age = 0
        self._target_parts: list[list[Batch]] = []
        self._turn = 0  # of the parts
        self._sums: dict[str, torch.Tensor | float] = {}
        self._steps = Steps(self.config.difference_rms)
        self._scaled: bool | None = None  # whether the optimizer scaled the last direction
        self._seconds = 0.0
        self._penalty: Penalty | None = None
        self._divergence: list[torch.Tensor | float] = [0.0, 0.0]  # summed KL, and the response tokens it is of
        if self.config.rho < 1.0:  # else nothing is read, and nothing refused
            self._target_parts = in_parts(self.target_batches or [], self.config.target_parts)
            scored = self._scored()
            at_decoder = self.config.estimator == "difference"
            behind = trained_behind(model, None if at_decoder else find_blocks(model))
            if behind:
                place = "decoder" if at_decoder else "last block"
                raise ValueError(
                    f"{behind[0]} is trained and lies behind the {place}, where the gate cannot mask its gradient "
                    f"({len(behind)} such parameters). Freeze them (if only adapters are to be trained, wrap the model "
                    "with peft.get_peft_model first), or mask the loss itself: sft_loss(model, batch, "
                    "alphatoken_weights(model, ref_model, batch))."
                )
            for part in (self.target, self._drift_fisher):
                if part is not None:
                    part.check(scored)
            if self._drift_fisher is not None:
                self._drift_fisher.check_base(model)

    @property
    def kl(self) -> torch.Tensor | None:
        return None if self._penalty is None else self._penalty.kl

    @property
    def _drift_fisher(self) -> Fisher | None:
        return self.fisher if self.config.stability_weight > 0 else None

    def _scored(self) -> Scored:
        scored = find_scored(self.model, self.config.scored_layers, self.config.estimator)
        if self._known is not None and self._known.sites == scored.sites:
            scored.value_rows = self._known.value_rows
        self._known = scored
        return scored

    @contextlib.contextmanager
    def __call__(
        self,
        batch: Mapping[str, Any] | Batch,
        *,
        mean_over_kept: bool = False,
        beta: float = 0.1,
        weights: torch.Tensor | None = None,
        kl_coef: float = 0.0,
        num_items_in_batch: int | torch.Tensor | None = None,
        ref_model: nn.Module | None = None,
    ) -> Iterator[AlphaToken]:
        """Value one batch: run the model's forward on it, with grad, inside; `backward` may also come later.

        Args:
            batch (`Mapping`): the batch that the model runs on, in any form `alphatoken_weights` takes.
            mean_over_kept (`bool`): scale the kept gradient by response tokens over kept tokens, which turns a mean
                over response tokens into Eq. 13's mean over kept ones.
            beta (`float`): of the DPO loss that values pairs where there is no target; with one, the loss itself does.
            weights (`torch.Tensor`, *optional*): `(B, T)`, aligned with the labels: keep the response tokens where it
                is not 0 (as from `random_weights` and the like) instead of valuing; nothing is estimated.
            kl_coef (`float`): weight of a KL to the reference over all response tokens, kept or not, that `kl` then
                holds. It is neither masked nor part of the values. Also with rho=1.0.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the summed KL is divided by; by default the
                batch's response tokens.
            ref_model (`nn.Module`, *optional*): the reference of the KL, by default the one of this object.

        Raises:
            RuntimeError: a second forward with grad runs inside.
            ValueError: the forward's or the weights' shape is not the batch's; or the model can no longer be valued.
        """
        check_kl_coef(kl_coef)
        if weights is not None and self.config.rho >= 1.0:
            raise ValueError("weights were given, but rho=1.0 switches the gate off. Make the AlphaToken with rho < 1.")
        self._penalty = penalty = None
        if kl_coef > 0:
            reference = self.ref_model if ref_model is None else ref_model
            options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "ref_model": reference}
            penalty = Penalty(self.model, read_batch(batch), kl_coef=kl_coef, **options)
        masking = self._masking(batch, mean_over_kept, beta, weights, penalty)
        with masking, contextlib.nullcontext() if penalty is None else penalty.watching():
            self._penalty = penalty
            try:
                yield self
            except BaseException:
                self._penalty = None  # nothing holds the graph of a step that failed
                raise
        if penalty is not None and penalty.total is not None:
            for i, figure in enumerate((penalty.total, penalty.batch.rows.sum())):
                self._divergence[i] = self._divergence[i] + figure

    @contextlib.contextmanager
    def _masking(
        self,
        batch: Mapping[str, Any] | Batch,
        mean_over_kept: bool,
        beta: float,
        weights: torch.Tensor | None,
        penalty: Penalty | None,
    ) -> Iterator[None]:
        """The gate around one forward; a penalty goes round it."""
        if self.config.rho >= 1.0 or not torch.is_grad_enabled():
            yield
            return
        started = time.perf_counter()
        read = read_batch(batch)
        scored = self._scored()
        keep = None
        parts: Parts = {}
        if weights is not None:
            if tuple(weights.shape) != read.shape:
                raise ValueError(
                    f"weights have shape {tuple(weights.shape)} and the labels {read.shape}; they must agree."
                )
            keep = (weights != 0).to(read.labels.device).roll(-1, 1) & read.rows
            self._record(None, read.at_labels(keep), read)
        elif self.target is None and self.target_batches is None:
            keep = read.rows
            if bool(read.rows.any()):
                self._ensure_fisher(scored, read)
                weights, values = alphatoken_weights(
                    self.model,
                    self.ref_model,
                    read,
                    fisher=self._drift_fisher,
                    config=self.config,
                    beta=beta,
                    return_values=True,
                )
                self._record(values, weights, read)
                keep = weights.bool().roll(-1, 1)
        else:
            self._ensure_fisher(scored, read)
            self._refresh(scored)
            parts = directions(scored, self.target, self._drift_fisher, self.ref_model, self.optimizer)
            scaled = self.optimizer is not None and bool(self.optimizer.state)
            if scaled and self._scaled is False:
                self._steps.length.clear()  # those of another direction
            self._scaled = scaled
        blocks = scored.blocks if self.config.estimator != "difference" else []
        once = saved_tensors_hooked() or any([checkpointed(block) or draws_noise(block) for block in blocks])
        in_graph = keep is None and not once  # else the graph is not walked a second time, blocks are replayed
        estimator = estimator_of(
            self.model, scored, read, self.config, parts, self._steps, apart=not parts, in_graph=in_graph
        )
        del parts  # the estimator lets go of them as soon as it can
        step = _Step(self, read, estimator, keep, mean_over_kept)
        self._seconds += time.perf_counter() - started
        gate = step.gate if penalty is None else penalty.around(step.gate)
        with estimator.watching(gate, training=True):
            yield
        if not estimator.seen:
            warnings.warn(
                "No forward of the model with grad ran in this AlphaToken context, so nothing was masked. Run the "
                "forward inside it, on the model that the AlphaToken was made for.",
                stacklevel=5,
            )

    def metrics(self) -> dict[str, float]:
        """Figures over the response tokens of all batches valued since the last call: `kept` (the share), the means of
        `total` and, for the ghost estimator, of its four terms, in units of the loss; `target_age` in optimizer steps;
        for the difference estimator `difference_rms`, the effect of the last nudge; with `kl_coef`, `kl`, the mean KL
        to the reference in nats; and the `seconds` spent valuing, target estimates included (on CUDA, which runs on its
        own, only what the host waited for)."""
        (divergence, compared), self._divergence = self._divergence, [0.0, 0.0]
        kl = {"kl": float(divergence) / float(compared)} if compared else {}
        if self.config.rho >= 1.0:
            return {"kept": 1.0, **kl}
        sums, self._sums = self._sums, {}
        seconds, self._seconds = self._seconds, 0.0
        tokens = max(float(sums.pop("tokens", 0.0)), 1.0)
        figures = {name: float(total) / tokens for name, total in sums.items()}
        if "total" in sums or "kept" not in sums:  # no target has to do with weights that were given
            figures["target_age"] = float(self._age)
        if "total" in self._steps.effect:
            figures["difference_rms"] = float(self._steps.effect["total"])
        return {**figures, **kl, "seconds": seconds}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for the masks of an uninterrupted one: the target that was estimated from batches,
        if it was by now, its age in optimizer steps, with the one just taken, and the difference's step lengths."""
        steps = self._steps.state_dict()
        if self.target_batches is None or self.target is None:
            return {"target": None, "age": 0, "turn": 0, "steps": steps}
        if self._moved(self._scored()):
            self._age += 1
        return {"target": self.target, "age": self._age, "turn": self._turn, "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, once the model's parameters are those it had then."""
        scored = self._scored()
        if state["target"] is not None:
            state["target"].check(scored)
            self.target = state["target"]
        self._age, self._turn = state["age"], state["turn"]
        self._steps.load_state_dict({name: tensor.to(scored.device) for name, tensor in state["steps"].items()})
        self._state = None

    def _record(self, values: TokenValues | None, weights: torch.Tensor, batch: Batch) -> None:
        self.values, self.weights = values, weights.float()
        terms = ("total", "direct_target", "causal_target", "direct_drift", "causal_drift")
        figures = {"tokens": batch.rows, "kept": weights} | {name: getattr(values, name, None) for name in terms}
        for name, figure in figures.items():
            if figure is not None:
                self._sums[name] = self._sums.get(name, 0.0) + figure.sum()

    def _ensure_fisher(self, scored: Scored, batch: Batch) -> None:
        if self.config.stability_weight == 0:
            return
        if self.fisher is None:
            batches = [batch.chosen()]
            if self.target_batches is not None:
                batches = [read_batch(b).chosen().to(scored.device) for b in self.target_batches]
            elif not bool(batch.rows.any()):
                return  # nothing to value here, nor to estimate from
            dense = self.config.fisher == "dense"
            self.fisher = fisher_of_batches(self.model, scored, self.ref_model, batches, dense=dense)
        self.fisher = self.fisher.to(scored.device)  # one that was loaded; else each step would copy it, and wait

    def _refresh(self, scored: Scored) -> None:
        """Count optimizer steps, and estimate the target anew when it is old enough."""
        if self._moved(scored):
            self._age += 1
        if self.target_batches is None or (self.target is not None and self._age < self.config.target_every):
            return
        self._age = 0
        decay = self.config.target_decay
        if self.target is None or decay is None:
            self.target = estimate_target(self.model, scored, self.target_batches)
            return
        held = self.target
        if not self._turn:  # the first, from all of it, is worth as much as one of those that follow
            held = Target(held.gradients, held.tokens / self.config.target_parts)  # on every process alike
        part = self._target_parts[self._turn % len(self._target_parts)] if self._target_parts else []
        self._turn += 1
        self.target = held.averaged(estimate_target(self.model, scored, part), decay)

    def _moved(self, scored: Scored) -> bool:
        """Whether the scored adapters have changed since the last call.

        Optimizers that write through raw pointers (bitsandbytes) do not move version counters; then the bits tell.
        """
        parameters = [p.detach() for p in scored.parameters.values()]
        versions = [p._version for p in parameters]
        if self._state is not None and versions != self._state[0]:
            self._state = (versions, _fingerprint(parameters))
            return True
        fingerprint = _fingerprint(parameters)
        before, self._state = self._state, (versions, fingerprint)
        return before is not None and not torch.equal(before[1], fingerprint)


def _fingerprint(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Sums of the bits, of some tensors at a time: exact, in any precision."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = []
    for start in range(0, len(parameters), 32):
        alike: dict[Any, list[torch.Tensor]] = {}
        for p in parameters[start : start + 32]:
            alike.setdefault((p.device, p.dtype), []).append(p.contiguous().view(bits[p.element_size()]).flatten())
        sums += [torch.cat(some).sum() for some in alike.values()]
    return torch.stack([some.to(sums[0].device) for some in sums])
