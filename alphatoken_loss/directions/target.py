"""The target gradient: which way the scored adapters would move to lower the validation loss (Eq. 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig, read_config
from ..models import tensors
from ..models.changes import undoing
from ..models.processes import all_counts, all_sum
from ..models.sites import Scored, find_scored
from ..models.tensors import accumulation_dtype
from .gradients import scored_gradients


@dataclass(frozen=True)
class Target:
    """Gradient of the mean validation loss over the scored adapters.

    Attributes:
        gradients (`dict`): parameter name, as in `model.named_parameters()`, -> tensor of the parameter's shape in
            float32 (float64 for a float64 model): (1 / N) * sum over the N validation response tokens of the gradient
            of -log p.
        tokens (`float`): N; of a running average, the average of those it was made from.
    """

    gradients: Mapping[str, torch.Tensor]
    tokens: float

    def __repr__(self) -> str:
        return f"<Target: {len(self.gradients)} parameters, from {self.tokens:g} tokens>"

    def averaged(self, newer: Target, decay: float) -> Target:
        """A running average of the gradient sums, divided by one of the token counts; so its start has no bias."""
        kept, added = decay * self.tokens, (1 - decay) * newer.tokens
        before = tensors.scaled(self.gradients, kept / (kept + added))
        return Target(tensors.added(before, newer.gradients, added / (kept + added)), kept + added)

    def check(self, scored: Scored) -> None:
        """Check that it was made for these scored parameters.

        Raises:
            ValueError: a scored parameter is missing or of another shape.
        """
        for name, parameter in scored.parameters.items():
            gradient = self.gradients.get(name)
            if gradient is None or gradient.shape != parameter.shape:
                came = "none" if gradient is None else f"one of shape {tuple(gradient.shape)}"
                raise ValueError(
                    f"The target has {came} for the scored parameter {name} of shape {tuple(parameter.shape)}. It was "
                    "made for another model, adapter or num_layers: make it again with target_gradient(model, batches, "
                    "config=config)."
                )


def target_gradient(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, config: AlphaTokenConfig | None = None
) -> Target:
    """Gradient of the mean loss over validation response tokens, over the scored adapters (G of Eq. 8).

    Each batch is run forward with a graph of the scored blocks and the head only, and back through these; if the model
    is checkpointed, without a graph, and the blocks are then run again one at a time. The peak memory is below a
    training step's. Dropout is off. `.grad` and the model's mode are not touched.

    Args:
        model (`nn.Module`): the model in training.
        batches (`Iterable`): SFT batches of clean target-task examples (`input_ids`, `labels`, ...), of any sizes.
            For a preference batch its chosen answers count.
        config (`AlphaTokenConfig`, *optional*): its `num_layers` and `estimator` say what is scored.

    Returns:
        `Target`

    Raises:
        ValueError: no batch has a response token.

    Example:
        >>> target = target_gradient(model, validation_batches)
        >>> weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher)
    """
    config = read_config(config)
    return estimate_target(model, find_scored(model, config.scored_layers, config.scope), batches)


def in_parts(batches: Sequence[Mapping[str, Any] | Batch], count: int) -> list[list[Batch]]:
    """Divide the rows of batches into up to `count` parts, in their order.

    A part is a run of rows, not every n-th row: in a distributed run a process holds every n-th row, and so has an
    equal share of each part.
    """
    read = [read_batch(batch).chosen() for batch in batches]
    total = sum(batch.shape[0] for batch in read)
    parts: list[list[Batch]] = []
    for number in range(count):
        first, last, start = total * number // count, total * (number + 1) // count, 0
        parts.append([])
        for batch in read:
            rows = slice(max(first - start, 0), max(last - start, 0))
            start += batch.shape[0]
            parts[-1].append(batch.of_rows(rows))
    return [part for part in parts if any(bool(batch.rows.any()) for batch in part)]


@undoing
def estimate_target(model: nn.Module, scored: Scored, batches: Iterable[Mapping[str, Any] | Batch]) -> Target:
    sums: dict[str, torch.Tensor] = {}
    count = 0
    if isinstance(batches, Mapping):
        batches = [batches]
    for raw in batches:
        batch = read_batch(raw).chosen()
        tokens = int(batch.rows.sum())  # before it is moved: for a batch on the host no accelerator is waited for
        if not tokens:
            continue
        gradients = scored_gradients(model, scored, batch.to(scored.device))
        gradients = {name: gradient.to(accumulation_dtype(gradient)) for name, gradient in gradients.items()}
        sums = tensors.added(sums, gradients) if sums else gradients
        count += tokens
    if not sums:  # a rank without a batch still takes part in the sum
        sums = {n: torch.zeros_like(p, dtype=accumulation_dtype(p)) for n, p in scored.parameters.items()}
    all_sum(list(sums.values()))
    (count,) = all_counts([count], scored.device)
    if not count:
        raise ValueError("The target batches hold no response token (no label other than -100). Give some.")
    return Target(tensors.scaled(sums, 1 / count), count)
