"""Read every form of batch into one `Batch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .batch import IGNORE, Batch

REFERENCE_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_NOT_FOR_THE_MODEL = {"labels", "completion_mask", *REFERENCE_LOGPS, "num_items_in_batch"}
_TEXTS = {"messages", "prompt", "completion", "text", "chosen", "rejected"}
COLUMNS = ("token_weights", "path_logps")  # a batch may have these: one number per token


def read_batch(batch: Mapping[str, Any] | Batch, *, pairs: bool | None = None, columns: Iterable[str] = ()) -> Batch:
    """Read a batch in any of the forms in docs/trainers.md, "Batches".

    Args:
        batch (`Mapping`): what TRL's SFT and preference collators yield, or separate `chosen_*` / `rejected_*` keys.
        pairs (`bool`, *optional*): require (True) or refuse (False) preference pairs; by default both are read.
        columns (`Iterable[str]`): names of further columns, beside `COLUMNS`, with one number per token. They are no
            inputs of the model. In a batch with separate branches their names begin with `chosen_` and `rejected_`.

    Raises:
        TypeError: `batch` is no mapping, or its `path_logps` no tensor.
        ValueError: keys are missing, shapes disagree, or the pairs are not an even number of rows.
    """
    if isinstance(batch, Batch):
        read = batch
    elif not isinstance(batch, Mapping):
        raise TypeError(f"batch is a {type(batch).__name__}; it must be a mapping of names to tensors.")
    elif "chosen_input_ids" in batch or "rejected_input_ids" in batch:
        read = _stack_branches(batch, {*COLUMNS, *columns})
    else:
        read = _read_stacked(batch, pairs, {*COLUMNS, *columns})
    if pairs is not None and read.pairs != pairs:
        came, wanted = ("preference pairs", "`labels`") if read.pairs else ("`labels`", "preference pairs")
        raise ValueError(
            f"The batch holds {came} where one with {wanted} is needed; its keys are {sorted(_keys(batch))}. sft_loss "
            "takes batches with `labels`, dpo_loss preference pairs (`completion_mask`, or `chosen_*`, `rejected_*`)."
        )
    _check_shapes(read)
    return read


def _read_stacked(batch: Mapping[str, Any], pairs: bool | None, columns: set[str]) -> Batch:
    if "input_ids" not in batch:
        text = " These are texts: tokenise and collate them; the trainers do." if _TEXTS & set(batch) else ""
        raise ValueError(f"The batch has no `input_ids`; its keys are {sorted(batch)}.{text}")
    ids = batch["input_ids"]
    for name in ("input_ids", "attention_mask", "labels", "completion_mask"):
        if batch.get(name) is not None and not isinstance(batch[name], torch.Tensor):
            raise TypeError(
                f"{name} of the batch is a {type(batch[name]).__name__}; it must be a tensor (batch, time). If this is "
                "a row of a data set, pad and stack rows to batches first: a DataLoader with a collator does."
            )
    found = {name: batch[name] for name in columns if batch.get(name) is not None}
    not_for_the_model = _NOT_FOR_THE_MODEL | columns
    inputs = {key: value for key, value in batch.items() if key not in not_for_the_model and value is not None}
    is_pairs = "completion_mask" in batch and ("labels" not in batch or pairs is True)
    if is_pairs:
        mask = batch["completion_mask"]
        if mask.shape != ids.shape:
            raise ValueError(
                f"completion_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; they must agree."
            )
        if ids.shape[0] % 2:
            raise ValueError(
                f"A stacked preference batch holds the chosen answers and then as many rejected ones, but this one "
                f"has {ids.shape[0]} rows. Give an even number."
            )
        return Batch(inputs, ids.masked_fill(mask == 0, IGNORE), True, _reference_logps(batch), found)
    if batch.get("labels") is None:
        raise ValueError(
            "The batch has neither `labels` (-100 where a token is not trained on) nor `completion_mask` (stacked "
            f"preference pairs); its keys are {sorted(batch)}. Add one of them."
        )
    return Batch(inputs, batch["labels"], columns=found)


def _keys(batch: Mapping[str, Any] | Batch) -> Iterable[str]:
    return batch.inputs if isinstance(batch, Batch) else batch


def _stack_branches(batch: Mapping[str, Any], columns: set[str]) -> Batch:
    """`chosen_*` and `rejected_*`, padded on the right to one length, chosen first."""
    branches = []
    for branch in ("chosen", "rejected"):
        ids = batch.get(f"{branch}_input_ids")
        if ids is None:
            raise ValueError(f"The batch has no `{branch}_input_ids`; its keys are {sorted(batch)}.")
        attention = batch.get(f"{branch}_attention_mask")
        labels, completion = batch.get(f"{branch}_labels"), batch.get(f"{branch}_completion_mask")
        if labels is None and completion is None:
            raise ValueError(
                f"The batch has neither `{branch}_labels` nor `{branch}_completion_mask`; its keys are "
                f"{sorted(batch)}. Add one of them."
            )
        if labels is None:
            labels = ids.masked_fill(completion == 0, IGNORE)
        branches.append((ids, torch.ones_like(ids) if attention is None else attention, labels))
    if branches[0][0].shape[0] != branches[1][0].shape[0]:
        raise ValueError(
            f"The batch has {branches[0][0].shape[0]} chosen and {branches[1][0].shape[0]} rejected rows; "
            "give one rejected answer for each chosen one."
        )
    length = max(ids.shape[1] for ids, _, _ in branches)
    ids, attention, labels = (
        torch.cat([F.pad(branch[part], (0, length - branch[part].shape[1]), value=fill) for branch in branches])
        for part, fill in ((0, 0), (1, 0), (2, IGNORE))
    )
    found = {}
    for name in columns:
        halves = [batch.get(f"{branch}_{name}") for branch in ("chosen", "rejected")]
        if all(isinstance(half, torch.Tensor) and half.dim() == 2 for half in halves):
            found[name] = torch.cat([F.pad(half, (0, length - half.shape[1])) for half in halves])  # type: ignore[union-attr, arg-type]
    return Batch({"input_ids": ids, "attention_mask": attention}, labels, True, _reference_logps(batch), found)


def _reference_logps(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    chosen, rejected = (batch.get(name) for name in REFERENCE_LOGPS)
    if chosen is None and rejected is None:
        return None
    for name, logps in zip(REFERENCE_LOGPS, (chosen, rejected), strict=True):
        if not isinstance(logps, torch.Tensor):
            came = "missing" if logps is None else f"a {type(logps).__name__}"
            raise TypeError(
                f"{name} is {came}; give {' and '.join(REFERENCE_LOGPS)}, tensors of one number for each pair, or "
                "neither."
            )
    return chosen, rejected  # type: ignore[return-value]


def _packed_beside_a_mask(inputs: Mapping[str, Any]) -> bool:
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if not all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in (mask, positions)):
        return False
    starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))  # type: ignore[index]
    attended = mask.bool()  # type: ignore[union-attr]
    return bool((starts & attended & F.pad(attended[:, :-1], (1, 0))).any())  # in padding, positions may start anywhere


def _check_shapes(batch: Batch) -> None:
    if batch.labels.dim() != 2:
        raise ValueError(f"labels have shape {tuple(batch.labels.shape)}; they must be (batch, time).")
    for name in ("input_ids", "attention_mask", "position_ids"):
        value = batch.inputs.get(name)
        if not isinstance(value, torch.Tensor) or value.dim() != 2:
            continue
        broadcast = name == "position_ids" and value.shape == (1, batch.shape[1])
        if tuple(value.shape) != batch.shape and not broadcast:
            raise ValueError(f"{name} has shape {tuple(value.shape)} and the labels {batch.shape}; they must agree.")
    if _packed_beside_a_mask(batch.inputs):
        raise ValueError(
            "position_ids start again within a row, so several sequences are packed in it, and there is an "
            "attention_mask too, by which transformers attends across their borders. Leave attention_mask out."
        )
    if batch.ref_logps is not None:
        for branch, logps in zip(("chosen", "rejected"), batch.ref_logps, strict=True):
            if logps.shape != (batch.shape[0] // 2,):
                raise ValueError(
                    f"ref_{branch}_logps has shape {tuple(logps.shape)}; {batch.shape[0] // 2} pairs need "
                    f"({batch.shape[0] // 2},)."
                )
    for name, column in batch.columns.items():
        if name == "path_logps" and not isinstance(column, torch.Tensor):
            raise TypeError(f"path_logps is a {type(column).__name__}; it must be a tensor of the labels' shape.")
        if name == "path_logps" and column.shape != batch.labels.shape:
            raise ValueError(
                f"path_logps have shape {tuple(column.shape)} and the labels {batch.shape}; they must agree, one "
                "log-probability per label, unshifted."
            )
