"""A tiny model, its tokenizer and data, for what must run without TRL too."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
