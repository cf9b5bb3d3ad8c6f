"""Without a target, the sequences of a batch are valued against each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batches.batch import Batch


@dataclass(frozen=True)
class Groups:
    """Positions of a batch arranged in groups, each with one matrix C: `(B, T, n)` <-> `(G, N, n)`.

    Attributes:
        shape (`tuple`): `(B, T)`.
        index (`torch.Tensor`, *optional*): `(G, N)` positions in the flattened batch; without it one group holds all.
        present (`torch.Tensor`, *optional*): `(G, N, 1)` bool, False where `index` is only filling.
        place (`torch.Tensor`, *optional*): `(B * T,)`, where in the flattened groups each position is.
    """

    shape: tuple[int, int]
    index: torch.Tensor | None = None
    present: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def to_groups(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(1, -1, tensor.shape[-1])
        if self.index is None:
            return flat
        return flat[0][self.index].masked_fill(~self.present, 0)  # type: ignore[operator]

    def to_batch(self, grouped: torch.Tensor) -> torch.Tensor:
        flat = grouped.flatten(0, 1)
        return (flat if self.place is None else flat[self.place]).view(*self.shape, -1)

    @classmethod
    def of(cls, groups: torch.Tensor) -> Groups:
        """From `(B, T)` int64 group numbers 0 .. G - 1."""
        flat, numbers = groups.flatten(), torch.arange(groups.numel(), device=groups.device)
        order, sizes = flat.argsort(stable=True), torch.bincount(flat)
        width = int(sizes.max())
        ranks = numbers - (sizes.cumsum(0) - sizes)[flat[order]]
        place = torch.empty_like(order)
        place[order] = flat[order] * width + ranks
        index = torch.zeros(len(sizes) * width, dtype=torch.long, device=groups.device).scatter(0, place, numbers)
        present = torch.arange(width, device=groups.device) < sizes[:, None]
        return cls((groups.shape[0], groups.shape[1]), index.view(-1, width), present[..., None], place)


@dataclass(frozen=True)
class Others:
    """Each group of sequences is valued against the mean gradient of the other groups, made in the same backward.

    Attributes:
        groups (`torch.Tensor`): `(B, T)` int64, 0 .. G - 1.
        validating (`torch.Tensor`): `(B, T)` factors. A position's gradient times its factor is its share in the target
            of the other groups: the gradient of the response's negative log-likelihood, or 0.
        counts (`torch.Tensor`): `(G,)`, the number of response tokens in that share.
    """

    groups: torch.Tensor
    validating: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, omega: torch.Tensor | None = None) -> Others:
        """Each sequence against the others; for pairs, each pair against the chosen answers of the other pairs.

        Args:
            omega (`torch.Tensor`, *optional*): `(P,)`, by which a preference loss multiplies each pair's gradients.

        Raises:
            ValueError: there is only one sequence (one pair) with a response.
        """
        groups, validating = batch.segments, torch.ones(batch.shape, dtype=torch.float64, device=batch.labels.device)
        if batch.pairs:
            half = batch.shape[0] // 2
            groups = torch.arange(half, device=groups.device).repeat(2)[:, None].expand(batch.shape)
            validating[half:] = 0
            if omega is not None:
                validating[:half] /= omega.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        counted = batch.rows & (validating > 0)
        counts = torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=groups.device)
        counts.index_add_(0, groups[counted], torch.ones_like(groups[counted], dtype=counts.dtype))
        if int((counts > 0).sum()) < 2:
            kind = "pair" if batch.pairs else "sequence"
            raise ValueError(
                f"The batch holds one {kind} with a response and there is no target, so nothing is left to validate it "
                f"against. Pass target=target_gradient(model, validation_batches), or a batch of two {kind}s or more."
            )
        return cls(groups, validating, counts)
