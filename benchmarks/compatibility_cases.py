"""The models that compatibility.py tries: architectures from small configurations, and kinds of adapters on a Llama."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch import nn

DIFFERENCE = 5e-2  # a nudge has a curvature and a rounding of its own
VOCAB = 61
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model to try: how it is built in a dtype, and what of it a reader must know."""

    make: Callable[[torch.dtype], nn.Module]
    tolerance: float = DIFFERENCE  # of the difference estimator's values
    note: str = ""


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights of a size at which attention is peaked and logits differ; vectors stay near their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.15 if parameter.dim() > 1 else 0.05) * noise.to(parameter.dtype))
    return model


def adapted(base: nn.Module, adapter: Any, dtype: torch.dtype | None) -> nn.Module:
    """With an adapter that is away from its start, without dropout; `dtype` as the model is where `None`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, adapter) if isinstance(adapter, peft.PeftConfig) else adapter(base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return (model if dtype is None else model.to(dtype)).train()


def base_of(name: str, changes: dict[str, Any], without: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """`name` is that of a configuration class; the model class is the one that transformers pairs it with."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in {**SIZES, **changes}.items() if key not in without}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products are of float32 and below
    return spread(model)


def architecture(
    name: str,
    targets: Any = "all-linear",
    *,
    without: Iterable[str] = (),
    lora: dict[str, Any] | None = None,
    note: str = "",
    **changes: Any,
) -> Case:
    def make(dtype: torch.dtype) -> nn.Module:
        options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **(lora or {})}
        return adapted(base_of(name, changes, without, dtype), peft.LoraConfig(**options), dtype)

    return Case(make, note=note)


