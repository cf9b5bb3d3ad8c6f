"""A causal LM by its structure: decoder, blocks, and what lies behind a gate."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


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


def blocks_or_none(model: nn.Module) -> list[nn.Module]:
    try:
        return list(find_blocks(model))
    except ValueError:
        return []


def find_decoder(model: nn.Module) -> nn.Module:
    """What stands before the LM head: its output is the last hidden state."""
    base = causal_lm(model)
    return base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]


def learns_prompts(model: nn.Module) -> bool:
    """Whether the active adapter puts virtual tokens before a batch's own (prompt, prefix and P-tuning)."""
    from peft import PeftModel

    inner = unwrap(model)
    return isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning


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
