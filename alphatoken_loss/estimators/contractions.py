"""The ghost estimator: position-local token values as contractions d^T C h (arXiv 2606.01635, Eqs. 8 to 12).

Take a scored linear with input h_t and output gradient d_t, and a matrix C of its weight's shape (the validation
gradient G or the drift gradient V). The value of position t is d_t^T C h_t.

On a LoRA layer y = W0 x + s B A x both linears are scored. If d is the gradient at B's output, the one at A's output is
B^T d. So d, x and A x are enough for both, and the rows of all temporaries have the size of the rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..batches.batch import Batch
from ..directions.parts import Parts
from ..models.attention import AttentionCall
from ..models.sites import LinearSite, LoraSite, Scored, Site
from ..models.tensors import accumulation_dtype
from .others import Groups, Others

Directions = Mapping[str, list[torch.Tensor]]  # by parameter name


class _LoraContraction:
    """d^T C h on both linears of a LoRA layer, for J matrices at once; everything `(G, N, .)`."""

    def __init__(self, site: LoraSite, groups: Groups, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        self.groups = groups
        self.error = error
        self.x, self.ax = (groups.to_groups(tensor) for tensor in inputs)
        self.b = site.b.weight.to(error.dtype)
        self.trains_a, self.trains_b = site.a.weight.requires_grad, site.b.weight.requires_grad
        self.names = tuple(site.parameters)

    def set_direction(self, direction: Directions) -> None:
        """`direction` has J tensors for each parameter, of its shape, or of `(G, ...)` with one for each group."""
        rank = self.b.shape[1]
        self.right: torch.Tensor | None = None
        if self.names[0] in direction:
            self.right = (self.x @ torch.cat(direction[self.names[0]], -2).mT).unflatten(-1, (-1, rank))
        # Columns: first B, since d B is the gradient at A's output; then each C_B.
        at_b = direction.get(self.names[1], [])
        self.columns = torch.cat([self.b.expand(*at_b[0].shape[:-2], -1, -1), *at_b], -1) if at_b else self.b

    def direct(self) -> torch.Tensor:
        self.left = self.groups.to_groups(self.error) @ self.columns
        return self.groups.to_batch(self._combine(self.left))

    def causal(self, attention: AttentionCall, window: int, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        left = self.left  # from `direct`, if every output row is an attention value
        if rows.numel() < self.error.shape[-1]:
            left = self.groups.to_groups(self.error[..., rows]) @ self.columns[..., rows, :]
        left = attention.propagate(self.groups.to_batch(left), window, batch)
        return self.groups.to_batch(self._combine(self.groups.to_groups(left)))

    def _combine(self, left: torch.Tensor) -> torch.Tensor:
        rank = self.b.shape[1]
        at_a, at_b = left[..., None, :rank], left[..., rank:].unflatten(-1, (-1, rank))
        if self.right is None:
            return (at_b * self.ax[..., None, :]).sum(-1)
        if not at_b.shape[-2]:
            return (at_a * self.right).sum(-1)
        return torch.addcmul(at_b * self.ax[..., None, :], at_a, self.right).sum(-1)

    def group_gradients(self, validating: torch.Tensor) -> dict[str, torch.Tensor]:
        error = self.groups.to_groups(self.error * validating)
        return {
            self.names[0]: (error @ self.b).transpose(1, 2) @ self.x,
            self.names[1]: error.transpose(1, 2) @ self.ax,
        }

    def squared_norms(self) -> torch.Tensor:
        error = self.groups.to_groups(self.error)
        norms = 0.0 * error[..., :1]
        if self.trains_a:
            norms = norms + (error @ self.b).square().sum(-1, True) * self.x.square().sum(-1, True)
        if self.trains_b:
            norms = norms + error.square().sum(-1, True) * self.ax.square().sum(-1, True)
        return self.groups.to_batch(norms)


class _LinearContraction:
    """d^T C h on a linear that is trained itself."""

    def __init__(self, site: LinearSite, groups: Groups, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        self.groups = groups
        self.error = error
        self.x = groups.to_groups(inputs[0])
        self.transposed = site.transposed
        (self.name,) = site.parameters

    def set_direction(self, direction: Directions) -> None:
        self.c = [c.mT if self.transposed else c for c in direction[self.name]]

    def direct(self) -> torch.Tensor:
        error = self.groups.to_groups(self.error)
        return self.groups.to_batch(self._combine(error, self.c))

    def causal(self, attention: AttentionCall, window: int, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        error, c = self.error, self.c
        if rows.numel() < error.shape[-1]:
            error, c = error[..., rows], [each[..., rows, :] for each in c]
        error = self.groups.to_groups(attention.propagate(error, window, batch))
        return self.groups.to_batch(self._combine(error, c))

    def _combine(self, error: torch.Tensor, c: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(error * (self.x @ each.mT)).sum(-1) for each in c], -1)

    def group_gradients(self, validating: torch.Tensor) -> dict[str, torch.Tensor]:
        gradient = self.groups.to_groups(self.error * validating).transpose(1, 2) @ self.x
        return {self.name: gradient.transpose(1, 2) if self.transposed else gradient}

    def squared_norms(self) -> torch.Tensor:
        error = self.groups.to_groups(self.error)
        return self.groups.to_batch(error.square().sum(-1, True) * self.x.square().sum(-1, True))


class Contractor:
    """Visitor that sums the contractions over all sites: `direct` and `causal` `(B, T, J)`, `norms` `(B, T, 1)`."""

    def __init__(
        self,
        scored: Scored,
        batch: Batch,
        parts: Parts,
        *,
        window: int,
        norms: bool,
        others: Others | None,
        check: bool = False,
    ) -> None:
        self.scored, self.batch, self.parts = scored, batch, tuple(parts.values())
        self.window, self.wants_norms, self.others = window, norms, others
        self.check = check
        self.whole = Groups(batch.shape)
        self.grouped = self.whole if others is None else Groups.of(others.groups)
        self.direct: torch.Tensor | float = 0.0
        self.causal: torch.Tensor | float = 0.0
        self.norms: torch.Tensor | float = 0.0

    def __call__(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None:
        if not any(parameter.requires_grad for parameter in site.parameters.values()):  # a frozen layer of the adapter
            return
        dtype = accumulation_dtype(error)
        with torch.autocast(error.device.type, enabled=False):
            self._add(site, error.to(dtype), tuple(tensor.to(dtype) for tensor in inputs), attention)

    def _add(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None:
        contraction = _contraction(site, self.whole, error, inputs)
        terms: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        if self.others is not None:
            terms.append(self._against_others(site, error, inputs, attention))
        if self.parts:
            names = (name for name, parameter in site.parameters.items() if parameter.requires_grad)
            contraction.set_direction({name: [part[name] for part in self.parts] for name in names})
            terms.append(self._terms(site, contraction, attention))
        direct = _joined([direct for direct, _ in terms])
        if self.check and not direct.isfinite().all():
            raise FloatingPointError(
                f"Token values are not finite at {site.name}. Look for inf or nan in this adapter, its target gradient "
                "and its Fisher, or lower the learning rate."
            )
        self.direct = self.direct + direct
        if attention is not None:
            self.causal = self.causal + _joined([causal for _, causal in terms if causal is not None])
        if self.wants_norms:
            self.norms = self.norms + contraction.squared_norms()

    def _terms(
        self, site: Site, contraction: _LoraContraction | _LinearContraction, attention: AttentionCall | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if attention is None:
            return contraction.direct(), None
        rows = self.scored.value_rows[site.block][site.name]
        return contraction.direct(), contraction.causal(attention, self.window, self.batch, rows)

    def _against_others(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.others is not None
        contraction = _contraction(site, self.grouped, error, inputs)
        counts = self.others.counts.to(error.dtype)
        rest = (counts.sum() - counts).clamp(min=1)[:, None, None]
        own = contraction.group_gradients(self.others.validating[..., None].to(error.dtype))
        trained = site.parameters
        mean = {n: (g.sum(0, keepdim=True) - g) / rest for n, g in own.items() if trained[n].requires_grad}
        contraction.set_direction({name: [g] for name, g in mean.items()})
        return self._terms(site, contraction, attention)


def _joined(terms: list[torch.Tensor]) -> torch.Tensor:
    return terms[0] if len(terms) == 1 else torch.cat(terms, -1)


def _contraction(
    site: Site, groups: Groups, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]
) -> _LoraContraction | _LinearContraction:
    kind = _LoraContraction if isinstance(site, LoraSite) else _LinearContraction
    return kind(site, groups, error, inputs)  # type: ignore[arg-type]
