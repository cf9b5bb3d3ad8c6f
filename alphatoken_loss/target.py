"""The target gradient: which way the scored adapters would move to lower the validation loss (Eq. 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import foreach
from .batches import Batch, read_batch
from .blocks import Scored, find_scored
from .config import AlphaTokenConfig
from .distributed import all_sum
from .ghost import accumulation_dtype
from .preference import LossSum, check_loss, reference_logps
from .replay import capture_without_graph, loss_gradients


@dataclass(frozen=True)
class Target:
    """Gradient of the mean validation loss over the scored adapters.

    Attributes:
        gradients (`dict`): parameter name, as in `model.named_parameters()`, -> tensor of the parameter's shape in
            float32 (float64 for a float64 model): (1 / N) * sum over the N validation response tokens of the gradient
            of -log p, or over N pairs of that of their DPO loss.
        tokens (`float`): N; of a running average, the average of those it was made from.
    """

    gradients: Mapping[str, torch.Tensor]
    tokens: float

    def averaged(self, newer: Target, decay: float) -> Target:
        """An exponential average of validation sums over one of tokens: as unbiased at its start as later."""
        kept, added = decay * self.tokens, (1 - decay) * newer.tokens
        before = foreach.scaled(self.gradients, kept / (kept + added))
        return Target(foreach.added(before, newer.gradients, added / (kept + added)), kept + added)

    def check(self, scored: Scored) -> None:
        """See that it was made for these scored parameters.

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
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    config: AlphaTokenConfig | None = None,
    ref_model: nn.Module | None = None,
    beta: float = 0.1,
) -> Target:
    """Gradient of the mean loss over validation response tokens, over the scored adapters (G of Eq. 8).

    Each batch is run forward with a graph of the scored blocks and the head only, and back through these; if the model
    is checkpointed, without a graph, and the blocks are then run again one at a time. The peak memory is below a
    training step's. Dropout is off. `.grad` and the model's mode are not touched.

    Args:
        model (`nn.Module`): the model in training.
        batches (`Iterable`): SFT batches of clean target-task examples (`input_ids`, `labels`, ...), of any sizes.
            For a preference batch its chosen answers count.
        config (`AlphaTokenConfig`, *optional*): its `num_layers` and `estimator` say what is scored, its `target_loss`
            whether it is the mean DPO loss of validation pairs instead.
        ref_model (`nn.Module`, *optional*), beta (`float`): of that DPO loss, as in `dpo_loss`.

    Returns:
        `Target`

    Raises:
        ValueError: no batch has a response token; the batches are no pairs where the config wants them; beta <= 0.

    Example:
        >>> target = target_gradient(model, validation_batches)
        >>> weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher)
    """
    config = config or AlphaTokenConfig()
    check_loss("sigmoid", beta, 0.0)
    scored = find_scored(model, config.scored_layers, config.estimator)
    return estimate_target(model, scored, batches, config, ref_model, beta)


def read_targets(batches: Iterable[Mapping[str, Any] | Batch], config: AlphaTokenConfig) -> list[Batch]:
    """Validation batches in the form that `config.target_loss` takes.

    Raises:
        ValueError: it is `"dpo"`, and a batch is no preference batch.
    """
    if isinstance(batches, Mapping):
        batches = [batches]
    if config.target_loss == "dpo":
        return [read_batch(batch, pairs=True) for batch in batches]
    return [read_batch(batch).chosen() for batch in batches]


def with_reference(model: nn.Module, ref_model: nn.Module | None, batch: Batch, device: torch.device) -> Batch:
    """The batch with its reference log-probabilities, which then need not be computed again."""
    if not batch.pairs or batch.ref_logps is not None:
        return batch
    chosen, rejected = reference_logps(model, ref_model, batch.to(device)).chunk(2)
    return replace(batch, ref_logps=(chosen, rejected))


def in_parts(batches: Sequence[Batch], count: int) -> list[list[Batch]]:
    """Share the rows (pairs) of batches out over up to `count` parts, in their order.

    Runs of rows, not every fourth: a process of several that holds every n-th row then has the n-th share of each part.
    """
    total = sum(batch.examples for batch in batches)
    parts: list[list[Batch]] = []
    for number in range(count):
        first, last, start = total * number // count, total * (number + 1) // count, 0
        parts.append([])
        for batch in batches:
            size = batch.examples
            low, high = (min(max(bound - start, 0), size) for bound in (first, last))
            start += size
            parts[-1].append(batch.part(low, high))
    return [part for part in parts if any(bool(batch.rows.any()) for batch in part)]


def estimate_target(
    model: nn.Module,
    scored: Scored,
    batches: Iterable[Mapping[str, Any] | Batch],
    config: AlphaTokenConfig,
    ref_model: nn.Module | None,
    beta: float,
) -> Target:
    sums: dict[str, torch.Tensor] = {}
    count = 0
    # Block by block where memory is short; else by an ordinary backward from a graph of the scored blocks alone.
    by_blocks = scored.in_blocks and any(getattr(block, "gradient_checkpointing", False) for block in scored.blocks)
    first = scored.blocks[0] if scored.in_blocks else None
    for batch in read_targets(batches, config):
        tokens = int(batch.rows.sum())  # where the batch lies: on the host, an accelerator is not waited for
        if not tokens:
            continue
        batch = batch.to(scored.device)
        loss_sum = LossSum(model, ref_model, batch, beta)
        if by_blocks:
            capture, rows = capture_without_graph(model, scored, batch, loss_sum)
            gradients = capture.gradients(rows, scored.parameters)
        else:
            gradients = loss_gradients(model, scored.parameters, loss_sum, first=first)
        gradients = {name: gradient.to(accumulation_dtype(gradient)) for name, gradient in gradients.items()}
        sums = foreach.added(sums, gradients) if sums else gradients
        count += batch.examples if batch.pairs else tokens
    if not sums:  # a rank without a batch still takes part in the sum
        sums = {n: torch.zeros_like(p, dtype=accumulation_dtype(p)) for n, p in scored.parameters.items()}
    count = all_sum(list(sums.values()), count)
    if not count:
        raise ValueError("The target batches hold no response token (no label other than -100). Give some.")
    return Target(foreach.scaled(sums, 1 / count), count)
