"""The ghost estimator: position-local token values as contractions d^T C h (arXiv 2606.01635, Eqs. 8 to 12).

For a scored linear with input h_t and output gradient d_t, and a matrix C of the weight's shape (the validation
gradient G, or the drift gradient V), the value of position t is d_t^T C h_t. On a LoRA layer y = W0 x + s B A x,
with d the gradient at B's output, A's output gradient is B^T d, so both linears are contracted from d, x and A x, and
every temporary has rank-sized rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from .attention import AttentionCall
from .batches import Batch
from .blocks import LinearSite, LoraSite, Scored, Site
from .config import AlphaTokenConfig
from .replay import Capture, Taps, capturing
from .values import TokenValues

Directions = Mapping[str, list[torch.Tensor]]  # by parameter name
Parts = Mapping[str, Mapping[str, torch.Tensor]]


class NonFiniteRows(FloatingPointError):
    """The gradient at the last block's output is itself not finite: the loss overflowed, not the valuation."""


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Layout:
    """Positions of a batch arranged as groups that share a matrix C: `(B, T, n)` <-> `(G, N, n)`.

    Attributes:
        shape (`tuple`): `(B, T)`.
        index (`torch.Tensor`, *optional*): `(G, N)` positions in the flattened batch; without it one group holds all.
        present (`torch.Tensor`, *optional*): `(G, N, 1)` bool, False where `index` only fills a group up.
    """

    shape: tuple[int, int]
    index: torch.Tensor | None = None
    present: torch.Tensor | None = None

    def to_groups(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(1, -1, tensor.shape[-1])
        if self.index is None:
            return flat
        return flat[0][self.index].masked_fill(~self.present, 0)  # type: ignore[operator]

    def to_batch(self, grouped: torch.Tensor) -> torch.Tensor:
        if self.index is None:
            return grouped.view(*self.shape, -1)
        flat = grouped.new_zeros(self.shape[0] * self.shape[1], grouped.shape[-1])
        present = self.present[..., 0]  # type: ignore[index]
        flat[self.index[present]] = grouped[present]
        return flat.view(*self.shape, -1)

    @classmethod
    def of_groups(cls, groups: torch.Tensor) -> Layout:
        """From `(B, T)` int64 group numbers 0 .. G - 1."""
        flat = groups.flatten()
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat)
        column = torch.arange(int(sizes.max()), device=groups.device)
        present = column < sizes[:, None]
        index = torch.zeros_like(present, dtype=torch.long)
        index[present] = order
        return cls((groups.shape[0], groups.shape[1]), index, present[..., None])


