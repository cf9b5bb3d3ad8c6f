"""Tiny causal LMs from configs in code, LoRA adapters on them, and their layouts written down by hand."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
HIDDEN = 32
INTER = 40
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
LAYERS = 3

SEPARATE = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ROTARY: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INTER,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)


@dataclass(frozen=True)
class Family:
    """What a test must know of one architecture, found by reading its modelling file."""

    name: str
    config: Callable[[int], PretrainedConfig]
    blocks: str
    linears: tuple[str, ...]
    value: str
    value_rows: tuple[int, ...]
    norm_at_zero: bool = False
    eager_only: bool = False


def _llama(layers: int) -> PretrainedConfig:
    return LlamaConfig(num_hidden_layers=layers, **ROTARY)


def _mistral(layers: int) -> PretrainedConfig:
    return MistralConfig(num_hidden_layers=layers, sliding_window=4, head_dim=HEAD_DIM, **ROTARY)


def _qwen2(layers: int) -> PretrainedConfig:
    return Qwen2Config(num_hidden_layers=layers, **ROTARY)


def _qwen3(layers: int) -> PretrainedConfig:
    return Qwen3Config(num_hidden_layers=layers, head_dim=HEAD_DIM, **ROTARY)


def _gemma2(layers: int) -> PretrainedConfig:
    return Gemma2Config(
        num_hidden_layers=layers,
        head_dim=HEAD_DIM,
        sliding_window=4,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=8.0,
        query_pre_attn_scalar=HEAD_DIM,
        **ROTARY,
    )


def _gemma3(layers: int) -> PretrainedConfig:
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    return Gemma3TextConfig(
        num_hidden_layers=layers,
        head_dim=HEAD_DIM,
        sliding_window=4,
        layer_types=kinds,
        query_pre_attn_scalar=HEAD_DIM,
        **ROTARY,
    )


def _phi3(layers: int) -> PretrainedConfig:
    return Phi3Config(num_hidden_layers=layers, resid_pdrop=0.0, embd_pdrop=0.0, sliding_window=5, **ROTARY)


def _gpt2(layers: int) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=HEADS,
        n_positions=64,
        n_inner=INTER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def _gpt_neox(layers: int) -> PretrainedConfig:
    options = {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"}
    return GPTNeoXConfig(num_hidden_layers=layers, hidden_dropout=0.0, attention_dropout=0.0, **options)


_KV = KV_HEADS * HEAD_DIM
_WHOLE = tuple(range(_KV))
# Phi-3: [all queries | all keys | all values].  GPT-2: [queries | keys | values], each `hidden` wide.
# GPT-NeoX: head by head, [query | key | value] of one head, then the next head.
_PHI3_ROWS = tuple(range(HEADS * HEAD_DIM + _KV, HEADS * HEAD_DIM + 2 * _KV))
_GPT2_ROWS = tuple(range(2 * HIDDEN, 3 * HIDDEN))
_NEOX_ROWS = tuple(h * 3 * HEAD_DIM + 2 * HEAD_DIM + j for h in range(HEADS) for j in range(HEAD_DIM))

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", _llama, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE),
        Family("mistral", _mistral, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE),
        Family("qwen2", _qwen2, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE),
        Family("qwen3", _qwen3, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE),
        Family("gemma2", _gemma2, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE, True, True),
        Family("gemma3", _gemma3, "model.layers.{}", SEPARATE, "self_attn.v_proj", _WHOLE, True),
        Family(
            "phi3",
            _phi3,
            "model.layers.{}",
            ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
            "self_attn.qkv_proj",
            _PHI3_ROWS,
        ),
        Family(
            "gpt2",
            _gpt2,
            "transformer.h.{}",
            ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            "attn.c_attn",
            _GPT2_ROWS,
        ),
        Family(
            "gpt_neox",
            _gpt_neox,
            "gpt_neox.layers.{}",
            ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            "attention.query_key_value",
            _NEOX_ROWS,
        ),
    )
}


def deep_copy(model: nn.Module) -> nn.Module:
    """What `copy.deepcopy` makes, in half of the time: most of what a module holds are empty tables of hooks."""
    held = (value for module in model.modules() for value in vars(module).values())
    return copy.deepcopy(model, {id(value): type(value)() for value in held if _is_empty(value)})


def _is_empty(value: object) -> bool:
    return type(value) in (dict, OrderedDict, set, list) and not value


_MADE: dict[str, nn.Module] = {}


def _copy_of(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """A fresh copy of what `make` makes for this key: copying takes a third of the time of making. Nothing is drawn
    from torch's generator, whether it was made now or before."""
    name = repr(key)
    if name not in _MADE:
        with torch.random.fork_rng([]):
            _MADE[name] = make()
    return deep_copy(_MADE[name])


