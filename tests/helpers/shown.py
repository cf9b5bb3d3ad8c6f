"""Texts, tokenizers and values to show."""

from __future__ import annotations

import functools
from dataclasses import fields
from html.parser import HTMLParser
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alphatoken_loss import TokenValues
from alphatoken_loss.batches.read import read_batch

TEXTS = [
    "plain words,  two spaces\n\n\tand a tab ",
    "日本語のテキスト、漢字",
    "emoji 😀👍🏽 family 👩‍👩‍👧 flags 🇩🇪🇫🇷🇯🇵 heart ❤️",
    "combining e\u0301 n\u0303 \u0915\u094d\u0937\u093f a\u0300\u0301\u0302",
    "العربية עברית Ελληνικά",
    '<script>alert("x")</script> </style> & &amp; \' " <!-- -->',
    "control \x00\x01\x1b[31mred\x7f\r\n\u202eoverride\u2066 \ufeff\u200b\u2028 end",
    "\ufffd real replacement \ufffd",
    "",
]


@functools.cache
def tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, some of which join half a character with another half."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["some words and 日本 text 😀😁 é", "and some words"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def batch_of(texts: list[str], side: str = "right", prompt: int = 2) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(tokenizer()(text)["input_ids"] or [2]) for text in texts]
    width = max(map(len, rows))
    ids, attention = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        ids[i, start : start + len(row)], attention[i, start : start + len(row)] = row, 1
        labels[i, start + prompt : start + len(row)] = row[prompt:]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def values_of(batch: Any, seed: int = 0) -> tuple[torch.Tensor, TokenValues]:
    read = read_batch(batch)
    generator = torch.Generator().manual_seed(seed)
    response = read.at_labels(torch.ones(read.shape))
    made = [response * torch.randn(read.shape, generator=generator) for _ in fields(TokenValues)]
    return response * (made[0] > 0), TokenValues(*made)


class Reader(HTMLParser):
    """What a browser makes of the page: tags, and each token span with its text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.spans: list[dict[str, str | None]] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag in ("meta", "br"):
            return
        self.stack.append(found.get("class") or "")
        if tag == "div" and found.get("class") == "text":
            self.texts.append("")
        if tag == "span" and "data-v" in found:
            self.spans.append(found)

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "text" in self.stack:
            self.texts[-1] += data
