"""What a forward has, for rules that make weights from it.

No second forward runs. The head runs once more only where the forward kept no logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batches.batch import Batch
from ..models.changes import Changes
from ..models.decoder import last_hidden
from ..models.modes import autocast_without_cache, without_noise
from ..models.structure import causal_lm, unwrap
from ..models.tensors import accumulation_dtype
from .compare import ROWS
from .head import check_head, chunk_of, head_of, logits_of_hidden


class Forward:
    """One forward of the model, as a function of token weights sees it. Nothing here has a gradient.

    All is aligned with the labels: what concerns a label stands in its column, though the position before predicts it.

    Attributes:
        labels (`torch.Tensor`): `(B, T)` int64, -100 where there is none; for pairs, chosen answers first.
        hidden (`torch.Tensor`): `(B, T, hidden)` last hidden state; the position t predicts the label t + 1.
        batch (`Batch`): the batch; the model's other inputs are in `batch.inputs`, further columns in `batch.columns`.
    """

    def __init__(self, model: nn.Module, batch: Batch, hidden: torch.Tensor) -> None:
        self.batch, self.labels = batch, batch.labels
        self.hidden = hidden.detach()[:, -batch.shape[1] :]  # behind any virtual tokens
        self._model = model
        self._found: dict[str, torch.Tensor] = {}
        self._logits: torch.Tensor | None = None
        self._columns: torch.Tensor | None = None  # the positions that have logits, if not all have
        self._virtual = hidden.shape[1] > batch.shape[1]
        self._autocast = autocast_without_cache(hidden.device.type)  # as of the model's own head

    @cached_property
    def logps(self) -> torch.Tensor:
        """`(B, T)` log p(label), in nats; 0 where there is none."""
        if "log_probs" in self._found:
            return self._found["log_probs"]
        return self._at_labels(lambda logits, label: -F.cross_entropy(logits, label, reduction="none"))

    @cached_property
    def entropies(self) -> torch.Tensor:
        """`(B, T)` entropy of the prediction over the whole vocabulary, in nats; 0 where there is no label."""
        return (
            self._found["entropy"] if "entropy" in self._found else self._at_labels(lambda logits, _: _entropy(logits))
        )

    def top_entropies(self, count: int) -> torch.Tensor:
        """`(B, T)` entropy over the `count` likeliest tokens, probabilities scaled to a sum of 1; in nats."""
        return self._at_labels(lambda logits, _: _entropy(logits.topk(min(count, logits.shape[-1])).values))

    def take(self, output: Any, kwargs: Mapping[str, Any]) -> None:
        """Take from the model's output what is there: logits, or the log-probabilities of TRL's fused head."""
        length = self.labels.shape[1]
        for name in ("log_probs", "entropy"):
            value = getattr(output, name, None)
            if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] >= length - 1:
                self._found[name] = F.pad(value.detach()[:, 1 - length :] if length > 1 else value[:, :0], (1, 0))
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[0] != self.labels.shape[0]:
            return
        columns = kwargs.get("logits_to_keep")
        if isinstance(columns, torch.Tensor) and self._virtual:
            return  # they count virtual tokens too
        if isinstance(columns, torch.Tensor) and columns.dim() == 1 and len(columns) == logits.shape[1]:
            wanted = self.batch.rows.any(0).nonzero().flatten()
            if bool(torch.isin(wanted, columns).all()):
                self._logits = logits.detach()
                self._columns = columns.new_zeros(length).scatter_(0, columns, torch.arange(len(columns)).to(columns))
        elif logits.shape[1] >= length:
            self._logits = logits.detach()[:, -length:]

    def release(self) -> None:
        """Free logits and hidden state."""
        self._logits = None
        del self.hidden

    @torch.no_grad()
    def _at_labels(self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`compute(logits (N, vocabulary), labels (N,))`, a chunk of the rows before labels at a time."""
        rows, (index, labels) = self.batch.rows, self.batch.predicting
        if self._logits is None:
            check_head(self._model, self.batch)
        size = min(ROWS, chunk_of(self._model))
        dtype = accumulation_dtype(self.hidden)
        found = [torch.zeros(0, dtype=dtype, device=labels.device)]
        for here, label in zip(index.split(size), labels.split(size), strict=True):
            logits = self._logits_of(here).to(dtype)
            found.append(compute(logits, label.to(logits.device)).to(labels.device))
        whole = torch.zeros(rows.numel(), dtype=dtype, device=labels.device)
        return self.batch.at_labels(whole.index_copy_(0, index, torch.cat(found)).view(rows.shape))

    def _logits_of(self, index: torch.Tensor) -> torch.Tensor:
        """`(N, vocabulary)` of flat positions."""
        if self._logits is not None:
            length = self.labels.shape[1]
            row, column = index // length, index % length
            column = column if self._columns is None else self._columns.to(column.device)[column]
            return self._logits[row.to(self._logits.device), column.to(self._logits.device)]
        head = head_of(self._model)
        with self._autocast, without_noise(head):
            hidden = self.hidden.flatten(0, 1)[index.to(self.hidden.device)]
            return logits_of_hidden(self._model, hidden.to(head.weight.device))  # type: ignore[arg-type]


@contextlib.contextmanager
def outputs_of(model: nn.Module, on_output: Callable[[Any, Mapping[str, Any]], None]) -> Iterator[None]:
    """Pass on what forwards of the model with grad return, and the keywords that they were called with."""

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            on_output(output, kwargs)

    with Changes() as changes:
        for module in dict.fromkeys((causal_lm(model), unwrap(model))):  # PEFT calls the first's `forward`
            changes.hook(module, end, with_kwargs=True)
        yield


def forward_of(model: nn.Module, batch: Batch) -> Forward:
    """Run a forward for this purpose, without grad and dropout."""
    inner = unwrap(model)
    with torch.no_grad(), without_noise(inner):
        return Forward(inner, batch, last_hidden(inner, batch))


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0)).sum(-1)
