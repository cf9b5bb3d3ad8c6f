"""The gradient gate: token weights applied inside the ordinary backward pass, for any loss.

At the output of the last block (for the difference and path estimators, of the decoder) the gradient has one row per
position. With a frozen head, the row at t comes from the loss of token t + 1 alone. The gate is an identity at this
place. Its backward receives the rows, values the tokens by them, sets the rows of low-value tokens to zero, and hands
the rest down. So exactly the gradient of the masked loss arrives at the adapters, while the loss keeps its value.
Weights that come from elsewhere, of any size, multiply the rows in the same way; then nothing is valued.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig, read_config
from ..directions.fisher import Fisher
from ..directions.path import Path
from ..directions.source import Source
from ..directions.target import Target
from ..estimators import estimator_class
from ..estimators.base import Task
from ..losses.forward import Forward
from ..losses.kl import refuse_inside_checkpoint
from ..losses.weighting import checked_weights
from ..models.changes import IN_CONTEXT, Changes
from ..models.forwards import refuse_other_rows
from ..models.reference import refuse_trained_reference
from ..models.sites import Scored
from ..models.structure import find_decoder, unwrap
from ..selection import make_selection
from ..selection.base import by_weights, check_unvalued
from ..values import TokenValues
from ..weights import weights_by_others
from .context import to_be_entered
from .figures import Figures
from .penalties import Asked, Penalties
from .step import NESTED, UNMASKED, ScoredOf, Step, check_nothing_behind, tell, unmasked
from .weighers import Valued, Weighed, Weigher


class AlphaToken:
    """Masks low-value response tokens out of the gradient of any loss, one batch per context.

    Args:
        model (`nn.Module`): causal LM in training, with LoRA adapters or with linears that are trained themselves; for
            the difference and path estimators, with anything trained before its LM head. What follows the gate must be
            frozen: the LM head, and for the other estimators the final norm.
        ref_model (`nn.Module` or `None`): the reference; `None` for the same network with adapters off, or with its
            adapter "ref".
        target (`Target` or SFT batches, *optional*): validation batches, from which the target gradient is estimated
            (see `target_every`, `target_parts` and `target_decay` of the config); or a `Target`, used as it is. Without
            a target, each sequence of a batch is valued against the others, at the cost of one more forward.
        fisher (`Fisher`, *optional*): from `estimate_fisher`. By default estimated at the first step from the target
            batches (or the first batch), with labels drawn from the reference's own predictions.
        config (`AlphaTokenConfig`, *optional*): settings; by default `AlphaTokenConfig()`.
        optimizer (`torch.optim.Optimizer`, *optional*): the Adam that trains. Tokens are then valued by the step that
            it will take, not by a step along the gradient. Needs a target.
        path (`Path` or `str`, *optional*): for `estimator="path"`, a theta* that was made before (`make_path`), or the
            name of an adapter of the model that holds it. By default it is made at the first step, from `fisher` and
            from `target`: validation batches, of pairs if pairs are trained on.
        strict (`bool`): raise an error when a context ends and no forward of the model was masked in it, or where the
            last one was never entered; with False, only warn.
        selection (`str`): what chooses the tokens: by default their values; else a name in `selection.SELECTIONS`. Then
            nothing is valued or estimated, and anything before the LM head may be trained. `"given"` takes the
            `weights` of each context.
        selection_options (`Mapping`, *optional*): options of that selection, such as `{"perplexity": 2.5}` of `"stm"`.
        token_weights (`Callable` or `str`, *optional*): weights of your own, instead of a selection: a function that
            makes `(B, T)` weights, aligned with the labels, from what the training forward has (see `Forward`); or the
            name of a column of the batch that holds them.
        negative_weights (`bool`): allow weights below 0, which train the model away from a token.

    Raises:
        ValueError: the model cannot be valued; the message says why and what to do.

    Attributes:
        weights (`torch.Tensor`): `(B, T)` float32 weights of the last batch, aligned with its labels; 0 and 1 if tokens
            are dropped and kept.
        values (`TokenValues`): its values, if it was valued, in the units of the loss that was sent backward (with an
            `optimizer`, up to a factor that depends on its state).
        kl (`torch.Tensor` or `None`): kl_coef * KL(reference || policy) + path_kl * KL(theta* || policy) of the last
            context's batch, a scalar with graph, when its forward has run. Add it to the loss.

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
        path: Path | str | None = None,
        strict: bool = True,
        selection: str = "alphatoken",
        selection_options: Mapping[str, Any] | None = None,
        token_weights: Callable[[Forward], torch.Tensor] | str | None = None,
        negative_weights: bool = False,
    ) -> None:
        self.model = model
        self.strict = strict
        self.ref_model = ref_model
        self.config = read_config(config)
        self.selection = make_selection(selection, self.config, selection_options)
        self.negative_weights = negative_weights
        if token_weights is not None:
            if not self.selection.valued:
                raise ValueError(f"Both selection={selection!r} and token_weights were given. Leave one of them.")
            self.selection = by_weights(self.config, token_weights, negative_weights)
        self.source = Source(
            model, ref_model, target=target, fisher=fisher, config=self.config, optimizer=optimizer, path=path
        )
        self.figures = Figures()
        self.weights: torch.Tensor | None = None
        self.values: TokenValues | None = None
        self._estimator = estimator_class(self.config.estimator)
        self._memory = self._estimator.memory(self.config)
        self._find = ScoredOf(model, self._estimator.gate, self.config)
        self._penalties = Penalties(model, self._memory.kl)
        if not self.config.off:  # else nothing is read, and nothing refused
            drifts = self.config.stability_weight > 0 if self.selection.valued else self.selection.reference
            if ref_model is None and drifts:
                refuse_trained_reference(model.modules())
            if self.selection.valued:
                self._memory.check(self.source)
                self.source.check(self._find())
            else:
                check_unvalued(self.config, target=target, fisher=fisher, optimizer=optimizer, path=path)
                check_nothing_behind(model, "decoder")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that are read here, and are not for the model."""
        return self.selection.columns

    @property
    def kl(self) -> torch.Tensor | None:
        return self._penalties.kl

    @property
    def target(self) -> Target | None:
        """The target in use, once there is one."""
        return self.source.target

    @property
    def fisher(self) -> Fisher | None:
        """The Fisher in use, once there is one."""
        return self.source.fisher

    @property
    def path(self) -> Path | None:
        """theta* in use, once there is one."""
        return self.source.path

    def _scored(self) -> Scored | None:
        """What is scored, if anything is valued."""
        return None if self.config.off or not self.selection.valued else self._find()

    @to_be_entered
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
        kl_on: str = "all",
        kl_over: str = "vocabulary",
        seed: int | None = None,
    ) -> Iterator[AlphaToken]:
        """Value one batch: run the model's forward on it, with grad, inside; `backward` may also come later.

        Args:
            batch (`Mapping`): the batch that the model runs on, in any form `alphatoken_weights` takes.
            mean_over_kept (`bool`): multiply the gradient by the number of response tokens / the sum of their weights:
                the gradient of a mean over response tokens becomes that of Eq. 13's weighted mean. Without it, the
                loss's own divisor stays, whatever the weights are, so that micro-batches add up.
            beta (`float`): beta of the DPO loss that values pairs without a target; with a target, your loss does.
            weights (`torch.Tensor`, *optional*): `(B, T)` finite numbers, aligned with the labels (as `random_weights`
                and others give them): each response token's gradient is multiplied by its weight, and nothing is valued
                or estimated. The loss keeps its value.
            kl_coef (`float`): weight of a KL to the reference over all response tokens, kept or not; `kl` then holds
                it. It is not masked, and does not change the values. Works with rho=1.0 too.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): divisor of the summed KL, else response tokens.
            ref_model (`nn.Module`, *optional*): the reference of the KL, by default the one of this object.
            kl_on (`str`): take a KL on `"all"` response tokens, or only on the `"dropped"` ones. The latter must be
                known when the forward has run: with `estimator="path"`, or with given weights.
            kl_over (`str`): take it over the whole `"vocabulary"`, or `"without_label"`: the label is left out of both
                distributions, and the rest is scaled to a sum of 1 (arXiv 2605.29498).
            seed (`int`, *optional*): for a random selection; by default it uses torch's global generator.

        Raises:
            RuntimeError: two forwards with grad run inside, or none; the model is in such a context already; or the
                last one was never entered, or its KL left out of what went backward.
            ValueError: the forward's tokens or the weights' shape are not the batch's; weights are not finite, all 0,
                or negative without `negative_weights`; or the model can no longer be valued.
        """
        reference = self.ref_model if ref_model is None else ref_model
        asked = Asked(kl_coef, kl_on, kl_over, num_items_in_batch, reference)
        self._penalties.check_counted()
        if self.config.rho >= 1.0 and (weights is not None or kl_on == "dropped"):
            what = "weights were given" if weights is not None else 'kl_on is "dropped"'
            raise ValueError(f"{what}, but rho=1.0 switches the gate off. Make the AlphaToken with rho < 1.")
        before = self.weights, self.values
        try:
            with Changes() as changes, self.figures.attempt():
                self._penalties.forget()
                with self.figures.timed():
                    step = self._step(batch, mean_over_kept, beta, weights, seed, asked)
                if step is not None or kl_coef > 0:
                    read = read_batch(batch, columns=self.columns) if step is None else step.batch
                    self._penalties.begin(asked, read, step)
                with self._masking(step), self._penalties.watching():
                    changes.keep_modes()
                    yield self
        except BaseException:
            self._penalties.forget()
            self.weights, self.values = before
            raise
        self._penalties.count(self.figures)

    @contextlib.contextmanager
    def _masking(self, step: Step | None) -> Iterator[None]:
        """Set the gate for one forward; the gradients of penalties do not pass it."""
        if step is None:
            with contextlib.nullcontext() if self.config.off else unmasked(self.model, self.strict):
                yield
            return
        with Changes() as changes:
            changes.set(unwrap(self.model), IN_CONTEXT, True)
            check = partial(refuse_other_rows, step.batch)
            changes.hook(find_decoder(self.model), check, before=True, with_kwargs=True)
            with step.weigher.watching(self._penalties.around(step.gate)):
                yield
        self.figures.seconds += step.weigher.seconds
        if not step.weigher.seen:
            tell(UNMASKED, self.strict)

    def _step(
        self,
        batch: Mapping[str, Any] | Batch,
        mean_over_kept: bool,
        beta: float,
        weights: torch.Tensor | None,
        seed: int | None,
        asked: Asked,
    ) -> Step | None:
        """One batch, ready for its forward; `None` where nothing is to be masked."""
        if self.config.off or not torch.is_grad_enabled():
            return None
        if IN_CONTEXT in vars(unwrap(self.model)):
            raise RuntimeError(NESTED)
        scored = self._scored()
        if scored is None:
            check_nothing_behind(self.model, "decoder")
        read = read_batch(batch, columns=self.columns)
        values, factors = None, None
        if weights is not None:
            weights = checked_weights(weights, read, negative=self.negative_weights, zeros=False)
        elif scored is None:
            weights = self.selection.before(self.model, self.ref_model, read, seed)
        elif self._memory.keeps_all:
            weights = read.at_labels(read.rows.float())
        elif not (self.source.validates or self._estimator.in_forward):
            weights, values = weights_by_others(scored, read, self.source, beta)
        if weights is not None:
            factors = weights.to(read.labels.device).roll(-1, 1)
            self._record(values, read.at_labels(factors), read)
        weigher = self._weigher(read, asked, scored, known=weights is not None)
        if factors is None and not weigher.in_forward:
            self._penalties.check_known(asked, "the gradient arrives" if scored else "the forward has ended")
        return Step(read, weigher, factors, mean_over_kept=mean_over_kept, figures=self.figures, record=self._record)

    def _weigher(self, batch: Batch, asked: Asked, scored: Scored | None, *, known: bool) -> Weigher:
        if scored is None:
            return Weighed(self.model, batch, None if known else self.selection.after)
        memory, source = self._memory, self.source
        if known and not memory.kl:
            memory.begin(source, scored, batch, needed=False)
            return Weighed(self.model, batch, None)
        if asked.coef > 0 and self._estimator.gate == "block":
            refuse_inside_checkpoint(scored.blocks)
        parts = memory.begin(source, scored, batch, needed=True)
        task = Task(
            self.model, scored, batch, self.config, parts, memory, apart=False, training=True, valued=not known,
            early=memory.early(source) or asked.on == "dropped", ref_model=self.ref_model,
            kl_over=asked.over if memory.kl else None,
        )  # fmt: skip
        valued = Valued(self._estimator, task, source)
        task.parts = {}  # the estimator lets go of them as soon as it can
        return valued

    def metrics(self) -> dict[str, float]:
        """Figures over the response tokens of all batches since the last call: `kept` (the share whose weight is not
        0), `weight` (the mean weight, where not all are 0 or 1), the means of `total` and of the ghost's four terms, in
        units of the loss; `target_age` in optimizer steps; `difference_rms`, the effect of that estimator's last nudge;
        `kl` and `path_kl`, the mean KLs in nats; and the `seconds` spent valuing, target estimates included (on CUDA
        only what the host waited for). Steps that raised inside their context count nothing; of batches without a
        response token there is no share."""
        figures = self.figures.read()
        if self.config.off:
            figures.pop("seconds")
            return {"kept": 1.0, **figures}
        valued = "total" in figures or "kept" not in figures
        if self.selection.valued and valued:  # no target has to do with weights that were given
            figures["target_age"] = float(self.source.age)
        return {**figures, **self._memory.figures()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for the masks of an uninterrupted one: the target and the Fisher, if they were
        estimated here by now, the age in optimizer steps, where training started, and what the estimator carries."""
        scored = self._scored()
        steps = {} if scored is None else self._memory.state_dict(self.source)
        return {**self.source.state_dict(scored), "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, once the model's parameters are those it had then."""
        scored = self._scored()
        self.source.load_state_dict(state, scored)
        if scored is not None:
            self._memory.load_state_dict(self.source, state["steps"], scored.device)

    def _record(self, values: TokenValues | None, weights: torch.Tensor | None, batch: Batch) -> None:
        self.values, self.weights = values, None if weights is None else weights.float()
        if weights is not None:
            self.figures.add(values, weights, batch)
