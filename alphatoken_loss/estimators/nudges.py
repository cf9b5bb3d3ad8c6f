"""How far the difference estimator nudges."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..directions.parts import Parts
from ..directions.source import Source
from ..models.sites import Scored
from .base import Memory

# For 4-bit and 8-bit linears the dtype they compute in counts, not that of the weight; 8-bit rounds activations too.
_INT8_ROUNDOFF = 2.0**-8
_TF32_ROUNDOFF = 2.0**-11
_KEPT = ("length", "longest", "effect")
LONGEST = 100.0  # times the norm of the parameters


class Nudges(Memory):
    """Lengths of the nudges, kept from batch to batch: the effect of each step sets the length of the next.

    Attributes:
        length (`dict`): part of the value -> |eps D| of its next nudge, a 0-dim tensor.
        longest (`dict`): part -> upper limit of that length, however small the effect is.
        effect (`dict`): part -> relative change of the hidden state by the last nudge that changed it.
    """

    def __init__(self, config: AlphaTokenConfig) -> None:
        super().__init__(config)
        self.wanted = config.difference_rms
        self.length: dict[str, torch.Tensor] = {}
        self.longest: dict[str, torch.Tensor] = {}
        self.effect: dict[str, torch.Tensor] = {}
        self._roundoff: float | None = None
        self._scaled: bool | None = None  # whether the optimizer scaled the last direction

    def prepare(self, source: Source, scored: Scored, batch: Batch) -> Parts:
        parts = source.directions(scored, batch)
        scaled = source.optimizer is not None and bool(source.optimizer.state)
        if scaled and self._scaled is False:
            self.length.clear()  # those of another direction
        self._scaled = scaled
        return parts

    def figures(self) -> dict[str, float]:
        return {"difference_rms": float(self.effect["total"])} if "total" in self.effect else {}

    def state_dict(self, source: Source) -> dict[str, torch.Tensor]:
        state = {f"{kind}.{part}": tensor for kind in _KEPT for part, tensor in getattr(self, kind).items()}
        return state if self._scaled is None else {**state, "scaled": torch.tensor(self._scaled)}

    def load_state_dict(self, source: Source, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        for kind in _KEPT:
            named = ((name.partition("."), tensor.to(device)) for name, tensor in state.items())
            setattr(self, kind, {part: tensor for (of, _, part), tensor in named if of == kind})
        self._scaled = bool(state["scaled"]) if "scaled" in state else None

    def effect_wanted(self, decoder: nn.Module, device: torch.device) -> float:
        """`difference_rms`, or the square root of the unit roundoff of the coarsest precision in use."""
        if self.wanted is not None:
            return self.wanted
        if self._roundoff is None:
            self._roundoff = _roundoff(decoder, device)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float64
        return max(self._roundoff, torch.finfo(autocast).eps / 2) ** 0.5

    def learn(self, part: str, effect: torch.Tensor, wanted: float) -> None:
        """Set the next length by this step's effect, which is nearly proportional to it. The device is not waited for.

        A batch without an effect (no response token, or none that the nudge reaches) changes nothing.
        """
        shown = effect.isfinite() & (effect > 0)
        self.effect[part] = torch.where(shown, effect, self.effect.get(part, effect))
        longer = self.length[part] * (wanted / effect).clamp(1e-2, 1e2)
        self.length[part] = torch.where(shown, longer, self.length[part]).minimum(self.longest[part])


def _roundoff(decoder: nn.Module, device: torch.device) -> float:
    computing = {p.dtype for p in decoder.parameters() if p.is_floating_point() and p.dtype.itemsize >= 2}
    for module in decoder.modules():
        compute_dtype = getattr(module, "compute_dtype", None)
        if hasattr(module, "quant_state") and isinstance(compute_dtype, torch.dtype):
            computing.add(compute_dtype)
    # Norms of a float64 model compute in float32 too: transformers writes them so.
    roundoff = max(torch.finfo(dtype).eps / 2 for dtype in computing | {torch.float32})
    if any(type(parameter).__name__ == "Int8Params" for parameter in decoder.parameters()):
        roundoff = max(roundoff, _INT8_ROUNDOFF)
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        roundoff = max(roundoff, _TF32_ROUNDOFF)
    return roundoff
