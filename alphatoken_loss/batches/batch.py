"""One view of a batch: labels, response rows, branches, sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """A batch as the library sees it.

    Attributes:
        inputs (`dict`): keyword arguments for the model, labels excluded; `input_ids` is `(B, T)`.
        labels (`torch.Tensor`): `(B, T)` int64, unshifted, -100 where a token is not part of a response.
        pairs (`bool`): whether the first half of the rows are chosen and the second half rejected answers.
        ref_logps (`tuple` or `None`): precomputed `(chosen, rejected)` reference log-probabilities, `(B/2,)` each.
        columns (`dict`): further numbers for each token, by name; `(B, T)` each, aligned with the labels.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    pairs: bool = False
    ref_logps: tuple[torch.Tensor, torch.Tensor] | None = None
    columns: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.labels.shape[0], self.labels.shape[1]

    @property
    def size(self) -> int:
        """The number of rows, or of pairs: what `part` takes places of."""
        return self.shape[0] // 2 if self.pairs else self.shape[0]

    @cached_property
    def rows(self) -> torch.Tensor:
        """`(B, T)` bool: position t predicts a response token, `labels[t + 1]`."""
        return F.pad(self.labels[:, 1:] != IGNORE, (0, 1))

    @cached_property
    def predicting(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat positions `(N,)` that predict response tokens, and these `(N,)`. Their number is waited for once."""
        index = self.rows.flatten().nonzero().flatten()
        return index, self.labels.roll(-1, 1).flatten()[index]

    @cached_property
    def attended(self) -> torch.Tensor | None:
        """`(B, T)` bool: real tokens, or `None` where there is no padding mask."""
        mask = self.inputs.get("attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    @cached_property
    def packed(self) -> bool:
        """Whether a row holds several sequences: `position_ids` start again at each of them."""
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
        """`(B, T)` int64: the number of the threshold for each position, -1 where it predicts no response token."""
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
        return Batch(inputs, self.labels[rows], columns={name: column[rows] for name, column in self.columns.items()})

    def part(self, places: slice) -> Batch:
        """Some of the rows; of a batch of pairs, some of the pairs."""
        if not self.pairs:
            return self.of_rows(places)
        chosen = torch.arange(self.size, device=self.labels.device)[places]
        found = self.of_rows(torch.cat([chosen, chosen + self.size]))
        ref_logps = self.ref_logps and (self.ref_logps[0][places], self.ref_logps[1][places])
        return replace(found, pairs=True, ref_logps=ref_logps)

    def chosen(self) -> Batch:
        """The batch itself, or the chosen half of pairs as an SFT batch."""
        return self.of_rows(slice(self.size)) if self.pairs else self

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        ref_logps = self.ref_logps and (self.ref_logps[0].to(device), self.ref_logps[1].to(device))
        columns = {name: column.to(device) for name, column in self.columns.items()}
        return Batch(inputs, self.labels.to(device), self.pairs, ref_logps, columns)

    def sequences(self) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Yield each sequence with a response (each pair) alone: `(rows, batch)`, with its row numbers in this batch.

        A packed row stays whole, since its sequences do not see each other: only the labels of the others are removed.
        """
        size = self.shape[0]
        places = self.segments
        if self.pairs:
            places = torch.arange(size // 2, device=places.device).repeat(2)[:, None].expand(self.shape)
        for number in places[self.rows].unique():
            belongs = places == number
            rows = belongs.any(1).nonzero().flatten()
            predicted = F.pad(belongs[rows, :-1], (1, 0))  # a label belongs to the sequence of the position before it
            alone = self.of_rows(rows)
            labels = alone.labels.masked_fill(~predicted, IGNORE)
            ref_logps = self.ref_logps and tuple(logps[number : number + 1] for logps in self.ref_logps)
            yield rows, Batch(alone.inputs, labels, self.pairs, ref_logps, alone.columns)  # type: ignore[arg-type]

    def unpacked(self, size: int = 8) -> Iterator[Batch]:
        """A packed batch as padded ones with at most `size` rows, a sequence in each; others, and pairs, as they are.

        Sequences without a response are left out, and inputs that are not one number a token, which say where sequences
        begin.
        """
        if self.pairs or not self.packed:
            yield self
            return
        numbers = self.segments.flatten()
        lengths = numbers.bincount()
        starts = lengths.cumsum(0) - lengths
        answered = numbers[self.rows.flatten()].unique()
        for some in answered.split(size):
            along = torch.arange(int(lengths[some].max()), device=numbers.device)
            there = along < lengths[some, None]
            places = torch.where(there, starts[some, None] + along, 0)
            ids, labels = (x.flatten()[places] for x in (self.inputs["input_ids"], self.labels))
            inputs = {"input_ids": ids.masked_fill(~there, 0), "attention_mask": there.long()}
            columns = {name: column.flatten()[places].masked_fill(~there, 0) for name, column in self.columns.items()}
            yield Batch(inputs, labels.masked_fill(~there, IGNORE), columns=columns)

    def at_labels(self, rows: torch.Tensor) -> torch.Tensor:
        """Move `(B, T)` numbers from the positions that predict to the labels they predict: from column t to t + 1."""
        return F.pad(rows.masked_fill(~self.rows, 0)[:, :-1], (1, 0))
