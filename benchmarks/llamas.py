"""Llamas of known shapes with random weights, made in NF4 block by block: no download, no whole bf16 copy."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

RANK = 16
# hidden, blocks, intermediate, heads, key-value heads, vocabulary, tied, factor of the rotary scaling
SIZES = {  # Llama 3.2, 3.2 and 3.1, and one for CPUs
    "tiny": (64, 4, 128, 4, 2, 512, False, 8.0),
    "1b": (2048, 16, 8192, 32, 8, 128256, True, 32.0),
    "3b": (3072, 28, 8192, 24, 8, 128256, True, 32.0),
    "8b": (4096, 32, 14336, 32, 8, 128256, False, 8.0),
}


def config_of(size: str) -> LlamaConfig:
    hidden, blocks, intermediate, heads, kv_heads, vocabulary, tied, factor = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        use_cache=False,
    )


def quantised(linear: nn.Linear, device: torch.device) -> nn.Module:
    """A linear of this shape with random weights in NF4."""
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    with torch.device("meta"):
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    return made.to(device)  # this is what quantises


def build(size: str, device: torch.device) -> nn.Module:
    """The QLoRA model in training mode: no more than one linear of it is ever in bf16."""
    torch.manual_seed(0)
    config = config_of(size)
    with torch.device("meta"):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for block in base.model.layers:
        for name, linear in list(block.named_modules()):
            if isinstance(linear, nn.Linear):
                block.set_submodule(name, quantised(linear, device))
    # Its frequencies are buffers, which hold what was computed from the config, in float32.
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(device)
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                filled = filled.normal_(0, 0.02) if parameter.dim() > 1 else filled.fill_(1)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    base.tie_weights()
    base.is_loaded_in_4bit = True  # what PEFT goes by
    model: nn.Module = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.002)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Paged 8-bit AdamW, or what there is, after a word."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    probe = torch.ones(4096, device=parameters[0].device, requires_grad=True)
    probe.grad = torch.ones_like(probe)
    for name in ("PagedAdamW8bit", "AdamW8bit"):
        try:
            getattr(bnb.optim, name)([probe], lr=1e-5).step()
            return getattr(bnb.optim, name)(parameters, lr=1e-5)
        except Exception as error:  # whatever a platform without these kernels says
            print(f"bitsandbytes' {name} does not run here ({type(error).__name__}); the next best is taken.")
    return torch.optim.AdamW(parameters, lr=1e-5)
