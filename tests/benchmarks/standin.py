"""A model of 40,000 parameters and a data folder of some dozen rows, in the forms of the real ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from worlds.toy import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path) -> Path:
    texts = [f"list files in folder {i}: ls -l dir{i} | sort # answer the question" for i in range(200)]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    """160 commands, 60 problems of which 20 are tests, 90 pairs of 30 questions, 24 marked answers, and some prose."""
    rng = random.Random(0)
    commands = [{"prompt": f"list files in folder {i // 2}", "completion": f"ls -l dir{i}"} for i in range(160)]
    problems = [{"prompt": f"add {i} and {2 * i}", "completion": f"{i} + {2 * i} = <<{i}+{2 * i}={3 * i}>>{3 * i}\n"
                 f"#### {3 * i}"} for i in range(60)]  # fmt: skip
    pairs = [{"prompt": f"add {i // 3} and 1", "chosen": f"it is {i // 3 + 1} so {i}", "rejected": f"it is {i + 7}",
              "question": i // 3} for i in range(90)]  # fmt: skip
    spans = []
    for i in range(24):
        text = f"The folder dir{i} is here. It was made long ago. Files lie in it."
        errors = [{"start": 27, "end": 48, "type": "Irrelevant"}] if i % 3 else []
        errors += [{"start": 0, "end": 10, "type": "Redundant"}] if i % 4 == 1 else []
        spans.append({"question": f"where is folder {i}?", "prediction": text, "errors": errors,
                      "corrected": f"Folder dir{i} is here."})  # fmt: skip
    write(folder / "sft/nl2bash.jsonl", commands)
    write(folder / "sft/gsm8k-train.jsonl", problems[:40])
    write(folder / "sft/gsm8k-test.jsonl", problems[40:])
    write(folder / "preference/gsm8k-solutions.jsonl", pairs)
    write(folder / "spans/qa-feedback.jsonl", spans)
    prose = " ".join(rng.choice(["files", "in", "the", "folder", "sort", "list"]) for _ in range(3000))
    (folder / "retention").mkdir(parents=True)
    (folder / "retention/wikitext2-test.txt").write_text(prose)
    return folder


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
