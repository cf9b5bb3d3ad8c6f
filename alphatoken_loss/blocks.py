"""Which linears are scored, and what surrounds them: blocks and adapters found by structure, and the reference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

# PEFT is imported where it is needed: importing it imports bitsandbytes.
if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

# Up to transformers 5.20 or so a checkpoint wraps a block's `__call__`, so that hooks run again when it is recomputed.
HOOKS_INSIDE_CHECKPOINT = "__call__" in GradientCheckpointingLayer.__dict__
_LEFT_BY_PEFT = ("forward", "prepare_inputs_for_generation")
REFERENCE_ADAPTER = "ref"  # TRL's name for the adapter that holds the reference when an adapter is trained on


@dataclass(frozen=True)
class LoraSite:
    """One LoRA layer y = W0 x + s B A x; both of its linears are scored."""

    name: str
    block: int
    layer: LoraLayer
    adapter: str

    @property
    def a(self) -> nn.Linear:
        return self.layer.lora_A[self.adapter]

    @property
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


@dataclass
class Scored:
    """The last K blocks of a model and the linears in them that are scored.

    Attributes:
        blocks (`list[nn.Module]`): the K blocks, in forward order.
        sites (`list[Site]`): every scored linear or LoRA layer, with `site.block` an index into `blocks`.
        total (`int`): how many blocks the model has.
        others (`dict`): what else is trained and scored, by its name in `model.named_parameters()`: adapters that are
            not plain LoRA, norms, biases, embeddings. The ghost estimator has none.
        value_rows (`dict`): block index -> site name -> which of its output rows are attention values, for the sites
            that have such rows; filled by `attention.py` when it first sees the block run.
    """

    blocks: list[nn.Module]
    sites: list[Site]
    total: int
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    value_rows: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def in_block(self, index: int) -> list[Site]:
        return [site for site in self.sites if site.block == index]

    @cached_property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Scored trainable parameters by their names in `model.named_parameters()`."""
        named = (item for site in self.sites for item in site.parameters.items())
        return {name: parameter for name, parameter in named if parameter.requires_grad} | self.others

    @property
    def in_blocks(self) -> bool:
        """Whether every scored parameter lies in the scored blocks."""
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        return all(id(parameter) in inside for parameter in self.parameters.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper: its module names are the ones this library speaks of."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's and a distributed wrapper."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal LM: the longest list of checkpointable layers in its decoder.

    Raises:
        ValueError: no list of blocks is found.
    """
    base = causal_lm(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    ]
    if not lists:
        raise ValueError(
            f"No transformer blocks were found in {type(base).__name__}: no ModuleList of transformers' "
            "GradientCheckpointingLayer. Use a decoder-only model of a recent transformers release."
        )
    return max(lists, key=len)


def find_decoder(model: nn.Module) -> nn.Module:
    """What stands before the LM head: its output is the last hidden state."""
    base = causal_lm(model)
    return base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]


def find_scored(model: nn.Module, num_layers: int | str, estimator: str = "ghost") -> Scored:
    """Find what is scored: the adapters (or, without adapters, the trainable linears) of the last K blocks.

    Args:
        model (`nn.Module`): causal LM, plain or wrapped by PEFT, with a base in any precision.
        num_layers (`int` or `"all"`): K.
        estimator (`str`): `"ghost"` scores plain LoRA and linears alone and refuses other adapters. The others also
            score whatever else is trained: `"exact"` in the blocks, `"difference"` anywhere before the LM head.

    Raises:
        ValueError: K exceeds the number of blocks; nothing in them is trainable; adapters are merged or disabled; for
            the ghost estimator also several active adapters, or a kind whose arithmetic is not y = W0 x + s B A x.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = unwrap(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model is compiled, which fixes its graph. Give the model before torch.compile.")
    anywhere = estimator == "difference" and num_layers == "all"
    blocks = _blocks_or_none(model) if anywhere else find_blocks(model)
    count = len(blocks) if num_layers == "all" else int(num_layers)
    if count > len(blocks):
        raise ValueError(f'num_layers is {count}, but the model has {len(blocks)} blocks. Use at most that, or "all".')
    names = {id(module): name for name, module in model.named_modules()}
    scored = list(blocks)[len(blocks) - count :]
    sites: list[Site] = []
    for index, block in enumerate(scored):
        _check_not_repacked(block, names)
        tuners = [module for module in block.modules() if isinstance(module, BaseTunerLayer)]
        for layer in tuners:
            _check_active(names[id(layer)], layer)
            if estimator == "ghost" or _why_not_lora(names[id(layer)], layer) is None:
                sites.append(_lora_site(names[id(layer)], index, layer))
        if tuners:
            continue
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D) and module.weight.requires_grad:
                sites.append(LinearSite(names[id(module)], index, module))
    found = Scored(scored, sites, len(blocks))
    if estimator == "ghost":
        _warn_of_linears_beside(found, names)
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
        raise ValueError(
            f"The last {count} of {len(blocks)} blocks have nothing to score: no active, trainable LoRA adapter and no "
            "trainable linear. Wrap the model with peft.get_peft_model(model, LoraConfig(...)), load a trained adapter "
            "with is_trainable=True, or raise num_layers."
        )
    return found


def _blocks_or_none(model: nn.Module) -> list[nn.Module]:
    try:
        return list(find_blocks(model))
    except ValueError:
        return []


def _warn_of_linears_beside(found: Scored, names: dict[int, str]) -> None:
    adapters = {site.adapter for site in found.sites if isinstance(site, LoraSite)}
    if len(adapters) > 1:
        raise ValueError(f"Several adapters are active in the scored blocks ({sorted(adapters)}). Activate one.")
    if adapters:
        own = {id(linear) for site in found.sites if isinstance(site, LoraSite) for linear in (site.a, site.b)}
        linears = (m for block in found.blocks for m in block.modules() if isinstance(m, nn.Linear | Conv1D))
        beside = [names[id(m)] for m in linears if m.weight.requires_grad and id(m) not in own]
        if beside:
            warnings.warn(
                f"{beside[0]} is trained beside the adapters of the scored blocks ({len(beside)} such linears). It "
                "takes no part in token values; the gradient gate masks it all the same.",
                stacklevel=3,
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


def checkpointed(block: nn.Module) -> bool:
    """Whether a block's forward is recomputed in backward.

    Raises:
        ValueError: it is recomputed in a way that hides its training forward from hooks.
    """
    if not (block.training and getattr(block, "gradient_checkpointing", False)):
        return False
    options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    if options.get("use_reentrant") and HOOKS_INSIDE_CHECKPOINT:
        raise ValueError(
            "Reentrant checkpointing hides the training forward from hooks in this version of transformers. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, or transformers 5.23.'
        )
    return True


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
    """What keeps an adapter layer from being y = W0 x + s B A x, in words, or None."""
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
            f"{name}: active adapters are {list(layer.active_adapters)}, of which {len(active)} are LoRA here; exactly "
            "one must be. Choose it with set_adapter()."
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


def trained_behind(model: nn.Module, gate: nn.Module | None = None) -> list[str]:
    """Names of trainable parameters behind a module, which no gate at its output masks; by default the decoder.

    Order of registration stands for order of execution: after the module's own, or tied to the LM head.
    """
    base = causal_lm(model)
    named = list(unwrap(model).named_parameters())
    own = {id(parameter) for parameter in (find_decoder(model) if gate is None else gate).parameters()}
    in_base = {id(parameter) for parameter in base.parameters()}
    last = max((i for i, (_, parameter) in enumerate(named) if id(parameter) in own), default=-1)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    tied = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    return [
        name
        for i, (name, parameter) in enumerate(named)
        if parameter.requires_grad
        and id(parameter) in in_base
        and (id(parameter) in tied or (i > last and id(parameter) not in own))
    ]


@contextlib.contextmanager
def reference_mode(model: nn.Module, ref_model: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the reference model: `ref_model`, or `model` with adapters off or its adapter "ref" on.

    Adapters, their flags and `requires_grad` are as before afterwards, also after an exception.

    Raises:
        ValueError: there is no separate reference and `model` has no adapters to switch off.
    """
    model = unwrap(model)
    if ref_model is not None:
        yield unwrap(ref_model)
        return
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if isinstance(model, PeftModel) and (learns_prompts(model) or not wrappers):
        with _prompts_off(model):
            yield model
        return
    if not wrappers:
        raise ValueError(
            "ref_model is None and the model has no adapter to switch off, so there is no reference. Pass the model "
            "that training started from as ref_model."
        )
    has_reference = REFERENCE_ADAPTER in getattr(model, "peft_config", {}) or any(
        REFERENCE_ADAPTER in m.lora_A for m in wrappers if isinstance(m, LoraLayer)
    )
    before = [(m, m._disable_adapters, m._active_adapter) for m in wrappers]
    flags = [(p, p.requires_grad) for m in wrappers for p in m.parameters()]
    try:
        for module in wrappers:
            beside = isinstance(module, AuxiliaryTrainingWrapper) and REFERENCE_ADAPTER not in module._adapters
            if has_reference and not beside:
                module.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
            else:
                module.enable_adapters(False)
        yield model
    finally:
        for module, disabled, active in before:
            module._disable_adapters, module._active_adapter = disabled, active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def learns_prompts(model: nn.Module) -> bool:
    """Whether the active adapter puts virtual tokens before a batch's own (prompt, prefix and P-tuning)."""
    from peft import PeftModel

    inner = unwrap(model)
    return isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning


@contextlib.contextmanager
def _prompts_off(model: Any) -> Iterator[None]:
    """PEFT's own way, less the bound methods that it leaves on the model; or the adapter "ref" on."""
    kept = {name: model.__dict__[name] for name in _LEFT_BY_PEFT if name in model.__dict__}
    active = model.active_adapter
    try:
        if REFERENCE_ADAPTER in model.peft_config:
            model.active_adapter = REFERENCE_ADAPTER
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        model.active_adapter = active
        for name in _LEFT_BY_PEFT:
            model.__dict__.pop(name, None)
        model.__dict__.update(kept)


@contextlib.contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Run a forward that needs no gradient without gradient checkpointing, which would only warn."""
    switched = [child for child in module.modules() if getattr(child, "gradient_checkpointing", False)]
    try:
        for child in switched:
            child.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for child in switched:
            child.gradient_checkpointing = True  # type: ignore[assignment]


@contextlib.contextmanager
def without_noise(*modules: nn.Module) -> Iterator[None]:
    """Run modules without dropout, NEFTune's noise and gradient checkpointing; what they compute else is unchanged.

    4-bit linears run in training mode whatever theirs is: in evaluation mode on a CPU, bitsandbytes repacks their
    weights in place, to a form without a backward. Other linears keep their mode.
    """
    touched: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            for child in module.modules():
                mode = child.training
                if hasattr(child, "quant_state"):
                    mode = True
                elif next(child.children(), None) is not None or _is_dropout(child) or isinstance(child, nn.Embedding):
                    mode = False  # of an embedding, since a hook adds NEFTune's noise by its mode
                if mode != child.training:
                    touched.append((child, "training", child.training))
                    child.training = mode
                if getattr(child, "gradient_checkpointing", False):
                    touched.append((child, "gradient_checkpointing", child.gradient_checkpointing))
                    setattr(child, "gradient_checkpointing", False)  # noqa: B010
        yield
    finally:
        for child, attribute, value in reversed(touched):
            setattr(child, attribute, value)


def draws_noise(module: nn.Module) -> bool:
    """Whether a module in its present mode applies dropout."""
    return any(
        child.training and (getattr(child, "attention_dropout", 0.0) or (_is_dropout(child) and _rate(child) > 0))
        for child in module.modules()
    )


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd | nn.RNNBase)


def _rate(module: nn.Module) -> float:
    return module.dropout if isinstance(module, nn.RNNBase) else module.p  # type: ignore[return-value]
