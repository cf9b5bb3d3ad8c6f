"""TRL training on a tiny model: tokenizer, data, models, and the stock trainer with an explicit mask."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from tiny import base, dpo_data, rows, sft_data, tokenizer  # noqa: F401 - for those who train
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)
from transformers.utils import logging
from trl import DPOTrainer, SFTTrainer

from alphatoken_loss import (
    AlphaTokenDPOConfig,
    AlphaTokenDPOTrainer,
    AlphaTokenSFTConfig,
    AlphaTokenSFTTrainer,
    alphatoken_weights,
)
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses.logps import logps_of_logits

disable_progress_bars()
logging.disable_progress_bar()


@functools.cache
def _nf4() -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        base().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


def nf4() -> torch.nn.Module:
    model = copy.deepcopy(_nf4()).train()
    torch.manual_seed(0)  # as after `base`: adapters are drawn next
    return model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def with_adapter() -> torch.nn.Module:
    """A model that comes with an adapter that was trained before."""
    model = get_peft_model(base(), lora())
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def partly_trained() -> torch.nn.Module:
    """Linears of the last block that are trained themselves; the norm and the head behind it are frozen."""
    model = base()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name and "proj" in name)
    return model


def arguments(kind: str, folder: Any, **options: Any) -> Any:
    config = AlphaTokenSFTConfig if kind == "sft" else AlphaTokenDPOConfig
    defaults: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=3, logging_steps=1, report_to="none",
        save_strategy="no", per_device_train_batch_size=2, learning_rate=0.3, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", disable_tqdm=True, seed=3, num_layers=2, target_every=2, target_size=4,
        fisher_prompts=4, fisher_new_tokens=4,
    )  # fmt: skip
    return config(**{**defaults, **options})


def recording(trainer_class: type) -> type:
    """The trainer, which also keeps each batch's mask, and what `alphatoken_weights` gives for that batch."""

    class Recording(trainer_class):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(model, inputs, *args, **kwargs)
            gate = self.alphatoken
            batch = self.alphatoken_batch({k: v for k, v in inputs.items() if k != "use_cache"})
            given = {
                "target": gate.target,
                "fisher": gate.fisher,
                "config": gate.config,
                "optimizer": self.optimizer if self.alphatoken_args.precondition else None,
            }
            beta = getattr(self, "beta", 0.1)
            expected = alphatoken_weights(self.model, gate.ref_model, batch, beta=beta, **given)
            others = read_batch(batch).labels == -100  # prompts stay in the gradient, where a loss has them (ORPO's)
            self.masks = [*getattr(self, "masks", []), gate.weights + others]
            self.expected = [*getattr(self, "expected", []), expected + others]
            return loss

    return Recording


def masked(trainer_class: type, masks: list[torch.Tensor]) -> type:
    """The stock trainer with the mask written into its log-probabilities: their values stay, gradients are switched."""

    class Masked(trainer_class):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return super().compute_loss(model, inputs, *args, **kwargs)
            mask = masks[self.step_count]
            self.step_count += 1
            inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            original = inner.forward

            def forward(*a: Any, **k: Any) -> Any:
                noise = torch.get_rng_state()
                output = original(*a, **k)
                if torch.is_grad_enabled():
                    if k.get("labels") is not None and getattr(output, "log_probs", None) is None:
                        with torch.random.fork_rng([]):  # made inside, as TRL 1.14 does
                            torch.set_rng_state(noise)
                            output["loss"] = loss_by_logits(inner, mask, *a, **k)
                    for name, kept in (("log_probs", mask[:, 1:]), ("logits", mask.roll(-1, 1)[..., None])):
                        value = getattr(output, name, None)
                        if value is not None:
                            setattr(output, name, kept * value + (1 - kept) * value.detach())
                return output

            inner.forward = forward
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                inner.forward = original

        step_count = 0

    return Masked


def loss_by_logits(
    inner: Any, mask: torch.Tensor, *args: Any, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any
) -> torch.Tensor:
    """The masked SFT loss from whole logits, by the forward of the model's class."""
    logits = type(inner).forward(inner, *args, **kwargs).logits[:, -labels.shape[1] :]
    logps = logps_of_logits(logits, labels)
    count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return -(mask * logps + (1 - mask) * logps.detach()).sum() / count


TRAINERS = {"sft": (AlphaTokenSFTTrainer, SFTTrainer), "dpo": (AlphaTokenDPOTrainer, DPOTrainer)}
OURS = ("runtime", "per_second", "flos", "alphatoken/")


def history(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without timings and without this library's figures."""
    return [{k: v for k, v in log.items() if not any(part in k for part in OURS)} for log in trainer.state.log_history]


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad)
