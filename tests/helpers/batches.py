"""Batches in every form the library takes, small and ragged."""

from __future__ import annotations

import torch
from models import VOCAB

Batch = dict[str, torch.Tensor]


def _tokens(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=generator)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(3000 + seed)


def _pad(rows: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
    width = max(len(row) for row in rows)
    out = torch.full((len(rows), width), value, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        if side == "right":
            out[i, : len(row)] = row
        else:
            out[i, width - len(row) :] = row
    return out


def sft_batch(kind: str = "right", seed: int = 0) -> Batch:
    """One of: none, right, left (padding); ragged (several spans, odd ends); full (labels = ids); packed."""
    generator = _generator(seed)
    if kind == "packed":
        lengths, prompts = [7, 5, 8], [2, 1, 3]
        ids = _tokens(generator, 1, sum(lengths))
        labels, positions, start = ids.clone(), [], 0
        for length, prompt in zip(lengths, prompts, strict=True):
            labels[0, start : start + prompt] = -100
            positions.append(torch.arange(length))
            start += length
        return {"input_ids": ids, "position_ids": torch.cat(positions)[None], "labels": labels}
    lengths = {"none": [10, 10, 10], "full": [9, 9], "ragged": [11, 8, 10, 4]}.get(kind, [11, 7, 9])
    rows = [_tokens(generator, length) for length in lengths]
    labels = [row.clone() for row in rows]
    if kind == "ragged":
        labels[0][[0, 1, 4, 5, 6, 9]] = -100  # three spans
        labels[1][:7] = -100  # one token, the last
        labels[2][2:] = -100  # an answer that is followed by more prompt; column 0 holds a label too
        labels[3][:] = -100  # no answer at all
    elif kind != "full":
        for row, prompt in zip(labels, [4, 2, 5], strict=True):
            row[:prompt] = -100
    side = "left" if kind == "left" else "right"
    batch = {
        "input_ids": _pad(rows, 0, side),
        "attention_mask": _pad([torch.ones_like(row) for row in rows], 0, side),
        "labels": _pad(labels, -100, side),
    }
    return batch


def _pairs(seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(prompt, chosen, rejected) token ids of three pairs."""
    generator = _generator(seed)
    sizes = [(3, 6, 4), (2, 5, 7), (4, 3, 2)]
    return [tuple(_tokens(generator, n) for n in size) for size in sizes]  # type: ignore[misc]


def pair_batch(kind: str = "stacked", seed: int = 0) -> Batch:
    """Preference pairs: stacked (right padded), stacked_left, stacked_ref (with reference sums), or separate
    with labels (separate) or completion masks (separate_mask)."""
    pairs = _pairs(seed)
    branches = [[torch.cat([p, c]) for p, c, _ in pairs], [torch.cat([p, r]) for p, _, r in pairs]]
    prompts = [len(p) for p, _, _ in pairs]

    def masks(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(torch.arange(len(row)) >= n).long() for row, n in zip(rows, prompts, strict=True)]

    if kind.startswith("separate"):
        batch: Batch = {}
        for branch, rows in zip(("chosen", "rejected"), branches, strict=True):
            completion = _pad(masks(rows), 0, "right")
            ids = _pad(rows, 0, "right")
            batch[f"{branch}_input_ids"] = ids
            batch[f"{branch}_attention_mask"] = _pad([torch.ones_like(row) for row in rows], 0, "right")
            if kind == "separate":
                batch[f"{branch}_labels"] = ids.masked_fill(completion == 0, -100)
            else:
                batch[f"{branch}_completion_mask"] = completion
        return batch
    side = "left" if kind == "stacked_left" else "right"
    rows = branches[0] + branches[1]
    completion_masks = masks(branches[0]) + masks(branches[1])
    batch = {
        "input_ids": _pad(rows, 0, side),
        "attention_mask": _pad([torch.ones_like(row) for row in rows], 0, side),
        "completion_mask": _pad(completion_masks, 0, side),
    }
    if kind == "stacked_ref":
        generator = _generator(seed + 500)
        batch["ref_chosen_logps"] = -20.0 - 3.0 * torch.rand(3, generator=generator)
        batch["ref_rejected_logps"] = -21.0 - 3.0 * torch.rand(3, generator=generator)
    return batch


def stacked(batch: Batch) -> Batch:
    """Any batch as plain rows with labels: pairs stacked, chosen first, padded on the right."""
    if "chosen_input_ids" in batch:
        width = max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])

        def join(key: str, fill: int) -> torch.Tensor:
            halves = [batch[f"{branch}_{key}"] for branch in ("chosen", "rejected")]
            return torch.cat([torch.nn.functional.pad(half, (0, width - half.shape[1]), value=fill) for half in halves])

        ids = join("input_ids", 0)
        if "chosen_labels" in batch:
            labels = join("labels", -100)
        else:
            labels = ids.masked_fill(join("completion_mask", 0) == 0, -100)
        out = {"input_ids": ids, "attention_mask": join("attention_mask", 0), "labels": labels}
    elif "completion_mask" in batch and "labels" not in batch:
        out = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        }
    else:
        out = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels") if k in batch}
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        if key in batch:
            out[key] = batch[key]
    return out


def is_pairs(batch: Batch) -> bool:
    return "completion_mask" in batch or "chosen_input_ids" in batch


def response(batch: Batch) -> torch.Tensor:
    """`(B, T)` bool: where a label counts; column 0 never does."""
    mask = stacked(batch)["labels"] != -100
    mask[:, 0] = False
    return mask


def segments(batch: Batch) -> torch.Tensor:
    """`(B, T)` int: which sequence a position belongs to, -1 on padding; packed rows hold several."""
    batch = stacked(batch)
    rows, width = batch["input_ids"].shape
    out = torch.arange(rows)[:, None].expand(rows, width).clone()
    if "attention_mask" in batch:
        out[batch["attention_mask"] == 0] = -1
    elif "position_ids" in batch:
        out = (batch["position_ids"] == 0).cumsum(1) - 1
    return out
