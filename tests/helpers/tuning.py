"""TRL training on a tiny model: tokenizer, data, models, and the stock trainer with an explicit mask."""

from __future__ import annotations

import copy
import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
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

disable_progress_bars()
logging.disable_progress_bar()
gc.freeze()  # trainers collect garbage before they train; what was imported is none

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes."""
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2}
    letters = {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**specials, **letters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    fresh = copy.deepcopy(_tokenizer())
    fresh.chat_template = CHAT if chat else None
    return fresh


def base(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        vocab_size=259, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


@functools.cache
def _nf4() -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        base().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


def nf4() -> torch.nn.Module:
    return copy.deepcopy(_nf4()).train()


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


def rows(count: int = 12, first: int = 0) -> list[dict[str, Any]]:
    """Prompt-completion rows of several lengths."""
    numbers = range(first, first + count)
    return [{"prompt": f"{i} times {i % 3}:", "completion": f" {i * (i % 3)}" + "!" * (i % 5)} for i in numbers]


def sft_data(form: str = "plain", count: int = 12, first: int = 0) -> Dataset:
    if form == "text":
        return Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows(count, first)])
    if form == "plain":
        return Dataset.from_list(rows(count, first))
    chats = [
        ([{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["completion"]}])
        for row in rows(count, first)
    ]
    if form == "messages":
        return Dataset.from_list([{"messages": prompt + answer} for prompt, answer in chats])
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in chats])


def dpo_data(form: str = "plain", count: int = 12, first: int = 0) -> Dataset:
    def pair(row: dict[str, Any]) -> dict[str, Any]:
        answer, worse = row["completion"], " none" if form == "plain" else [{"role": "assistant", "content": "none"}]
        return {"prompt": row["prompt"], "chosen": answer, "rejected": worse}

    return Dataset.from_list([pair(row) for row in sft_data(form, count, first)])


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
                output = original(*a, **k)
                if torch.is_grad_enabled():
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


TRAINERS = {"sft": (AlphaTokenSFTTrainer, SFTTrainer), "dpo": (AlphaTokenDPOTrainer, DPOTrainer)}
OURS = ("runtime", "per_second", "flos", "alphatoken/")


def history(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without timings and without this library's figures."""
    return [{k: v for k, v in log.items() if not any(part in k for part in OURS)} for log in trainer.state.log_history]


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad)
