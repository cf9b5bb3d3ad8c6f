"""Which linears are scored: adapters, or trained linears, of the last K blocks."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .start import NOWHERE_ELSE, Start, start_of
from .structure import (
    blocks_or_none,
    find_blocks,
    learns_prompts,
    refuse_compiled,
    refuse_encoder_decoder,
    refuse_x_lora,
    trained_behind,
    unwrap,
)

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class LoraSite:
    """One LoRA layer y = W0 x + s B A x; both of its linears are scored."""

    name: str
    block: int
    layer: LoraLayer
    adapter: str

    @cached_property
    def a(self) -> nn.Linear:
        return self.layer.lora_A[self.adapter]

    @cached_property
    def b(self) -> nn.Linear:
        return self.layer.lora_B[self.adapter]

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter]

    @property
    def module(self) -> nn.Module:
        return self.layer

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.b.weight.shape[0], self.a.weight.shape[1]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {
            f"{self.name}.lora_A.{self.adapter}.weight": self.a.weight,
            f"{self.name}.lora_B.{self.adapter}.weight": self.b.weight,
        }


@dataclass(frozen=True)
class LinearSite:
    """One linear whose weight is trained itself, y = W x; GPT-2's `Conv1D` stores W transposed."""

    name: str
    block: int
    module: nn.Module

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> torch.Tensor:
        """W as (d_out, d_in)."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {f"{self.name}.weight": self.module.weight}  # type: ignore[dict-item]


Site = LoraSite | LinearSite
Scope = Literal["lora", "blocks", "anywhere"]


class AtMost(int):
    """A default number of blocks: if a model has fewer, all of them are scored."""


@dataclass
class Scored:
    """The last K blocks of a model and the linears in them that are scored.

    Attributes:
        blocks (`list[nn.Module]`): the K blocks, in forward order.
        sites (`list[Site]`): every scored linear or LoRA layer, with `site.block` an index into `blocks`.
        total (`int`): how many blocks the model has.
        others (`dict`): what else is trained and scored, by its name in `model.named_parameters()`: adapters that are
            not plain LoRA, norms, biases, embeddings. Always empty for the ghost estimator.
        start (`Start`): values that training started from, for models that adapters off do not take back there.
        value_rows (`dict`): block index -> site name -> which of its output rows are attention values, for the sites
            that have such rows; filled by `attention.py` when it first sees the block run.
    """

    blocks: list[nn.Module]
    sites: list[Site]
    total: int
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    value_rows: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    start: Start = NOWHERE_ELSE

    def in_block(self, index: int) -> list[Site]:
        return [site for site in self.sites if site.block == index]

    @cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Scored trainable parameters by their names in `model.named_parameters()`."""
        named = (item for site in self.sites for item in site.parameters.items())
        return {name: parameter for name, parameter in named if parameter.requires_grad} | self.others

    @cached_property
    def in_blocks(self) -> bool:
        """Whether every scored parameter lies in the scored blocks."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return all(id(parameter) in inside for parameter in self.parameters.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def find_scored(model: nn.Module, num_layers: int | str, scope: Scope = "lora") -> Scored:
    """Find what is scored: the adapters of the last K blocks or, without adapters, their trainable linears.

    Args:
        model (`nn.Module`): causal LM, plain or wrapped by PEFT, with a base in any precision.
        num_layers (`int` or `"all"`): K; `AtMost(K)` for K or, if there are fewer, all.
        scope (`str`): `"lora"` scores plain LoRA and linears alone and refuses other adapters. The others also score
            whatever else is trained: `"blocks"` in the K blocks, `"anywhere"` before the LM head if K is all blocks.

    Raises:
        ValueError: K exceeds the number of blocks; nothing in them is trainable; adapters are merged or disabled; for
            `"lora"` also several active adapters, or a kind whose arithmetic is not y = W0 x + s B A x.
    """
    model = unwrap(model)
    refuse_x_lora(model)
    refuse_compiled(model)
    refuse_encoder_decoder(model)
    anywhere = scope == "anywhere" and num_layers == "all"
    blocks = blocks_or_none(model) if anywhere else find_blocks(model)
    count = len(blocks) if num_layers == "all" else int(num_layers)
    if isinstance(num_layers, AtMost):
        count = min(count, len(blocks))
    if count > len(blocks):
        raise ValueError(f'num_layers is {count}, but the model has {len(blocks)} blocks. Use at most that, or "all".')
    names = {id(module): name for name, module in model.named_modules()}
    scored = list(blocks)[len(blocks) - count :]
    found = Scored(scored, _sites(scored, names, scope), len(blocks), start=start_of(model))
    if scope == "lora":
        _refuse_several_adapters(found)
        _tell_what_is_left_out(model, found, blocks)
    else:
        of_sites, behind = set(found.parameters), set(trained_behind(model))
        inside = {id(parameter) for block in scored for parameter in block.parameters()}
        found.others = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and name not in of_sites
            and name not in behind
            and (anywhere or id(parameter) in inside)
        }
        del found.parameters  # cached without the others
    if not found.parameters:
        raise ValueError(f"The last {count} of {len(blocks)} blocks have nothing to score: {_why_nothing(model)}")
    return found


def _sites(blocks: list[nn.Module], names: dict[int, str], scope: Scope) -> list[Site]:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    met = Counter(id(module) for block in blocks for module in block.modules())
    sites: list[Site] = []
    for index, block in enumerate(blocks):
        _check_not_repacked(block, names)
        tuners = [module for module in block.modules() if isinstance(module, BaseTunerLayer)]
        for layer in tuners:
            _check_active(names[id(layer)], layer)
            if _is_idle(layer):
                continue
            if scope != "lora" and (met[id(layer)] > 1 or _why_not_lora(names[id(layer)], layer) is not None):
                continue  # scored among the others
            if isinstance(layer, ParamWrapper):
                continue  # experts see some positions only: left out, with a warning
            if met[id(layer)] > 1:
                raise ValueError(
                    f"{names[id(layer)]} is shared by several of the scored blocks, and ghost values need linears that "
                    'run once. Keep it out of target_modules, or set estimator="difference".'
                )
            sites.append(_lora_site(names[id(layer)], index, layer))
        if tuners:
            continue
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad and met[id(module)] == 1:
                sites.append(LinearSite(names[id(module)], index, module))
    return sites


def _is_idle(layer: BaseTunerLayer) -> bool:
    """Whether a LoRA layer has no active adapter, so that only its base runs."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and not any(adapter in layer.lora_A for adapter in layer.active_adapters)


