"""Bytes that QLoRA steps take, plain and gated, by arithmetic; `gpu_budget.py --budget` prints them.

The head is the one without TRL. CUDA's context, the allocator's slack and bitsandbytes' work space are left out.
"""

from __future__ import annotations

from llamas import RANK, config_of
from transformers import LlamaConfig

from alphatoken_loss.losses.head import LOGITS

GIB = 2**30


def kept_of_block(config: LlamaConfig, tokens: int) -> int:
    """Bytes that autograd keeps of one block, without what is as narrow as the rank: the tests count them."""
    kv = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    norms, inputs = 8 * config.hidden_size, 12 * config.hidden_size + 2 * config.intermediate_size  # float32; bf16
    attention, mlp = 4 * config.hidden_size + 4 * kv, 6 * config.intermediate_size
    return tokens * (norms + inputs + attention + mlp)


def within_steps(config: LlamaConfig, tokens: int, chunk: int) -> dict[str, tuple[float, str]]:
    """Kind of step -> bytes beyond model and optimizer, what its gate holds included, and what they are."""
    hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lora = adapter_parameters(config)
    held, scored, states = 4 * lora * (1 + 1 / RANK), 3 * lora / blocks, 2 * tokens * hidden * blocks
    # Of a logit: itself in bf16 and float32, log-softmax, and its gradient in the place of one of them.
    at_head = states + 2 * lora + 12 * chunk * config.vocab_size
    passing = 2 * inner * hidden + 8 * tokens * inner  # one dequantised weight, two float32 states of the MLP
    in_blocks = max(states, 4 * lora) + kept_of_block(config, tokens) + passing
    casts = 4 * tokens * (inner + hidden) + 4 * tokens * hidden
    return {
        "plain step": (
            max(at_head, in_blocks),
            f"the larger of: at the head, checkpoints, adapters in bf16, {chunk} rows of logits ({at_head / GIB:.3f}); "
            "in the blocks, checkpoints or adapter gradients (one goes as the other comes), one block's activations, "
            f"what passes ({in_blocks / GIB:.3f})",
        ),
        "ghost, K=3": (
            8 * scored + max(at_head, in_blocks + casts),
            "the same with target and drift of three blocks and, in the blocks, float32 copies of one linear's "
            "input and error and two states",
        ),
        "difference, all": (
            held + max(at_head + 2 * tokens * hidden, in_blocks, 8 * lora + passing),
            "the same with target and Fisher, a state at the head; or direction and nudged adapters in the nudged "
            "forward",
        ),
    }


def adapter_parameters(config: LlamaConfig) -> int:
    return config.num_hidden_layers * sum(RANK * (out + into) for out, into in linears(config))


def linears(config: LlamaConfig) -> list[tuple[int, int]]:
    """(out, in) of a block's."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads
    return [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]


def resident_bytes(config: LlamaConfig) -> dict[str, float]:
    """What model and optimizer hold -> bytes."""
    lora = adapter_parameters(config)
    weights = config.num_hidden_layers * sum(out * into for out, into in linears(config))
    rows = (1 if config.tie_word_embeddings else 2) * config.vocab_size + 2 * config.num_hidden_layers + 1
    return {
        "NF4 weights, 4 bits": weights / 2,
        "their constants, 8 bits to 64 and 32 bits to 64 x 256 weights": weights / 64 + 4 * weights / (64 * 256),
        "embeddings, head and norms, bf16": 2 * config.hidden_size * rows,
        "adapters, float32": 4 * lora,
        "optimizer, two 8-bit moments (paged: not the allocator's)": 2 * lora + 8 * lora / 256,
    }


def _within(config: LlamaConfig) -> dict[str, tuple[float, str]]:
    return within_steps(config, 2048, max(1, LOGITS // config.vocab_size))


def totals(size: str) -> dict[str, float]:
    """Kind of step -> bytes by arithmetic, of 2,048 tokens."""
    resident = sum(resident_bytes(config_of(size)).values())
    return {name: resident + number for name, (number, _) in _within(config_of(size)).items()}


def budget(size: str, task: str) -> str:
    """Bytes by arithmetic, as a table: not a measurement."""
    config, whole = config_of(size), totals(size)
    shape = "a pair of 1,024 tokens each" if task == "dpo" else "1 x 2,048 tokens"
    lines = [f"| {size} {task}, {shape}: **arithmetic, not a measurement** | GiB |", "|---|---|"]
    lines += [f"| {what} | {number / GIB:.3f} |" for what, number in resident_bytes(config).items()]
    lines += [f"| within, {name}: {what} | {number / GIB:.3f} |" for name, (number, what) in _within(config).items()]
    for name, total in whole.items():
        lines.append(f"| **{name}**, ratio {total / whole['plain step']:.3f} | **{total / GIB:.3f}** |")
    return "\n".join(lines)
