"""The drift gradient: which way the scored parameters have moved away from the reference (Eqs. 10, 11)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..models.layout import kept
from ..models.reference import refuse_trained_reference, same_module
from ..models.sites import LinearSite, LoraSite, Scored
from ..models.start import REFERENCE_ADAPTER, Start
from ..models.structure import unwrap
from ..models.tensors import accumulation_dtype, positive
from .fisher import Fisher


def drift(fisher: Fisher, scored: Scored, ref_model: nn.Module | None) -> dict[str, torch.Tensor]:
    """Gradient of 0.5 * sum(F * dW^2) with respect to each scored parameter (Eqs. 10, 11).

    For LoRA dW = s B A - s_ref B_ref A_ref. The second part is zero where the reference is the base model. Where the
    initialisation moved a part of the base into the adapter (PiSSA), it is the adapter as it was at the start. For a
    linear that is trained itself dW = W - W_ref. With a factored Fisher, LoRA needs no `(d_out, d_in)` matrix.

    Returns:
        `dict`: parameter name -> tensor of the parameter's shape, float32 (float64 for a float64 model).
    """
    fisher.check(scored)
    with torch.no_grad(), torch.autocast(scored.device.type, enabled=False):
        found: dict[str, torch.Tensor] = {}
        alike: dict[Hashable, list[tuple[LoraSite, _Factors | None]]] = {}
        for site in scored.sites:
            if isinstance(site, LoraSite):
                reference = _reference_factors(site, ref_model, scored.start)
                alike.setdefault(_kind(fisher, site, reference), []).append((site, reference))
            else:
                found.update(_linear_drift(fisher, site, ref_model, scored.start))
        for pairs in alike.values():
            found.update(_lora_drift(fisher, *zip(*pairs, strict=True)))
        for name, parameter in scored.others.items():
            dtype = accumulation_dtype(parameter)
            diagonal, start = (tensor.to(parameter.device, dtype) for tensor in fisher.others[name])
            found[name] = diagonal * (parameter.to(dtype) - start)
    return {name: found[name] for name in scored.parameters}


class _Factors(NamedTuple):
    """What a LoRA layer of the reference adds to its base: scaling * b @ a."""

    scaling: float
    a: torch.Tensor
    b: torch.Tensor


def _kind(fisher: Fisher, site: LoraSite, reference: _Factors | None) -> Hashable:
    """Sites of one kind are computed together: their factors are stacked, so that few kernels serve all of them."""
    if len(fisher.factors[site.name]) == 1:
        return site.name  # a stack of dense diagonals would be large
    weights = site.a.weight, site.b.weight
    start = None if reference is None else (reference.scaling, reference.a.shape)
    return site.scaling, start, *((w.shape, w.dtype, w.device) for w in weights)


def _lora_drift(
    fisher: Fisher, sites: Sequence[LoraSite], references: Sequence[_Factors | None]
) -> dict[str, torch.Tensor]:
    like, scaling = sites[0].b.weight, sites[0].scaling
    like = like.new_empty((), dtype=accumulation_dtype(like))
    a, b = _stacked((s.a.weight for s in sites), like), _stacked((s.b.weight for s in sites), like)
    left, right = scaling * b, a  # dW = left @ right
    starts = [start for start in references if start is not None]
    if starts:
        left = torch.cat([left, -starts[0].scaling * _stacked((s.b for s in starts), like)], -1)
        right = torch.cat([right, _stacked((s.a for s in starts), like)], -2)
    factors = zip(*(fisher.factors[site.name] for site in sites), strict=True)
    factor = [_stacked(tensors, like) for tensors in factors]
    if len(factor) == 1:
        pulled = scaling * factor[0] * (left @ right)
        at_a, at_b = b.mT @ pulled, pulled @ a.mT
    else:
        row, column = factor
        weighted = (row * (scaling / positive(row.sum(-1, keepdim=True))))[..., None] * left
        right = right * column[:, None]
        at_a, at_b = (b.mT @ weighted) @ right, weighted @ (right @ a.mT)
    drifts = zip((site.parameters for site in sites), at_a, at_b, strict=True)
    return {name: drift for names, *both in drifts for name, drift in zip(names, both, strict=True)}


def _linear_drift(
    fisher: Fisher, site: LinearSite, ref_model: nn.Module | None, start: Start
) -> dict[str, torch.Tensor]:
    (name,) = site.parameters
    if ref_model is None and name not in start.tensors:
        raise ValueError(
            f"{site.name} is trained itself and ref_model is None, so there is nothing to measure drift from. Pass "
            "the model that training started from as ref_model, or set stability_weight=0."
        )
    dtype = accumulation_dtype(site.weight)
    if ref_model is not None:
        reference = LinearSite(site.name, site.block, same_module(site.name, ref_model)).weight
    else:
        reference = start.tensors[name].T if site.transposed else start.tensors[name]
    drift = fisher.diagonal(site.name).to(site.weight.device, dtype) * (
        site.weight.to(dtype) - reference.to(site.weight.device, dtype)
    )
    return {name: drift.T if site.transposed else drift}


def _stacked(tensors: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    first, *rest = (tensor.to(like) for tensor in tensors)
    return torch.stack([first, *rest]) if rest else first[None]  # a single one is not copied: it may be dense


def _reference_factors(site: LoraSite, ref_model: nn.Module | None, start: Start) -> _Factors | None:
    """What the reference adds at a site to this model's base, or None."""
    reference = _reference_lora(site, ref_model)
    if reference is not None:
        return _Factors(reference.scaling, reference.a.weight, reference.b.weight)
    if not start.adapters_on:
        return None
    # Also with a ref_model: its weight is whole, where the initialisation split it into base and adapter.
    a, b = (start.tensors.get(name, parameter) for name, parameter in site.parameters.items())
    return _Factors(site.scaling, a, b)