def _refuse_several_adapters(found: Scored) -> None:
    adapters = {site.adapter for site in found.sites if isinstance(site, LoraSite)}
    if len(adapters) > 1:
        raise ValueError(f"Several adapters are active in the scored blocks ({sorted(adapters)}). Activate one.")


_told: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _tell_what_is_left_out(model: nn.Module, found: Scored, blocks: Iterable[nn.Module]) -> None:
    """Warn once of a model's parameters that are trained and take no part: not for the num_layers that were chosen."""
    unscored = {id(p) for block in blocks if block not in found.blocks for p in block.parameters()}
    left_out = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and name not in found.parameters and id(p) not in unscored
    ]
    if left_out and found.parameters and left_out[0] not in _told.setdefault(model, set()):
        _told[model].add(left_out[0])
        warnings.warn(
            f"{left_out[0]} is trained and takes no part in ghost values ({len(left_out)} such parameters), which are "
            "of LoRA factors or linears' weights in the blocks; the gradient gate masks it all the same. "
            'estimator="difference" values whatever is trained.',
            stacklevel=4,
        )


def _why_nothing(model: nn.Module) -> str:
    everything = (
        'Set estimator="difference" with num_layers="all", which scores whatever is trained before the LM head.'
    )
    if learns_prompts(model):
        return f"the active adapter trains virtual tokens, which stand before the blocks. {everything}"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return (
            "no active, trainable LoRA adapter and no trainable linear. Wrap the model with peft.get_peft_model(model, "
            "LoraConfig(...)), or load a trained adapter with is_trainable=True."
        )
    if set(trained) <= set(trained_behind(model)):
        return (
            f"only the LM head or what leads to it is trained ({trained[0]}), where the gate masks nothing. Put "
            "adapters on the linears of the blocks (target_modules)."
        )
    return (
        f"what is trained lies elsewhere ({trained[0]} and so on, {len(trained)} parameters). Raise num_layers, or: "
        + (everything)
    )


def _check_not_repacked(block: nn.Module, names: dict[int, str]) -> None:
    for module in block.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{names[id(module)]}: bitsandbytes has repacked this 4-bit weight for inference on the CPU, which "
                "happens when the model runs in evaluation mode and lets no gradient through. Load the model again and "
                "keep it in training mode (model.train())."
            )


def _check_active(name: str, layer: BaseTunerLayer) -> None:
    if layer.merged:
        raise ValueError(
            f"{name}: adapter(s) {layer.merged_adapters} are merged into the base. Call unmerge_adapter()."
        )
    if layer.disable_adapters:
        raise ValueError(
            f"{name}: the adapters are disabled, so nothing is trained. Call enable_adapter_layers(), or leave the "
            "disable_adapter() context."
        )


def _why_not_lora(name: str, layer: BaseTunerLayer) -> str | None:
    """Why an adapter layer is not y = W0 x + s B A x, in words; None if it is."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return (
            f"{name}: the adapter layer is a {type(layer).__module__}.{type(layer).__name__}; ghost values need LoRA "
            'on linears. Use peft.LoraConfig, keep this module out of target_modules, or set estimator="difference".'
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        return (
            f"{name}: active adapters are {list(layer.active_adapters)}, of which {len(active)} are LoRA here; ghost "
            'values are of one. Choose it with set_adapter(), or set estimator="difference".'
        )
    adapter = active[0]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return (
            f"{name}: adapter '{adapter}' is the LoRA variant {type(variant).__name__}, whose arithmetic is not "
            'y = W x + s B A x. Use plain LoRA (use_dora=False and the like), or set estimator="difference".'
        )
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(a, nn.Linear) or not isinstance(b, nn.Linear):
        return (
            f"{name}: adapter '{adapter}' on a {type(layer.get_base_layer()).__name__} has {type(a).__name__} factors; "
            'ghost values need linear ones. Keep this module out of target_modules, or set estimator="difference".'
        )
    return None


def _lora_site(name: str, block: int, layer: BaseTunerLayer) -> LoraSite:
    why_not = _why_not_lora(name, layer)
    if why_not is not None:
        raise ValueError(why_not)
    (adapter,) = (adapter for adapter in layer.active_adapters if adapter in layer.lora_A)
    return LoraSite(name, block, layer, adapter)
