"""Everything about a model and the process that a call must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def _value(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Instance attributes; containers by what is in them, everything else by identity."""
    out: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key in HOOKS or key in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, (dict, set, list, tuple, str, int, float, bool, type(None))):
            out[key] = repr(value)
        else:
            out[key] = id(value)
    return out


def _tensor_hooks(parameter: torch.Tensor) -> tuple[int, int]:
    return (
        len(parameter._backward_hooks or {}),
        len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {}),
    )


def model_state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"state_dict keys": list(model.state_dict())}
    config = getattr(model, "config", None)
    if config is not None:
        state["config"] = repr(config.to_dict()) + str(config._attn_implementation)
    if hasattr(model, "peft_config"):
        state["adapters"] = (list(model.peft_config), list(model.active_adapters), model.active_adapter)
    for name, module in model.named_modules():
        state[f"{name}: training"] = module.training
        state[f"{name}: hooks"] = {key: list(vars(module).get(key, {}) or ()) for key in HOOKS}
        state[f"{name}: attributes"] = _attributes(module)
        state[f"{name}: modules"] = {key: id(child) for key, child in module._modules.items()}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}: identity"] = (id(parameter), parameter.data_ptr(), parameter.requires_grad)
        state[f"{name}: hooks"] = _tensor_hooks(parameter)
        state[f"{name}: data"] = _value(parameter)
        state[f"{name}: grad"] = _value(parameter.grad)
        quant_state = getattr(parameter, "quant_state", None)
        if quant_state is not None:
            state[f"{name}: quantisation"] = repr(sorted(quant_state.__dict__))
            state[f"{name}: absmax"] = _value(quant_state.absmax)
    return state


def process_state() -> dict[str, Any]:
    numpy_state = numpy.random.get_state()
    return {
        "torch generator": torch.get_rng_state(),
        "python generator": repr(random.getstate()),
        "numpy generator": (numpy_state[1].tolist(), numpy_state[2]),
        "attention functions": {key: id(value) for key, value in ALL_ATTENTION_FUNCTIONS.items()},
        "attention classes": {key: id(value) for key, value in AttentionInterface._global_mapping.items()},
        "softmax": id(nn.functional.softmax),
        "sdpa": id(nn.functional.scaled_dot_product_attention),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "default dtype": torch.get_default_dtype(),
        "anomaly": torch.is_anomaly_enabled(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "global hooks": {key: list(getattr(torch_module, key)) for key in GLOBAL_HOOKS},
    }


def snapshot(*models: nn.Module) -> list[dict[str, Any]]:
    return [process_state(), *(model_state(model) for model in models)]


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]], ignore: tuple[str, ...] = ()) -> list[str]:
    """Names of all entries that differ."""
    out = []
    for first, second in zip(before, after, strict=True):
        for key in first.keys() | second.keys():
            if any(key.endswith(end) for end in ignore):
                continue
            a, b = first.get(key), second.get(key)
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            elif isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
                same = False
            else:
                same = a == b
            if not same:
                out.append(key)
    return sorted(out)
