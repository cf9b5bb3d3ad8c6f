"""Figures for a logger: sums over valued batches, read as means since they were last read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from ..batches.batch import Batch
from ..losses.kl import Penalty
from ..values import TokenValues

_TERMS = ("total", "direct_target", "causal_target", "direct_drift", "causal_drift")


class Figures:
    """Sums since the last `read`. On an accelerator nothing waits for the device until then.

    Attributes:
        seconds (`float`): time spent valuing.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._reads = 0
        self._sums: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {}  # each with its number of tokens

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """If what runs inside fails, do not count it, unless figures were read inside."""
        before = self._reads, self.seconds, dict(self._sums)
        try:
            yield
        except BaseException:
            if before[0] == self._reads:
                _, self.seconds, self._sums = before
            raise

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """What runs inside is spent valuing."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def add(self, values: TokenValues | None, weights: torch.Tensor, batch: Batch) -> None:
        """Count a batch by its weights `(B, T)` and, if it was valued, its values."""
        kept, weights = weights != 0, weights.float()
        figures = {"kept": kept, "weight": weights, "uneven": (weights - kept.float()).abs()}
        figures |= {name: term for name in _TERMS if (term := getattr(values, name, None)) is not None}
        tokens = batch.rows.sum()
        for name, figure in figures.items():
            self._add(name, figure.sum(), tokens)

    def add_kl(self, name: str, penalty: Penalty) -> None:
        """Count a batch's KL, if its forward has run."""
        if penalty.total is not None:
            self._add(name, penalty.total, penalty.batch.rows.sum())

    def _add(self, name: str, figure: torch.Tensor, tokens: torch.Tensor) -> None:
        total, count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = total + figure, count + tokens

    def read(self) -> dict[str, float]:
        """Means over the response tokens since the last call: `kept`, `weight` (if weights are not all 0 or 1), the
        terms of the value, the KLs; and `seconds`."""
        self._reads += 1
        sums, self._sums = self._sums, {}
        seconds, self.seconds = self.seconds, 0.0
        figures = {name: float(total) / float(count) for name, (total, count) in sums.items() if count}
        if not figures.pop("uneven", 0.0):
            figures.pop("weight", None)
        return {**figures, "seconds": seconds}
