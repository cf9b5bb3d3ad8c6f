"""The reference: a separate model, or the model itself as it was when training started (see start.py).

The latter is the model with adapters off, with its adapter "ref" on, or with the values its adapters started from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .changes import Changes
from .layout import modules_of
from .start import REFERENCE_ADAPTER, replaced, start_of, switchable
from .structure import causal_lm, learns_prompts, unwrap

_SWITCHES = ("_disable_adapters", "_active_adapter")
_LEFT_BY_PEFT = ("forward", "prepare_inputs_for_generation")


@contextlib.contextmanager
def reference_mode(model: nn.Module, ref_model: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the reference model: `ref_model`, or `model` with adapters off or its adapter "ref" on, or as it started.

    Parameters, adapters, their flags and `requires_grad` are as before afterwards, also after an exception.

    Raises:
        ValueError: there is no separate reference and `model` has no adapters to switch off, or trains its own "ref".
    """
    model = unwrap(model)
    if ref_model is not None:
        yield unwrap(ref_model)
        return
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers: list[Any] = [module for module, _ in switchable(model)]
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
    refuse_trained_reference(wrappers)
    start = start_of(model)
    if start.adapters_on and not has_reference:
        with replaced(model, start.tensors):
            yield model
        return
    beside_adapters = {} if start.adapters_on else start.tensors
    with Changes() as changes, replaced(model, beside_adapters):
        for module in wrappers:  # note all before switching any: one may hold another
            for key in _SWITCHES:  # until first set they are attributes of the class
                changes.keep(vars(module), key)
            inside = (p for child in modules_of(module) for p in child._parameters.values() if p is not None)
            for parameter in inside:
                changes.note(torch.Tensor.requires_grad_, parameter, parameter.requires_grad)
        for module in wrappers:
            beside = isinstance(module, AuxiliaryTrainingWrapper) and REFERENCE_ADAPTER not in module._adapters
            if has_reference and not beside:
                module.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
            else:
                module.enable_adapters(False)
        yield model


def refuse_itself(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise ValueError where a separate reference holds what is trained, and so would move with the policy."""
    held = {id(p) for p in ref_model.parameters()}
    shared = [name for name, p in unwrap(model).named_parameters() if p.requires_grad and id(p) in held]
    if shared:
        raise ValueError(
            f"ref_model holds {shared[0]} ({len(shared)} such parameters), which is trained: it is the model itself, "
            "or the model inside it, and would be its own reference. Pass ref_model=None for the model with adapters "
            "off, or a separate model."
        )


def refuse_trained_reference(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError where the adapter that stands for the reference is in training itself."""
    for module in modules:
        factors = getattr(module, "lora_A", {})
        if REFERENCE_ADAPTER not in factors or REFERENCE_ADAPTER not in module.active_adapters:  # type: ignore[operator]
            continue
        if any(p.requires_grad for p in factors[REFERENCE_ADAPTER].parameters()):
            raise ValueError(
                'The adapter in training is called "ref", which is the name of the adapter that holds the reference: '
                "it would be its own. Give it another name, as in get_peft_model(model, config, adapter_name=...)."
            )


@contextlib.contextmanager
def _prompts_off(model: Any) -> Iterator[None]:
    """As PEFT does it, without the bound methods that it leaves on the model; or the adapter "ref" on."""
    active = model.active_adapter
    with Changes() as changes:
        for name in _LEFT_BY_PEFT:
            changes.keep(vars(model), name)
        try:
            if REFERENCE_ADAPTER in model.peft_config:
                model.active_adapter = REFERENCE_ADAPTER
                yield
            else:
                with model.disable_adapter():
                    yield
        finally:
            model.active_adapter = active


def _plain_name(name: str) -> str:
    """A module's name in the model without PEFT around it."""
    return name.removeprefix("base_model.model.")


def same_module(name: str, ref_model: nn.Module) -> nn.Module:
    try:
        return causal_lm(ref_model).get_submodule(_plain_name(name))
    except AttributeError:
        raise ValueError(
            f"ref_model has no module {_plain_name(name)}. Use the model that training started from."
        ) from None
