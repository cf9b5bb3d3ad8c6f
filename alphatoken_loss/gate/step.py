"""One batch at the gate: an identity whose backward multiplies the batch's rows by their weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..estimators.base import NonFiniteRows
from ..models.changes import Changes, undoing
from ..models.layout import Kept
from ..models.sites import Scored, find_scored
from ..models.start import start_of
from ..models.structure import find_blocks, find_decoder, trained_behind, unwrap
from ..values import TokenValues
from .figures import Figures
from .weighers import Weigher

Record = Callable[[TokenValues | None, torch.Tensor | None, Batch], None]

UNMASKED = (
    "No forward of the model with grad ran in this AlphaToken context, so nothing was masked. Run the forward inside "
    "it, on the model that the AlphaToken was made for. (AlphaToken(..., strict=False) only warns.)"
)
GRAD_INSIDE = (
    "A forward with grad ran in an AlphaToken context that was entered without grad, so nothing was masked. Enter the "
    "context where grad is on. (AlphaToken(..., strict=False) only warns.)"
)
NESTED = (
    "This model is in an AlphaToken context already, and a second one would mask the same gradient again. Open one "
    "context for each forward; sft_loss and dpo_loss open it themselves where they are given an AlphaToken: call them "
    "outside, or inside without it."
)


def tell(message: str, strict: bool) -> None:
    """Raise, or warn, that nothing was masked."""
    if strict:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=7)


@contextlib.contextmanager
def unmasked(model: nn.Module, strict: bool) -> Iterator[None]:
    """For forwards without grad, which have nothing to mask. One with grad is an error, or, if not `strict`, warned of.

    Raises:
        RuntimeError: such a forward ran.
    """

    def look(*_: Any) -> None:
        if torch.is_grad_enabled():
            tell(GRAD_INSIDE, strict)

    with Changes() as changes:
        changes.hook(find_decoder(model), look, before=True)
        yield


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        ctx.step = step
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.step.mask(rows), None


class Step:
    """One batch, from the forward that is watched to the backward that is masked.

    Args:
        factors (`torch.Tensor` or `None`): of a batch whose weights are known.
        mean_over_kept (`bool`): see `AlphaToken.__call__`.
        figures (`Figures`): where the time is counted that valuing takes.
        record (`Callable`): takes the batch's values and weights `(B, T)` at the labels as soon as they are known; None
            for both where there are none, since the loss has overflowed.

    Attributes:
        factors (`torch.Tensor` or `None`): `(B, T)` bool or float, one factor for the gradient of each response row;
            `None` until weights are known.
        masked (`bool`): whether a backward has passed.
    """

    def __init__(
        self,
        batch: Batch,
        weigher: Weigher,
        factors: torch.Tensor | None,
        *,
        mean_over_kept: bool,
        figures: Figures,
        record: Record,
    ) -> None:
        self.batch, self.weigher, self.factors = batch, weigher, factors
        self.mean_over_kept, self.figures, self.record = mean_over_kept, figures, record
        self.failed = False
        self.masked = False

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hidden.requires_grad:
            raise ValueError(
                "The last block's output does not require grad, so no gradient will pass the gate. With reentrant "
                "checkpointing call model.enable_input_require_grads(); otherwise see that adapters are trainable."
            )
        if self.factors is None and self.weigher.in_forward:
            with self.figures.timed():
                self._weighed(*self.weigher.weigh(None))
        return _Gate.apply(hidden, self)

    def dropped(self) -> torch.Tensor:
        """`(B, T)` bool, True at rows whose tokens are dropped, when that is known."""
        assert self.factors is not None
        return self.batch.rows & (self.factors == 0)

    @undoing
    def mask(self, rows: torch.Tensor) -> torch.Tensor:
        batch = self.batch
        if self.failed:
            raise RuntimeError("Valuing this batch failed in an earlier backward. Run its forward again.")
        if self.factors is None:
            try:
                self.failed = True
                with self.figures.timed():
                    self._weighed(*self.weigher.weigh(rows))
                self.failed = False
            except NonFiniteRows:
                # The loss has overflowed: an fp16 loss scaler must see that.
                self.failed, self.factors = False, batch.rows
                self.record(None, None, batch)
            finally:
                self.weigher.release()
        assert self.factors is not None
        self.masked = True
        self.weigher.release()
        virtual = rows.shape[-2] - batch.shape[1]  # virtual tokens stand before the batch's own
        drop = F.pad(self.dropped(), (virtual, 0))
        rows = rows.masked_fill(drop[..., None], 0)  # multiplying by 0 would leave nan
        if self.factors.dtype != torch.bool:
            scale = F.pad(self.factors.masked_fill(~batch.rows, 1), (virtual, 0), value=1)
            rows = rows.mul_(scale[..., None])  # rows may be bf16: multiplied in the weights' precision
        if self.mean_over_kept:
            total = (self.factors * batch.rows).sum()
            rows = rows.mul_(batch.rows.sum() / torch.where(total == 0, 1, total))
        return rows

    def _weighed(self, values: TokenValues | None, weights: torch.Tensor) -> None:
        self.factors = weights.roll(-1, 1)
        self.record(values, weights, self.batch)


class ScoredOf:
    """What of a model is scored, if nothing is trained behind the gate; looked for anew where the model has changed."""

    def __init__(self, model: nn.Module, gate: str, config: AlphaTokenConfig) -> None:
        self.model, self.gate, self.config = model, gate, config
        self._kept: Kept[Scored] = Kept()

    def __call__(self) -> Scored:
        scored = self._kept.of(unwrap(self.model), self._find)
        scored.start = start_of(self.model)
        return scored

    def _find(self) -> Scored:
        check_nothing_behind(self.model, self.gate)
        return find_scored(self.model, self.config.scored_layers, self.config.scope)


def check_nothing_behind(model: nn.Module, gate: str) -> None:
    """Check that nothing is trained behind the gate, which is at the last `"block"` or the `"decoder"`.

    Raises:
        ValueError: something is, and the gate could not mask its gradient.
    """
    at_decoder = gate == "decoder"
    behind = trained_behind(model, None if at_decoder else find_blocks(model))
    if behind:
        place = "decoder" if at_decoder else "last block"
        masked = not at_decoder and not trained_behind(model)
        raise ValueError(
            f"{behind[0]} is trained and lies behind the {place}, where the gate cannot mask its gradient "
            f"({len(behind)} such parameters). Freeze them (if only adapters are to be trained, wrap the model "
            "with peft.get_peft_model first), "
            + ('set estimator="difference", whose gate lies behind them, ' if masked else "")
            + "or mask the loss itself: sft_loss(model, batch, alphatoken_weights(model, ref_model, batch))."
        )