@dataclass(frozen=True)
class Others:
    """Each group of sequences is valued against the mean gradient of the other groups, made in the same walk.

    Attributes:
        groups (`torch.Tensor`): `(B, T)` int64, 0 .. G - 1.
        validating (`torch.Tensor`): `(B, T)` factors that turn a position's gradient into what counts for others: the
            gradient of the response's negative log-likelihood, or 0.
        counts (`torch.Tensor`): `(G,)` response tokens that a group validates with.
    """

    groups: torch.Tensor
    validating: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, omega: torch.Tensor | None = None) -> Others:
        """Sequences against sequences; for pairs, pairs against the chosen answers of the other pairs.

        Args:
            omega (`torch.Tensor`, *optional*): `(P,)`, what multiplies each pair's gradients in a preference loss.

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


class _LoraContraction:
    """d^T C h on both linears of a LoRA layer, for J matrices at once; everything `(G, N, .)`."""

    def __init__(self, site: LoraSite, layout: Layout, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        self.layout = layout
        self.error = error
        self.x, self.ax = (layout.to_groups(tensor) for tensor in inputs)
        self.b = site.b.weight.to(error.dtype)
        self.trains_a, self.trains_b = site.a.weight.requires_grad, site.b.weight.requires_grad
        self.names = tuple(site.parameters)

    def set_direction(self, direction: Directions) -> None:
        """`direction` holds J tensors of each parameter's shape, or of `(G, ...)`, one for each group."""
        rank = self.b.shape[1]
        self.right: torch.Tensor | None = None
        if self.names[0] in direction:
            self.right = (self.x @ torch.cat(direction[self.names[0]], -2).mT).unflatten(-1, (-1, rank))
        # Columns: B itself, which takes d to A's output, then each C_B.
        at_b = direction.get(self.names[1], [])
        self.columns = torch.cat([self.b.expand(*at_b[0].shape[:-2], -1, -1), *at_b], -1) if at_b else self.b

    def direct(self) -> torch.Tensor:
        self.left = self.layout.to_groups(self.error) @ self.columns
        return self.layout.to_batch(self._combine(self.left))

    def causal(self, attention: AttentionCall, window: int, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        left = self.left  # of `direct`, where every row is a value
        if rows.numel() < self.error.shape[-1]:
            left = self.layout.to_groups(self.error[..., rows]) @ self.columns[..., rows, :]
        left = attention.propagate(self.layout.to_batch(left), window, batch)
        return self.layout.to_batch(self._combine(self.layout.to_groups(left)))

    def _combine(self, left: torch.Tensor) -> torch.Tensor:
        rank = self.b.shape[1]
        at_a, at_b = left[..., None, :rank], left[..., rank:].unflatten(-1, (-1, rank))
        if self.right is None:
            return (at_b * self.ax[..., None, :]).sum(-1)
        if not at_b.shape[-2]:
            return (at_a * self.right).sum(-1)
        return torch.addcmul(at_b * self.ax[..., None, :], at_a, self.right).sum(-1)

    def group_gradients(self, validating: torch.Tensor) -> dict[str, torch.Tensor]:
        error = self.layout.to_groups(self.error * validating)
        return {
            self.names[0]: (error @ self.b).transpose(1, 2) @ self.x,
            self.names[1]: error.transpose(1, 2) @ self.ax,
        }

    def squared_norms(self) -> torch.Tensor:
        error = self.layout.to_groups(self.error)
        norms = 0.0 * error[..., :1]
        if self.trains_a:
            norms = norms + (error @ self.b).square().sum(-1, True) * self.x.square().sum(-1, True)
        if self.trains_b:
            norms = norms + error.square().sum(-1, True) * self.ax.square().sum(-1, True)
        return self.layout.to_batch(norms)


class _LinearContraction:
    """d^T C h on a linear that is trained itself."""

    def __init__(self, site: LinearSite, layout: Layout, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
        self.layout = layout
        self.error = error
        self.x = layout.to_groups(inputs[0])
        self.transposed = site.transposed
        (self.name,) = site.parameters

    def set_direction(self, direction: Directions) -> None:
        self.c = [c.mT if self.transposed else c for c in direction[self.name]]

    def direct(self) -> torch.Tensor:
        error = self.layout.to_groups(self.error)
        return self.layout.to_batch(self._combine(error, self.c))

    def causal(self, attention: AttentionCall, window: int, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        error, c = self.error, self.c
        if rows.numel() < error.shape[-1]:
            error, c = error[..., rows], [each[..., rows, :] for each in c]
        error = self.layout.to_groups(attention.propagate(error, window, batch))
        return self.layout.to_batch(self._combine(error, c))

    def _combine(self, error: torch.Tensor, c: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(error * (self.x @ each.mT)).sum(-1) for each in c], -1)

    def group_gradients(self, validating: torch.Tensor) -> dict[str, torch.Tensor]:
        gradient = self.layout.to_groups(self.error * validating).transpose(1, 2) @ self.x
        return {self.name: gradient.transpose(1, 2) if self.transposed else gradient}

    def squared_norms(self) -> torch.Tensor:
        error = self.layout.to_groups(self.error)
        return self.layout.to_batch(error.square().sum(-1, True) * self.x.square().sum(-1, True))


class _Contractor:
    """Visitor that sums the contractions of all sites: `direct` and `causal` are `(B, T, J)`, `norms` `(B, T, 1)`."""

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
        self.direct: torch.Tensor | float = 0.0
        self.causal: torch.Tensor | float = 0.0
        self.norms: torch.Tensor | float = 0.0

    def __call__(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None:
        dtype = accumulation_dtype(error)
        with torch.autocast(error.device.type, enabled=False):
            self._add(site, error.to(dtype), tuple(tensor.to(dtype) for tensor in inputs), attention)

    def _add(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None:
        contraction = _contraction(site, Layout(self.batch.shape), error, inputs)
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
        contraction = _contraction(site, Layout.of_groups(self.others.groups), error, inputs)
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
    site: Site, layout: Layout, error: torch.Tensor, inputs: tuple[torch.Tensor, ...]
) -> _LoraContraction | _LinearContraction:
    kind = _LoraContraction if isinstance(site, LoraSite) else _LinearContraction
    return kind(site, layout, error, inputs)  # type: ignore[arg-type]


class Ghost:
    """Values one batch by going back through its scored blocks, in its forward's graph or by running them again.

    Args:
        parts (`dict`): "target" and "drift", those there are -> parameter name -> direction of the parameter's shape.
        in_graph (`bool`): tap the forward that is watched. Only where blocks are neither checkpointed nor noisy.
        others: see `ghost_values`.
    """

    seconds = 0.0  # in the forward; going back is timed by the gate

    def __init__(
        self,
        scored: Scored,
        batch: Batch,
        config: AlphaTokenConfig,
        parts: Parts,
        *,
        in_graph: bool = False,
        others: Others | None = None,
    ) -> None:
        self.config, self.others = config, others
        self.capture = Capture(scored, batch)
        self.taps = Taps(scored, batch.shape, causal=config.causal_window > 0) if in_graph else None
        self.parts = parts

    @property
    def seen(self) -> bool:
        return self.capture.seen

    @contextlib.contextmanager
    def watching(self, on_hidden: Callable[[torch.Tensor], torch.Tensor], *, training: bool) -> Iterator[None]:
        """Keep what one forward leaves, and pass the last block's output through `on_hidden`."""

        def leave(hidden: torch.Tensor) -> torch.Tensor:
            if self.taps is not None:
                self.capture.graph = (self.taps, hidden)
            return on_hidden(hidden)

        with contextlib.ExitStack() as stack:
            if self.taps is not None:
                stack.enter_context(self.taps.installed(self.capture.scored.sites))
            stack.enter_context(capturing(self.capture, leave, training=training))
            yield

    def values(self, rows: torch.Tensor, *, norms: bool = False) -> TokenValues:
        """From the gradient `(B, T, hidden)` at the last block's output."""
        return ghost_values(
            self.capture,
            rows,
            self.parts,
            causal_window=self.config.causal_window,
            stability_weight=self.config.stability_weight,
            norms=norms,
            others=self.others,
        )

    def release(self) -> None:
        self.parts = {}
        self.capture.release()


def ghost_values(
    capture: Capture,
    rows: torch.Tensor,
    parts: Parts,
    *,
    causal_window: int,
    stability_weight: float,
    norms: bool = False,
    others: Others | None = None,
) -> TokenValues:
    """Value every response token of a batch from the gradient at the last block's output.

    Args:
        capture (`Capture`): what the forward left.
        rows (`torch.Tensor`): `(B, T, hidden)` gradient of the loss (a sum over tokens, times any positive factor).
        parts (`dict`): see `Ghost`.
        norms (`bool`): compute ghost norms too.
        others (`Others`, *optional*): make the target from the rest of the batch; `parts` then has no "target".

    Raises:
        FloatingPointError: rows are finite and values are not; the message names the linear.
    """
    batch = capture.batch

    def contract(check: bool) -> _Contractor:
        contractor = _Contractor(
            capture.scored,
            batch,
            parts,
            window=causal_window,
            norms=norms,
            others=others,
            check=check,
        )
        capture.visit(rows, contractor, causal=causal_window > 0)
        return contractor

    found = contract(check=False)
    names = (("target",) if others is not None else ()) + tuple(parts)
    empty = torch.zeros(batch.shape, dtype=accumulation_dtype(rows), device=rows.device)

    def term(accumulated: torch.Tensor | float, name: str) -> torch.Tensor:
        if not isinstance(accumulated, torch.Tensor) or name not in names:
            return empty
        return batch.at_labels(accumulated[..., names.index(name)])

    direct_target, causal_target = term(found.direct, "target"), term(found.causal, "target")
    direct_drift, causal_drift = term(found.direct, "drift"), term(found.causal, "drift")
    adaptation, stability = direct_target + causal_target, direct_drift + causal_drift
    total = adaptation + stability_weight * stability
    if not total.isfinite().all():
        _blame(capture, rows, parts)
        contract(check=True)  # a second walk, to name the linear
        raise FloatingPointError("Token values are not finite in the causal terms: attention overflowed.")
    grad_norm = batch.at_labels(found.norms[..., 0].sqrt()) if isinstance(found.norms, torch.Tensor) else None
    return TokenValues(
        total, adaptation, stability, direct_target, causal_target, direct_drift, causal_drift, grad_norm
    )


def _blame(capture: Capture, rows: torch.Tensor, parts: Parts) -> None:
    """Raise for what makes values not finite, where it lies before the walk."""
    for name, parameter in capture.scored.parameters.items():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"The adapter weight {name} is not finite, so nothing can be valued. Lower the learning rate, clip "
                "gradients, or go back to a checkpoint."
            )
    for name in capture.scored.parameters:
        if not all(part[name].isfinite().all() for part in parts.values()):
            raise FloatingPointError(
                f"The target gradient or the drift of {name} is not finite. Look at the validation batches and the "
                "Fisher."
            )
    if rows.isfinite().all():
        if capture.in_float16:
            raise NonFiniteRows("Gradients overflow float16 within the scored blocks. Use a lower loss scale, or bf16.")
        return
    for index, call in enumerate(capture.calls):
        if not call.hidden.isfinite().all():
            block = capture.scored.total - len(capture.scored.blocks) + index
            raise NonFiniteRows(f"The input of block {block} of the model is not finite: an earlier layer overflowed.")
    raise NonFiniteRows("The gradient of the loss is not finite at the last block's output. Look at the loss.")
