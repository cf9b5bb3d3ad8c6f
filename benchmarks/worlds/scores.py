"""The table of token scores that marks.py and counterfactual.py compare: values of the library's estimators, and what
rivals rank by. A further estimator is one line of `ESTIMATORS`, a further rival one of `RIVALS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from alphatoken_loss import AlphaTokenConfig, Fisher, Path, Target, alphatoken_weights, target_gradient

from .rivals import at_labels, base_of, eaft, entropy
from .rows import Batch


@dataclass
class Scored:
    """One batch before a model, and what scores may use.

    Attributes:
        validation (`list`): batches of clean examples of the target task.
        reference (`torch.Tensor` or `None`): `(B, T)` log-probabilities of the labels under RHO-1's reference.
        fisher: gives the Fisher that a config wants.
        stability_weight (`float`): lambda of the estimators; 0 without a Fisher.
        path: gives theta* for a config, made where training started.
        targets (`dict`): target gradients by what they cover, kept between batches of one state of the model.
    """

    model: Any
    batch: Batch
    validation: list[Batch]
    reference: torch.Tensor | None = None
    fisher: Callable[[AlphaTokenConfig], Fisher] | None = None
    path: Callable[[AlphaTokenConfig], Path] | None = None
    stability_weight: float = 0.0
    generator: torch.Generator | None = None
    optimizer: torch.optim.Optimizer | None = None  # for values of the step that it will take
    targets: dict[Any, Target] = field(default_factory=dict)
    _own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def own(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, T)` each: log-probabilities, entropies and EAFT's weights, of one forward."""
        if self._own is None:
            with torch.no_grad():
                logits, logps = at_labels(self.model, self.batch)
                self._own = logps, entropy(logits), eaft(logits, logps)
        return self._own

    @property
    def base_logps(self) -> torch.Tensor:
        with base_of(self.model) as base:
            return at_labels(base, self.batch)[1]

    def target(self, config: AlphaTokenConfig) -> Target:
        key = config.scored_layers, config.estimator == "difference"
        if key not in self.targets:
            self.targets[key] = target_gradient(self.model, self.validation, config=config)
        return self.targets[key]


Parts = dict[str, torch.Tensor]  # "total", and where known "adaptation" and "stability", `(B, T)`
Score = Callable[[Scored], Parts]


def valued(*, precondition: bool = False, **options: Any) -> Score:
    """The values of an estimator: higher is better.

    Args:
        precondition (`bool`): of the optimizer's step rather than of one along the gradient.
    """

    def score(at: Scored) -> Parts:
        config = AlphaTokenConfig(stability_weight=at.stability_weight, **options)
        given: dict[str, Any] = {"config": config}
        if config.estimator == "path":
            if at.path is None:
                raise ValueError("Values along the path were asked for without a path.")
            given["path"] = at.path(config)
        else:
            given["target"] = at.target(config)
            if at.fisher is not None and at.stability_weight > 0:
                given["fisher"] = at.fisher(config)
        if precondition:
            given["optimizer"] = at.optimizer
        _, values = alphatoken_weights(at.model, None, at.batch, return_values=True, **given)
        found = {name: getattr(values, name) for name in ("total", "adaptation", "stability")}
        return {name: value for name, value in found.items() if value is not None}

    return score


def _random(at: Scored) -> Parts:
    return {"total": torch.rand(at.batch["labels"].shape, generator=at.generator)}


def _early(at: Scored) -> Parts:
    places = (at.batch["labels"] != -100).cumsum(1).float()
    return {"total": -places}


def _excess(at: Scored) -> Parts:
    if at.reference is None:
        raise ValueError("RHO-1's score was asked for without the log-probabilities of its reference.")
    return {"total": at.reference - at.own[0]}


ESTIMATORS: dict[str, Score] = {
    "ghost K=3": valued(),
    "ghost all, W=0": valued(num_layers="all", causal_window=0),
    "difference": valued(estimator="difference"),
    "difference, Adam's step": valued(estimator="difference", precondition=True),
    "exact": valued(estimator="exact"),
    "path": valued(estimator="path"),
}
# Of a rival the total alone: what it keeps is high.
RIVALS: dict[str, Score] = {
    "excess loss (RHO-1)": _excess,
    "low loss": lambda at: {"total": at.own[0]},
    "high loss": lambda at: {"total": -at.own[0]},
    "low base perplexity (STM)": lambda at: {"total": at.base_logps},
    "entropy": lambda at: {"total": at.own[1]},
    "EAFT": lambda at: {"total": at.own[2]},
    "early in the answer": _early,
    "random": _random,
}
SCORES: dict[str, Score] = {**ESTIMATORS, **RIVALS}
