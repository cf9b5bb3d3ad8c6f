"""A causal LM by its structure: decoder, blocks, and what lies behind a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .changes import Changes
from .layout import kept, modules_of
from .modes import without_noise


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper; module names in this library are those of this model."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def name_in(adapter: str, name: str, own: str, named: Mapping[str, object]) -> str | None:
    """The name that a parameter of the adapter `own` has in another adapter, if it is among `named`."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part == own]  # modules may be called what an adapter is
    found = (".".join([*parts[:place], adapter, *parts[place + 1 :]]) for place in reversed(places))
    return next((other for other in found if other in named), None)


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's and a distributed wrapper.

    Raises:
        ValueError: it is none.
    """
    model = unwrap(model)
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(base, "get_input_embeddings"):
        raise ValueError(
            f"{type(base).__name__} is no model of Transformers (it has no get_input_embeddings), whose structure "
            "token values are taken by. Load the weights with AutoModelForCausalLM; or, to train elsewhere "
            "(torchtune), write the labels there first: `alphatoken score`."
        )
    return base


COMPILED = (
    "compiled code does not run the hooks that token values are taken by. Train without torch.compile: do not call "
    "compile() on the model or its blocks, and run the model itself, not what torch.compile returned."
)


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError if a model, or a part of it, was compiled."""
    for module in modules_of(model):
        compiled = "_orig_mod" in module._modules or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            name = next(name for name, each in model.named_modules() if each is module)
            raise ValueError(f"{name or 'The model'} ({type(module).__name__}) is compiled: {COMPILED}")


def refuse_x_lora(model: nn.Module) -> None:
    """Raise ValueError for an adapter whose forward runs the model twice."""
    adapters: Any = getattr(model, "peft_config", {})
    if any(str(config.peft_type).endswith("XLORA") for config in adapters.values()):
        raise ValueError(
            "The adapter is X-LoRA, which runs the model twice in a forward, the first time for its scalings: no token "
            "values can be taken of that. Use LoRA, or train without token values (rho=1.0)."
        )


# Seen of each: its loss is the cross-entropy without a shift.
_UNSHIFTED = {
    *(f"{name}ForCausalLM" for name in ("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "Marian", "MBart")),
    *(f"{name}ForCausalLM" for name in ("Mvp", "Pegasus", "PLBart", "ProphetNet", "TrOCR", "Whisper", "CpmAnt")),
    *("XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"),
}


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise ValueError for a model whose labels are not its own input, shifted."""
    base = causal_lm(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder: its labels are the decoder's, not those of input_ids, and "
            "nothing here values them. Use a decoder-only model (a causal LM)."
        )
    if type(base).__name__ in _UNSHIFTED:
        raise ValueError(
            f"{type(base).__name__} compares its logits with the labels of the same positions, not of the next ones, "
            "so a mask would stand beside the tokens that it is of. Use a causal LM that shifts labels itself, as "
            "nearly all do."
        )


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal LM: the longest list of checkpointable layers in its decoder.

    Raises:
        ValueError: no list of blocks is found.
    """
    base = causal_lm(model)
    lists = [
        module
        for module in modules_of(find_decoder(model))
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


# Model -> (what it says its decoder, body and head are, the decoder that was found).
_decoders: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ref[nn.Module]]] = WeakKeyDictionary()


def find_decoder(model: nn.Module) -> nn.Module:
    """The part before the LM head; its output is the last hidden state."""
    base = causal_lm(model)
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else base  # type: ignore[operator]
    body = getattr(base, "base_model", base)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    said = id(decoder), id(body), id(head)
    before = _decoders.get(base)
    if before is not None and before[0] == said and (same := before[1]()) is not None:
        return same
    if body is not base and not _holds_blocks(decoder) and _holds_blocks(body):
        decoder = body  # ModernBERT's `get_decoder` returns its output embedding
    found = _without_head(decoder, head) or base
    _decoders[base] = said, ref(found)
    return found


def _without_head(decoder: nn.Module, head: nn.Module | None) -> nn.Module | None:
    # Some (Llama 4, Mllama) return an LM with its head: take its body, the child that holds the blocks.
    while head is not None and any(module is head for module in modules_of(decoder)):
        bodies = [child for child in decoder.children() if _holds_blocks(child)]
        if len(bodies) != 1:
            return None
        (decoder,) = bodies
    return decoder


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(child, GradientCheckpointingLayer) for child in module.modules())


def learns_prompts(model: nn.Module) -> bool:
    """Whether the active adapter puts virtual tokens before a batch's own (prompt, prefix and P-tuning)."""
    from peft import PeftModel

    inner = unwrap(model)
    return isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning


def runs_apart(model: nn.Module) -> bool:
    """Whether the decoder and its blocks compute the same outside the model's forward.

    Not so if PEFT hands arguments of the forward to its layers by hooks: aLoRA is on from an invocation sequence in the
    input.
    """
    config = getattr(unwrap(model), "peft_config", {})
    return not any(getattr(adapter, "alora_invocation_tokens", None) for adapter in config.values())


def trained_behind(model: nn.Module, gate: nn.Module | None = None) -> list[str]:
    """Names of trainable parameters behind a gate, which cannot mask their whole gradient.

    The gate is at the output of a module, by default of the decoder. They are found by a forward of a few tokens whose
    graph begins at that output: a parameter that has a gradient in it lies behind. This runs only if something outside
    the blocks is trained, or something in the LM head.
    """
    inner = unwrap(model)
    place = find_decoder(inner) if gate is None else gate
    return kept(inner, ("behind", id(place)), lambda: _trained_behind(inner, place))


def _trained_behind(inner: nn.Module, gate: nn.Module) -> list[str]:
    base = causal_lm(inner)
    in_base = {id(parameter) for parameter in base.parameters()}
    named = {name: p for name, p in inner.named_parameters() if p.requires_grad and id(p) in in_base}
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None  # type: ignore[operator]
    tied = set() if head is None else {id(parameter) for parameter in head.parameters()}
    blocks = blocks_or_none(inner)
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()} - tied
    doubtful = {name: p for name, p in named.items() if id(p) not in in_blocks}
    return _found_behind(inner, gate, doubtful) if doubtful else []


def _found_behind(model: nn.Module, gate: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    device = causal_lm(model).get_input_embeddings().weight.device  # type: ignore[operator]
    ids = torch.arange(1, 9, device=device)[None]

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output.detach().requires_grad_()
        if isinstance(output, tuple):
            return (output[0].detach().requires_grad_(), *output[1:])
        output.last_hidden_state = output.last_hidden_state.detach().requires_grad_()
        return output

    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with (
        Changes() as changes,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        without_noise(model),
    ):
        changes.hook(gate[-1] if isinstance(gate, nn.ModuleList) else gate, cut)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if not logits.requires_grad:
            return []
        found = torch.autograd.grad(logits.float().sum(), list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, found, strict=True) if gradient is not None]