WINDOW = {"sliding_window": 6}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = dict(
    q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_key_value_heads=4
)
ROUTED = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1
)
LATENT_LINEARS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LINEAR_ATTENTION = dict(
    head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
STATE = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
KV, INNER, POSITIONS = "num_key_value_heads", "intermediate_size", "max_position_embeddings"
PER_LAYER = dict(**ALTERNATE, **WINDOW, head_dim=8, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
SHARED = {"num_kv_shared_layers": 2}
NANO = dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)
FALCON = {"without": (KV, INNER, POSITIONS)}

ARCHITECTURES: dict[str, Case] = {
    "Llama": architecture("Llama"),
    "Mistral": architecture("Mistral", **WINDOW),
    "Ministral": architecture("Ministral", head_dim=8, **WINDOW),
    "Qwen2": architecture("Qwen2"),
    "Qwen3": architecture("Qwen3", head_dim=8),
    "Qwen3.5": architecture("Qwen3_5Text", **LINEAR_ATTENTION),
    "Gemma 2": architecture("Gemma2", head_dim=8, query_pre_attn_scalar=8, **WINDOW),
    "Gemma 3": architecture("Gemma3Text", head_dim=8, query_pre_attn_scalar=8, **WINDOW),
    "Gemma 3n": architecture("Gemma3nText", SEVEN, **SHARED, **NANO, **PER_LAYER),
    "Gemma 3n, all linears": architecture(
        "Gemma3nText",
        note="in training mode transformers passes the adapter of `correction_coefs` by; values are of evaluation mode",
        **SHARED, **NANO, **PER_LAYER,
    ),
    "Gemma 4": architecture("Gemma4Text", **PER_LAYER),
    "Gemma 4, shared keys and values": architecture("Gemma4Text", **SHARED, **PER_LAYER),
    "Phi": architecture("Phi"),
    "Phi-3": architecture("Phi3", **WINDOW),
    "OLMo 2": architecture("Olmo2"),
    "OLMo 3": architecture("Olmo3", **WINDOW),
    "Cohere": architecture("Cohere"),
    "Cohere 2": architecture("Cohere2", head_dim=8, **WINDOW),
    "Granite": architecture("Granite", logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "SmolLM3": architecture("SmolLM3"),
    "StarCoder 2": architecture("Starcoder2", **WINDOW),
    "GLM-4": architecture("Glm4", head_dim=8),
    "Nemotron": architecture("Nemotron"),
    "StableLM": architecture("StableLm"),
    "ERNIE 4.5": architecture("Ernie4_5", head_dim=8),
    "HunYuan": architecture("HunYuanDenseV1", head_dim=8),
    "Falcon 7B": architecture("Falcon", multi_query=True, parallel_attn=True, alibi=False, **FALCON),
    "Falcon 40B": architecture("Falcon", new_decoder_architecture=True, num_kv_heads=2, alibi=False, **FALCON),
    "Falcon RW (ALiBi)": architecture("Falcon", multi_query=False, parallel_attn=False, alibi=True, **FALCON),
    "OPT": architecture("OPT", dropout=0.0, without=(KV, INNER), ffn_dim=40, word_embed_proj_dim=32),
    "OPT-350m": architecture(
        "OPT", dropout=0.0, without=(KV, INNER), ffn_dim=40, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "BLOOM": architecture("Bloom", without=(KV, INNER, POSITIONS)),
    "GPT-2": architecture("GPT2", without=(KV, INNER)),
    "GPT-NeoX": architecture("GPTNeoX", without=(KV,)),
    "GPT-J": architecture("GPTJ", without=(KV, INNER), rotary_dim=4),
    "MPT": architecture("Mpt", without=(KV, INNER), d_model=32, n_heads=4, n_layers=2),
    "Mixtral": architecture("Mixtral", ATTENTION, **LOCAL),
    "Mixtral, adapters on experts": architecture(
        "Mixtral", ATTENTION, lora={"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, **LOCAL
    ),
    "Qwen2-MoE": architecture("Qwen2Moe", ATTENTION, shared_expert_intermediate_size=24, **EXPERTS),
    "Qwen3-MoE": architecture("Qwen3Moe", ATTENTION, head_dim=8, **EXPERTS),
    "OLMoE": architecture("Olmoe", ATTENTION, num_experts=4, num_experts_per_tok=2),
    "Granite MoE": architecture("GraniteMoe", ATTENTION, **LOCAL),
    "Llama 4": architecture(
        "Llama4Text", SEVEN, head_dim=8, intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=8,
    ),
    "GPT-OSS": architecture("GptOss", ATTENTION, head_dim=8, **LOCAL, **WINDOW),
    "DeepSeek-V2": architecture("DeepseekV2", LATENT_LINEARS, **LATENT, **ROUTED),
    "DeepSeek-V3": architecture("DeepseekV3", LATENT_LINEARS, n_group=2, topk_group=1, **LATENT, **ROUTED),
    "Mamba": architecture("Mamba", ["in_proj", "x_proj"], without=(KV, INNER), state_size=8),
    "Mamba 2": architecture(
        "Mamba2", ["in_proj"], without=(KV, INNER), state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8
    ),
    "RWKV": architecture(
        "Rwkv", ["key", "value", "receptance", "output"], without=(KV, INNER, POSITIONS), context_length=64
    ),
    "Falcon-H1": architecture("FalconH1", [*SEVEN, "in_proj"], mamba_d_ssm=64, **STATE),
    "Jamba": architecture(
        "Jamba", [*ATTENTION, "in_proj", "x_proj"], num_experts=2, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4,
    ),
    "Bamba": architecture("Bamba", [*SEVEN, "in_proj"], attn_layer_indices=[1], **STATE),
    "Qwen3-Next": architecture(
        "Qwen3Next", [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"], shared_expert_intermediate_size=24,
        **EXPERTS, **LINEAR_ATTENTION,
    ),
    "LFM2": architecture("Lfm2", layer_types=["conv", "full_attention"]),
    "Zamba 2": architecture(
        "Zamba2", ["in_proj"], layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, mamba_expand=2,
        chunk_size=8, use_mamba_kernels=False, adapter_rank=4,
    ),
}  # fmt: skip


def quantised(bits: int) -> Callable[[torch.dtype], nn.Module]:
    def make(_dtype: torch.dtype) -> nn.Module:
        four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        config = transformers.BitsAndBytesConfig(**(four if bits == 4 else dict(load_in_8bit=True)))
        with tempfile.TemporaryDirectory() as folder:
            base_of("Llama", {}, (), torch.float32).save_pretrained(folder)
            base = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, dtype=torch.float32
            )
        return adapted(base, peft.LoraConfig(r=4, target_modules=SEVEN, task_type="CAUSAL_LM"), None)

    return make


def adapter(kind: str, *, base: str = "Llama", tolerance: float = DIFFERENCE, note: str = "", **options: Any) -> Case:
    """`kind` is the name of PEFT's configuration class without `Config`."""

    def make(dtype: torch.dtype) -> nn.Module:
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
        return adapted(base_of(base, {}, (), dtype), config, dtype)

    return Case(make, tolerance, note)


def x_lora(dtype: torch.dtype) -> nn.Module:
    def mixed(base: nn.Module) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("0", "1"):
                one = base_of("Llama", {}, (), dtype)
                peft.get_peft_model(one, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(f"{folder}/{name}")
            paths = {name: f"{folder}/{name}" for name in ("0", "1")}
            config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=paths)
            base.config.use_cache = False
            return peft.get_peft_model(base, config)

    return adapted(base_of("Llama", {}, (), dtype), mixed, dtype)


def trained_linears(dtype: torch.dtype) -> nn.Module:
    def chosen(base: nn.Module) -> nn.Module:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("proj" in name)
        return base

    return adapted(base_of("Llama", {}, (), dtype), chosen, dtype)


THREE = ["q_proj", "v_proj", "up_proj"]
lora = partial(adapter, "Lora", r=4, target_modules=SEVEN)
ADAPTERS: dict[str, Case] = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "LoRA, rank and alpha patterns": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "DoRA": lora(
        use_dora=True,
        tolerance=0.3,
        note="PEFT's gradient takes the norm of DoRA as a constant, a nudged forward does not: "
        "a wider tolerance for the difference estimator",
    ),
    "aLoRA": lora(alora_invocation_tokens=[7]),
    "LoRA with its own biases": lora(lora_bias=True),
    "LoRA, biases trained": adapter("Lora", base="Qwen2", r=4, target_modules=THREE, bias="lora_only"),
    "LoRA and trained norms": lora(modules_to_save=["input_layernorm", "post_attention_layernorm"]),
    "LoRA and embeddings": adapter("Lora", r=4, target_modules=[*SEVEN, "embed_tokens"]),
    "LoRA and the LM head": adapter("Lora", r=4, target_modules=[*SEVEN, "lm_head"]),
    "LoRA and trainable tokens": lora(trainable_token_indices=[3, 7]),
    "AdaLoRA": adapter("AdaLora", target_modules=SEVEN, init_r=4, target_r=2, total_step=100),
    "X-LoRA": Case(x_lora),
    "LoHa": adapter("LoHa", r=3, target_modules=THREE),
    "LoKr": adapter("LoKr", r=3, target_modules=THREE),
    "IA3": adapter("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": adapter("OFT", r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    "BOFT": adapter("BOFT", boft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "HRA": adapter("HRA", r=4, target_modules=["q_proj", "v_proj"]),
    "VeRA": adapter("Vera", r=4, target_modules=["q_proj", "o_proj"]),
    "FourierFT": adapter("FourierFT", n_frequency=20, target_modules=["q_proj", "v_proj"]),
    "VB-LoRA": adapter("VBLoRA", r=2, num_vectors=8, vector_length=8, target_modules=["q_proj", "o_proj"]),
    "MiSS": adapter("Miss", r=4, target_modules=["q_proj", "v_proj"]),
    "Trained norms": adapter("LNTuning", target_modules=["input_layernorm", "post_attention_layernorm"]),
    "Prefix tuning": adapter("PrefixTuning", num_virtual_tokens=3),
    "Prompt tuning": adapter("PromptTuning", num_virtual_tokens=4),
    "P-tuning": adapter("PromptEncoder", num_virtual_tokens=4, encoder_hidden_size=16),
    "LoRA on NF4 (4 bits)": Case(quantised(4)),
    "LoRA on LLM.int8 (8 bits)": Case(
        quantised(8),
        note="on a CPU bitsandbytes multiplies by the dequantised weights; on a GPU it rounds inputs too",
    ),
    "No adapter: linears trained themselves": Case(trained_linears),
}
