"""Prompts and answers in token ids, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One supervised example.

    Attributes:
        kinds (`tuple`): the kind of each answer token, a place in its world's `kinds`; empty: all are of kind 0.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kinds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pair:
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def as_batch(rows: Sequence[Row], pad: int) -> Batch:
    """An SFT batch, padded on the right: `input_ids`, `attention_mask` and `labels`, `(B, T)` int64."""
    length = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.answer)
        ids[i, :end] = torch.tensor(row.prompt + row.answer)
        labels[i, start:end] = torch.tensor(row.answer)
    seen = torch.tensor([[len(row.prompt) + len(row.answer)] for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < seen).long(), "labels": labels}


def pair_batch(pairs: Sequence[Pair], pad: int) -> Batch:
    """Pairs as TRL's preference collator stacks them: chosen rows first, and a `completion_mask`."""
    chosen = [Row(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [Row(pair.prompt, pair.rejected) for pair in pairs]
    stacked = as_batch([*chosen, *rejected], pad)
    labels = stacked.pop("labels")
    return {**stacked, "completion_mask": (labels != -100).long()}


def kinds_of(rows: Sequence[Row]) -> torch.Tensor:
    """`(B, T)` kind of each label, -1 where there is none."""
    length = max(len(row.prompt) + len(row.answer) for row in rows)
    padded = []
    for row in rows:
        kinds = torch.tensor(row.kinds or [0] * len(row.answer))
        padded.append(F.pad(kinds, (len(row.prompt), length - len(row.prompt) - len(kinds)), value=-1))
    return torch.stack(padded)


def to_device(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def chunks(items: Sequence, size: int) -> list:
    """Pieces of up to `size` items, in their order."""
    return [items[start : start + size] for start in range(0, len(items), size)]