def refuse_other_base(model: nn.Module, scored: Scored, ref_model: nn.Module) -> None:
    """Check, by some entries of each weight, that a separate reference has the base that the adapters sit on.

    Precision does not matter. Nothing is compared with what is quantised otherwise, sharded or elsewhere.

    Raises:
        ValueError: it has not, as when its own adapter was merged: dW of the adapters would leave that part out.
    """
    kept(unwrap(model), ("base of", id(ref_model), len(scored.sites)), lambda: _check_base(scored, ref_model))


def _check_base(scored: Scored, ref_model: nn.Module) -> None:
    for site in scored.sites:
        if not isinstance(site, LoraSite):
            continue  # dW is of whole weights
        layer: Any = same_module(site.name, ref_model)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        # Without an adapter of its own, the reference has what ours started with in its weight.
        whole = _reference_lora(site, ref_model) is None
        added = _reference_factors(site, ref_model, scored.start) if whole else None
        if not _alike(site.layer.get_base_layer(), base, added):
            merged = " (its adapter is merged)" if getattr(layer, "merged", False) else ""
            raise ValueError(
                f"ref_model's weight at {site.name} is not the one that this model's adapter sits on{merged}, so drift "
                "would be measured from another place. Give a reference on the same base, with its adapter beside it, "
                "not merged; or ref_model=None, if the model with adapters off is the reference, or after "
                "remember_start(model), if the model as it is now is; or set stability_weight=0."
            )


_PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _alike(own: nn.Module, other: nn.Module, added: _Factors | None) -> bool:
    """Whether weights are the same as far as can be told; `added` is a part of the other one alone."""
    here, there = (getattr(module, "weight", None) for module in (own, other))
    if here is None or there is None or here.device.type == "meta" or there.device.type == "meta":
        return True
    if not here.numel() or here.shape != there.shape:
        return not (here.numel() and there.numel()) or type(here) is not type(there)
    if type(own) is type(other) and here.dtype == there.dtype == torch.uint8 and added is None:  # bitsandbytes' 4 bits
        every = max(1, here.numel() // 4096)
        codes = [weight.detach().flatten()[::every].cpu() for weight in (here, there)]
        return float((codes[0] != codes[1]).float().mean()) < 0.2  # of one checkpoint in two precisions some differ
    if any(w.dtype not in _PRECISIONS or type(w) not in (torch.Tensor, nn.Parameter) for w in (here, there)):
        return True
    rows, columns = (torch.linspace(0, size - 1, 16, dtype=torch.float64).long() for size in here.shape)
    mine, its = (w.detach()[rows.to(w.device)][:, columns.to(w.device)].cpu().double() for w in (here, there))
    if added is None:
        return float((mine.bfloat16() != its.bfloat16()).float().mean()) < 0.05
    a, b = (factor.detach().cpu().double() for factor in (added.a, added.b))
    more = (b[columns] @ a[:, rows]).T if isinstance(own, Conv1D) else b[rows] @ a[:, columns]
    # An initialisation with a quantised rest (LoftQ) is only near to the whole.
    return float((mine + added.scaling * more - its).norm()) <= 0.3 * float(its.norm())


def _reference_lora(site: LoraSite, ref_model: nn.Module | None) -> LoraSite | None:
    """The reference's adapter at a site, or None."""
    from peft.tuners.lora import LoraLayer

    if ref_model is None:
        refuse_trained_reference([site.layer])
        has_reference = REFERENCE_ADAPTER in site.layer.lora_A
        return LoraSite(site.name, site.block, site.layer, REFERENCE_ADAPTER) if has_reference else None
    layer = same_module(site.name, ref_model)
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    variants = [name for name in active if getattr(layer, "lora_variant", {}).get(name) is not None]
    if variants:
        raise ValueError(
            f"{site.name}: ref_model's adapter '{variants[0]}' is a LoRA variant, which is not W + s B A. Give a plain "
            "LoRA adapter, or set stability_weight=0."
        )
    if len(active) > 1:
        raise ValueError(f"{site.name}: ref_model has several active adapters ({active}). Activate one.")
    return LoraSite(site.name, site.block, layer, active[0]) if active else None