def _randomise(model: nn.Module, family: Family, seed: int) -> None:
    """Weights of a size that makes attention peaked, logits spread and every bias count."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(0.22 * noise)
            elif "norm" in name or "ln_" in name:
                centre = 0.0 if family.norm_at_zero or name.endswith("bias") else 1.0
                parameter.copy_(centre + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)


def base_model(
    name: str = "llama",
    *,
    attn: str = "sdpa",
    seed: int = 0,
    layers: int = LAYERS,
    dtype: torch.dtype = torch.float64,
    **config_changes: Any,
) -> nn.Module:
    """A tiny model of one family, random weights, in train mode."""
    family = FAMILIES[name]
    config = family.config(layers)
    for key, value in config_changes.items():
        setattr(config, key, value)
    attn = "eager" if family.eager_only else attn
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype)
    _randomise(model, family, seed)
    return model.train()


def randomise_adapter(model: nn.Module, adapter: str, seed: int) -> None:
    """Random A and non-zero random B for one adapter."""
    generator = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name and "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((0.2 if "lora_A" in name else 0.15) * noise.to(parameter.dtype))


def add_lora(
    model: nn.Module,
    name: str = "llama",
    *,
    r: int = 3,
    alpha: float = 5.0,
    targets: Iterable[str] | None = None,
    seed: int = 0,
    others: Iterable[str] = (),
    **options: Any,
) -> PeftModel:
    """A LoRA model with random adapters; `others` are further adapters, each of its own rank and scale."""
    targets = list(FAMILIES[name].linears if targets is None else targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **options)
        peft_model = get_peft_model(model, config)
        for i, other in enumerate(others):
            peft_model.add_adapter(
                other,
                LoraConfig(r=r + 1 + i, lora_alpha=alpha + 2.0, target_modules=targets, task_type="CAUSAL_LM"),
            )
    randomise_adapter(peft_model, "default", seed)
    for i, other in enumerate(others):
        randomise_adapter(peft_model, other, seed + 17 * (i + 1))
    return peft_model.train()


def lora_model(name: str = "llama", *, attn: str = "sdpa", seed: int = 0, **options: Any) -> PeftModel:
    """`base_model` and `add_lora` in one."""

    def make() -> PeftModel:
        base = {k: v for k, v in options.items() if k in ("layers", "dtype")}
        adapter = {k: v for k, v in options.items() if k not in base}
        return add_lora(base_model(name, attn=attn, seed=seed, **base), name, seed=seed, **adapter)

    return _copy_of(("lora", name, attn, seed, sorted(options.items())), make)


def _nf4_base(name: str, attn: str, seed: int) -> nn.Module:
    attn = "eager" if FAMILIES[name].eager_only else attn
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        base_model(name, attn=attn, seed=seed, dtype=torch.float32).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, attn_implementation=attn, dtype=torch.float32
        )
    with torch.no_grad():
        model.train()(input_ids=torch.ones(1, 2, dtype=torch.long))  # bitsandbytes 0.46 then sets flags of its own
    return model


def nf4_base(name: str = "llama", *, attn: str = "sdpa", seed: int = 0) -> nn.Module:
    """The same model with its linears in NF4, float32 compute; a fresh copy each time."""
    return _copy_of(("nf4 base", name, attn, seed), lambda: _nf4_base(name, attn, seed))


def nf4_lora_model(name: str = "llama", *, attn: str = "sdpa", seed: int = 0, **options: Any) -> PeftModel:
    """An NF4 base with float32 LoRA adapters."""

    def make() -> PeftModel:
        return add_lora(nf4_base(name, attn=attn, seed=seed), name, seed=seed, **options)

    return _copy_of(("nf4", name, attn, seed, sorted(options.items())), make)
