"""What chooses the tokens that are trained on: a selection.

It gives weights, one per label, in one of two places: before a batch's forward (`before`; it may run models itself), or
from what the training forward has (`after`). The selection by value gives none: there an estimator makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..losses.forward import Forward
from ..losses.weighting import checked_weights


@dataclass
class Selection:
    """A way to choose tokens. Subclasses are dataclasses; their further fields are the options a user can set.

    Args:
        config (`AlphaTokenConfig`): `rho` and `threshold_scope`, for those that keep a share.

    Attributes:
        valued: it chooses tokens by their values, which need a target, a Fisher and an estimator.
        pairs: it is for preference pairs alone.
    """

    config: AlphaTokenConfig

    valued: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    def _share(self) -> dict[str, Any]:
        return {"rho": self.config.rho, "threshold_scope": self.config.threshold_scope}

    @property
    def reference(self) -> bool:
        """Whether it compares with a reference model."""
        return False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a batch that it reads."""
        return ()

    def before(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None) -> Any:
        """`(B, T)` weights that are known before the forward of a batch; or None, and then `after` gives them.

        Args:
            seed (`int`, *optional*): for random selections; by default they use torch's global generator.
        """
        return None

    def after(self, forward: Forward) -> torch.Tensor:
        """`(B, T)` weights from what the training forward has."""
        raise NotImplementedError


@dataclass
class ByValue(Selection):
    """Tokens are chosen by their values (arXiv 2606.01635)."""

    valued: ClassVar[bool] = True


@dataclass
class Given(Selection):
    """Weights are given with each batch: `with alphatoken(batch, weights=w)`, or in its column `column`."""

    column: str | None = None
    negative: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def before(self, model: nn.Module, ref_model: nn.Module | None, batch: Batch, seed: int | None) -> torch.Tensor:
        if self.column is None:
            raise ValueError("No weights were given for this batch. Pass weights=.")
        if self.column not in batch.columns:
            raise ValueError(
                f"The batch has no column {self.column!r} of token weights. Put one number per label there (for "
                f"branches kept apart, chosen_{self.column} and rejected_{self.column}), or pass weights=."
            )
        return checked_weights(batch.columns[self.column], batch, negative=self.negative, what=self.column)


@dataclass
class ByFunction(Selection):
    """A user's function makes the weights from the forward."""

    function: Callable[[Forward], torch.Tensor]
    negative: bool = False

    def after(self, forward: Forward) -> torch.Tensor:
        what = "what the function token_weights returned"
        return checked_weights(self.function(forward), forward.batch, negative=self.negative, what=what)


def by_weights(
    config: AlphaTokenConfig, token_weights: Callable[[Forward], torch.Tensor] | str, negative: bool
) -> Given | ByFunction:
    """The selection for a user's own weights: by the name of a column, or by a function of the forward.

    Raises:
        ValueError: `rho=1.0` switches the gate off.
        TypeError: it is neither.
    """
    if config.rho >= 1.0:
        raise ValueError(
            "token_weights were given, but rho=1.0 switches the gate off. Set rho below 1, where it has no say."
        )
    if isinstance(token_weights, str):
        return Given(config, token_weights, negative)
    if callable(token_weights):
        return ByFunction(config, token_weights, negative)
    raise TypeError(
        f"token_weights is a {type(token_weights).__name__}; it must be a function of a forward or the name of a "
        "column. A tensor of one batch's weights goes into its context: `with alphatoken(batch, weights=...)`."
    )


def check_unvalued(config: AlphaTokenConfig, **given: object) -> None:
    """Raise ValueError if settings, or what was given, are for values or theta*, but tokens are chosen otherwise."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} was given, but tokens are not chosen by their values, and nothing else needs it. Leave it "
                "out, or the selection or token weights that choose them."
            )
    if config.path_kl > 0 or config.path_start:
        raise ValueError(
            f"path_kl is {config.path_kl} and path_start {config.path_start}, but tokens are not chosen by their "
            "values, so there is no theta*. Leave both out, or selection and token_weights."
        )
    for name, other in (("threshold", "quantile"), ("smoothing", 0)):
        value = getattr(config, name)
        if value != other:
            came = f'"{value}"' if isinstance(value, str) else value
            raise ValueError(
                f"{name} is {came}, but tokens are not chosen by their values. Leave it out, or selection and "
                "token_weights (a data set's column of that name too)."
            )
