"""TRL's trainers with token values inside.

The gate is in the model, so loss, collator and metrics stay TRL's own. In training, `compute_loss` runs in an
`AlphaToken` context, and the KLs of `kl_coef` (SFT) and `path_kl` are added to the loss. Evaluation, prediction, and
`rho=1.0` without a KL or a start at theta* are TRL's untouched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl import SFTTrainer

from ..config import AlphaTokenConfig
from ..directions.fisher import Fisher
from ..gate.alphatoken import AlphaToken
from ..losses.forward import Forward
from ..models.start import add_reference_adapter, has_adapters
from ..models.structure import unwrap
from ..tools.report.samples import SampleWriter
from .arguments import AlphaTokenArguments
from .checkpoints import Checkpoints
from .columns import TokenColumns, without_damped_sums
from .fisher import FisherOfPrompts
from .gain import GainOfRows
from .path import PathColumn
from .refused import refuse_what_is_not_modelled
from .selecting import Selecting

logger = get_logger(__name__)


class AlphaTokenMixin(GainOfRows, FisherOfPrompts, PathColumn, Checkpoints, Selecting, TokenColumns):
    """Token values for a trainer of Transformers' kind. Put it first among the bases of a trainer, and
    [`AlphaTokenArguments`] first among those of its arguments.

    The loss keeps its value. In its gradient, response tokens of low value count nothing. The divisor of the loss stays
    as it is: TRL's SFT divides by all response tokens of the accumulated batch, kept or not. So the gradient is about
    `rho` times that of a mean over kept tokens, and gradient accumulation does not change its scale. Weights of any
    size multiply each token's gradient; nothing is divided by their sum.

    Args:
        target_dataset ([`~datasets.Dataset`], *optional*):
            Clean examples of the target task in SFT form (prompt-completion, conversational, text, or tokenised); all
            of them define the target. With `estimator="path"`, a DPO trainer also takes preference pairs, in the form
            of its training data. By default `args.target_size` rows of the training data are held out.
        fisher ([`Fisher`] or `str`, *optional*):
            The reference's Fisher, or where it was saved. By default `args.fisher_path`; without it, estimated
            from prompts of the training data when training starts.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The reference, for trainers that have none of their own. Needed if linears are trained themselves. With
            adapters, by default the model without them, or with its adapter "ref".
        token_weights (`Callable` or `str`, *optional*):
            Weights instead of values: a function of what the training forward has (see [`AlphaToken`]), or the
            name of a column of the training data with one number per token of `input_ids` or of the completion (for
            pairs, of `chosen_*` and `rejected_*`). A column "token_weights" is read without being named.

    Attributes:
        alphatoken ([`AlphaToken`] or `None`): what values and masks the batches; None with `rho=1.0` and no KL or start
            at theta*.

    Raises:
        ValueError: tokens cannot be valued with this model, data or distribution; the message says what to do.
        TypeError: `args` has no fields for token values, or `target_dataset` is no `Dataset`.

    Example:
        >>> @dataclass
        ... class Arguments(AlphaTokenArguments, TrainingArguments): ...
        >>> class AlphaTokenTrainer(AlphaTokenMixin, Trainer): ...
    """

    _gate_options: dict[str, Any]  # those that do not come from the settings
    _read_settings: AlphaTokenConfig
    _samples: SampleWriter | None = None

    def __init__(
        self,
        *args: Any,
        target_dataset: Dataset | None = None,
        fisher: Fisher | str | Path | None = None,
        token_weights: Callable[[Forward], torch.Tensor] | str | None = None,
        **kwargs: Any,
    ) -> None:
        off = any(isinstance(a, AlphaTokenArguments) and a.alphatoken_config.off for a in (*args, *kwargs.values()))
        self.token_columns = () if off else (token_weights,) if isinstance(token_weights, str) else self.token_columns
        inits = [vars(cls)["__init__"] for cls in type(self).__mro__ if "__init__" in vars(cls)]
        own = any("ref_model" in inspect.signature(init).parameters for init in inits)
        reference = None if own else kwargs.pop("ref_model", None)
        if reference is not None and not isinstance(reference, torch.nn.Module):
            raise TypeError(
                f"ref_model is a {type(reference).__name__}; it must be a model. Load it first, with "
                "AutoModelForCausalLM.from_pretrained."
            )
        data = kwargs.get("train_dataset"), *args
        self._raw_rows = next((rows for rows in data if isinstance(rows, Dataset | IterableDataset)), None)
        super().__init__(*args, **kwargs)
        plain = [value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)]
        if isinstance(self.args, AlphaTokenArguments):
            self.alphatoken_args = self.args
        elif plain:
            raise TypeError(
                f"args is a {type(plain[0]).__name__}, which has no fields for token values. Use AlphaTokenSFTConfig, "
                "AlphaTokenDPOConfig, or a dataclass of AlphaTokenArguments and the trainer's own arguments."
            )
        else:
            self.alphatoken_args = AlphaTokenArguments()
        config, kl_coef = self.alphatoken_args.alphatoken_config, self.alphatoken_args.kl_coef
        self._read_settings = config
        if kl_coef > 0 and not isinstance(self, SFTTrainer):
            raise ValueError(
                f"kl_coef is {kl_coef}, but {type(self).__name__} is no SFTTrainer, and only there is a KL to the "
                "reference offered (AlphaTokenSFTTrainer). Set kl_coef=0; in a loop of your own, add the `kl` of "
                "`with alphatoken(batch, kl_coef=...) as step:` to the loss."
            )
        token_weights = self._found_weights(token_weights)
        if config.off and not kl_coef:
            return
        refuse_what_is_not_modelled(self)
        if own and getattr(self, "ref_model", None) is None and has_adapters(self.model):
            add_reference_adapter(self.model, precomputed=getattr(self.args, "precompute_ref_log_probs", False))
        self._alphatoken_ref = reference if reference is not None else getattr(self, "ref_model", None)
        if reference is not None:
            reference.requires_grad_(False).to(self.accelerator.device).eval()
        if kl_coef and self._alphatoken_ref is None and not has_adapters(self.model):
            raise ValueError(
                f"kl_coef is {kl_coef}, but the model has no adapters and there is no ref_model, so there is no "
                "reference. Pass the model that training starts from as ref_model, or use a peft_config."
            )
        options = self._gate_options = {}
        if config.off:
            self._make_gate(config)
            return
        self._collate_columns()
        options |= {
            "selection": self.alphatoken_args.selection,
            "selection_options": self.alphatoken_args.selection_options,
            "token_weights": token_weights,
            "negative_weights": self.alphatoken_args.negative_weights,
        }
        valued = self._values(token_weights, target_dataset, fisher)
        self._check_path_column(target_dataset, valued)
        self._check_gain_rows(valued)
        if valued:
            fisher = fisher if fisher is not None else self.alphatoken_args.fisher_path
            brought = config.estimator == "path" and self._has_path_column
            options["target"] = None if brought else list(self._target_batches(target_dataset))
            options["fisher"] = Fisher.load(fisher) if isinstance(fisher, (str, Path)) else fisher
        self._make_gate(config)

    def _make_gate(self, config: AlphaTokenConfig) -> None:
        """Make it, or make it anew in its place: what holds it holds the new one."""
        made = AlphaToken(self.model, self._alphatoken_ref, config=config, **self._gate_options)
        self.alphatoken = self.alphatoken or made
        vars(self.alphatoken).update(vars(made))

    def get_train_dataloader(self) -> Any:
        gate = self.alphatoken
        if gate is not None and unwrap(gate.model) is not unwrap(self.model):  # model_init made another one
            self._make_gate(gate.config)
        return super().get_train_dataloader()

    def alphatoken_batch(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A training or target batch as `AlphaToken` reads it. Override it if the trainer's has another form."""
        return without_damped_sums(inputs, self.args)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        columns = {name: inputs[name] for name in self.token_columns if name in inputs}
        inputs = self._without_columns(inputs)
        if self.alphatoken is None or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, *args, **kwargs)
        batch = {**self.alphatoken_batch(inputs), **columns}
        self._make_ready(self.alphatoken)
        count = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        asked = self.alphatoken_args
        kl: dict[str, Any] = {"kl_coef": asked.kl_coef, "kl_on": asked.kl_on, "kl_over": asked.kl_over}
        kl["num_items_in_batch"] = count
        with self.alphatoken(batch, seed=self._draw(), **kl) as step:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        if step.kl is None:
            return found
        shared = self.args.average_tokens_across_devices and count is not None  # then gradients are averaged over ranks
        penalty = step.kl * (self.accelerator.num_processes if shared else 1)
        return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

    def _make_ready(self, alphatoken: AlphaToken) -> None:
        """Give it what exists only when training starts: Fisher, optimizer, batch size."""
        self.alphatoken_args.check_unchanged(self._read_settings)
        if self._gate is not None and alphatoken.selection.valued:
            if alphatoken.source.needs_fisher:
                alphatoken.source.fisher = self._estimate_fisher()
            if self.alphatoken_args.precondition:
                alphatoken.source.optimizer = self.optimizer
        if self.args.auto_find_batch_size:
            alphatoken.source.limit_rows(self._train_batch_size)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.alphatoken is None:
            return super().training_step(model, inputs, *args, **kwargs)
        gate, every, step = self._gate, self.alphatoken_args.sample_every, self.state.global_step
        samples = None
        if gate is not None and every and self.is_world_process_zero():
            if self._samples is None or step < self._samples.last:  # the run begins
                self._samples = SampleWriter(self.args.output_dir, every=every, step=step)
            samples = self._samples
        before, batch = self.alphatoken.weights, dict(inputs)  # a loss may take its labels out
        with self.alphatoken.figures.attempt():  # a batch size that runs out of memory is tried again, smaller
            loss = super().training_step(model, inputs, *args, **kwargs)
        if gate is not None and samples is not None and gate.weights is not before:
            samples.add(step, self.alphatoken_batch(batch), gate)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.alphatoken is not None and "loss" in logs:  # training steps, which every rank logs
            ranks = gather_object([self.alphatoken.metrics()])
            ranks = [metrics for metrics in ranks if "kept" in metrics]  # else no batch was valued since the last time
            for name in dict.fromkeys(itertools.chain(*ranks)):
                figures = [metrics[name] for metrics in ranks if name in metrics]
                logs[f"alphatoken/{name}"] = sum(figures) / len(figures)
        super().log(logs, *args, **kwargs)
        if self._samples is not None and "loss" in logs:
            self._samples.log(self.state.global_step, self.state.log_history[-1])
