"""Estimators by name."""

from __future__ import annotations

from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..directions.parts import Parts
from ..models import tensors as foreach
from ..models.sites import Scored
from .difference import Difference
from .exact import Exact
from .ghost import Ghost
from .steps import Steps


def estimator_of(
    model: nn.Module,
    scored: Scored,
    batch: Batch,
    config: AlphaTokenConfig,
    parts: Parts,
    steps: Steps,
    *,
    apart: bool,
    in_graph: bool = False,
) -> Ghost | Exact | Difference:
    """The estimator that the config names, for one forward of one batch.

    Args:
        apart (`bool`): value adaptation and stability apart. The ghost estimator always does; the others need a pass
            for each.
        in_graph (`bool`): see `Ghost`.
    """
    if config.estimator == "ghost":
        return Ghost(scored, batch, config, parts, in_graph=in_graph)
    if not apart:
        total = parts.get("target")
        if "drift" in parts:
            drift, weight = parts["drift"], config.stability_weight
            total = foreach.scaled(drift, weight) if total is None else foreach.added(total, drift, weight)
        parts = {} if total is None else {"total": total}
    if config.estimator == "exact":
        return Exact(scored, batch, config, parts)
    return Difference(model, scored, batch, config, parts, steps)
