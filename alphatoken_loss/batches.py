"""Every form of batch that comes in -> one view of it: labels, response rows, branches, sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100
_NOT_FOR_THE_MODEL = {"labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps", "num_items_in_batch"}


@dataclass(frozen=True)
class Batch:
    """A batch as the library sees it.

    Attributes:
        inputs (`dict`): keyword arguments for the model, labels excluded; `input_ids` is `(B, T)`.
        labels (`torch.Tensor`): `(B, T)` int64, unshifted, -100 where a token is not part of a response.
        pairs (`bool`): whether the first half of the rows are chosen and the second half rejected answers.
        ref_logps (`tuple` or `None`): precomputed `(chosen, rejected)` reference log-probabilities, `(B/2,)` each.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    pairs: bool = False
    ref_logps: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.labels.shape[0], self.labels.shape[1]

    @cached_property
    def rows(self) -> torch.Tensor:
        """`(B, T)` bool: position t predicts a response token, `labels[t + 1]`."""
        return F.pad(self.labels[:, 1:] != IGNORE, (0, 1))

    @cached_property
    def attended(self) -> torch.Tensor | None:
        """`(B, T)` bool: real tokens, or `None` where there is no padding mask."""
        mask = self.inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @cached_property
    def packed(self) -> bool:
        """Whether rows hold several sequences, told apart by `position_ids` that start again."""
        positions = self.inputs.get("position_ids")
        if self.attended is not None or not isinstance(positions, torch.Tensor) or positions.dim() != 2:
            return False
        return bool((positions[:, 1:] != positions[:, :-1] + 1).any())

    @cached_property
    def segments(self) -> torch.Tensor:
        """`(B, T)` int64: the number of the sequence that each position belongs to, counted over the whole batch."""
        batch, length = self.shape
        device = self.labels.device
        row = torch.arange(batch, device=device)[:, None].expand(batch, length)
        if not self.packed:
            return row
        positions = self.inputs["position_ids"].to(device).expand(batch, length)
        starts = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0), value=False)
        starts[:, 0] = True
        return starts.flatten().cumsum(0).view(batch, length) - 1

    def groups(self, scope: str) -> torch.Tensor:
        """`(B, T)` int64: which threshold each row falls under, -1 where there is no response token."""
        if scope == "sequence":
            groups = self.segments
        else:
            groups = torch.zeros_like(self.labels, dtype=torch.long)
            if self.pairs:
                groups[self.shape[0] // 2 :] = 1
        return groups.masked_fill(~self.rows, -1)

    def of_rows(self, rows: slice | torch.Tensor) -> Batch:
        """Some rows as an SFT batch."""
        size = self.shape[0]
        inputs = {
            key: value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (size,) else value
            for key, value in self.inputs.items()
        }
        return Batch(inputs, self.labels[rows])

    def chosen(self) -> Batch:
        """The batch itself, or the chosen half of pairs as an SFT batch."""
        return self.of_rows(slice(self.shape[0] // 2)) if self.pairs else self

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        ref_logps = self.ref_logps and (self.ref_logps[0].to(device), self.ref_logps[1].to(device))
        return Batch(inputs, self.labels.to(device), self.pairs, ref_logps)

    def sequences(self) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Each sequence with a response by itself, or each pair: `(rows, batch)`, `rows` being its row numbers here.

        Of a packed row the whole is kept, since other sequences' tokens are seen by none of its own; their labels go.
        """
        size = self.shape[0]
        places = self.segments
        if self.pairs:
            places = torch.arange(size // 2, device=places.device).repeat(2)[:, None].expand(self.shape)
        for number in places[self.rows].unique():
            belongs = places == number
            rows = belongs.any(1).nonzero().flatten()
            predicted = F.pad(belongs[rows, :-1], (1, 0))  # a label is its row's, which stands one before
            alone = self.of_rows(rows)
            labels = alone.labels.masked_fill(~predicted, IGNORE)
            ref_logps = self.ref_logps and tuple(logps[number : number + 1] for logps in self.ref_logps)
            yield rows, Batch(alone.inputs, labels, self.pairs, ref_logps)  # type: ignore[arg-type]

    def at_labels(self, rows: torch.Tensor) -> torch.Tensor:
        """Move what belongs to rows (`(B, T)`) to the labels they predict: row t goes to column t + 1."""
        return F.pad(rows.masked_fill(~self.rows, 0)[:, :-1], (1, 0))


def read_batch(batch: Mapping[str, Any] | Batch, *, pairs: bool | None = None) -> Batch:
    """Read a batch in any of the forms in README, "Batches".

    Args:
        batch (`Mapping`): what TRL's SFT and preference collators yield, or separate `chosen_*` / `rejected_*` keys.
        pairs (`bool`, *optional*): require (True) or refuse (False) preference pairs; by default both are read.

    Raises:
        TypeError: `batch` is not a mapping.
        ValueError: keys are missing, shapes disagree, or the pairs are not an even number of rows.
    """
    if isinstance(batch, Batch):
        read = batch
    elif not isinstance(batch, Mapping):
        raise TypeError(f"batch is a {type(batch).__name__}; it must be a mapping of names to tensors.")
    elif "chosen_input_ids" in batch or "rejected_input_ids" in batch:
        read = _stack_branches(batch)
    else:
        read = _read_stacked(batch, pairs)
    if pairs is not None and read.pairs != pairs:
        came, wanted = ("preference pairs", "`labels`") if read.pairs else ("`labels`", "`completion_mask`")
        raise ValueError(
            f"The batch holds {came} where one with {wanted} is needed; its keys are {sorted(read.inputs)}."
        )
    _check_shapes(read)
    return read


def _read_stacked(batch: Mapping[str, Any], pairs: bool | None) -> Batch:
    if "input_ids" not in batch:
        raise ValueError(f"The batch has no `input_ids`; its keys are {sorted(batch)}.")
    ids = batch["input_ids"]
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL and value is not None}
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
        chosen, rejected = batch.get("ref_chosen_logps"), batch.get("ref_rejected_logps")
        ref_logps = None if chosen is None or rejected is None else (chosen, rejected)
        return Batch(inputs, ids.masked_fill(mask == 0, IGNORE), True, ref_logps)
    if batch.get("labels") is None:
        raise ValueError(
            "The batch has neither `labels` (-100 where a token is not trained on) nor `completion_mask` (stacked "
            f"preference pairs); its keys are {sorted(batch)}. Add one of them."
        )
    return Batch(inputs, batch["labels"])


def _stack_branches(batch: Mapping[str, Any]) -> Batch:
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
    chosen, rejected = batch.get("ref_chosen_logps"), batch.get("ref_rejected_logps")
    ref_logps = None if chosen is None or rejected is None else (chosen, rejected)
    return Batch({"input_ids": ids, "attention_mask": attention}, labels, True, ref_logps)


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
    if batch.ref_logps is not None:
        for branch, logps in zip(("chosen", "rejected"), batch.ref_logps, strict=True):
            if logps.shape != (batch.shape[0] // 2,):
                raise ValueError(
                    f"ref_{branch}_logps has shape {tuple(logps.shape)}; {batch.shape[0] // 2} pairs need "
                    f"({batch.shape[0] // 2},)."
                )
