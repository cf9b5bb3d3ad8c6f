"""What a gated step holds beyond a plain one: the drift, a nudged hidden state, one site's or one band's temporaries.

Everything is counted from shapes. The bound is below what must not be there (a matrix of tokens by tokens or of a
linear's size, logits, activations that outlive their block), and the tests plant each of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models import randomise_adapter
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, sft_loss, target_gradient
from alphatoken_loss.gate.step import Step
from alphatoken_loss.models.attention import CHUNK_ELEMENTS, CHUNK_ROWS
from alphatoken_loss.models.sites import find_scored

K, WINDOW, FLOAT = 2, 8, 4


@dataclass(frozen=True)
class Size:
    batch: int
    length: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int = 4
    rank: int = 2
    blocks: int = 4

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SIZES = {
    "long": Size(batch=4, length=512, hidden=64, inner=96, vocabulary=64),
    "wide": Size(batch=2, length=24, hidden=256, inner=512, vocabulary=64),
    "wordy": Size(batch=2, length=40, hidden=64, inner=96, vocabulary=4096),
}
# What each size tells from its inventory, and since when it is held: the head's peak hides what comes after it.
PLANTED = {
    "long": ("mask", ("tokens x tokens", "heads x time x time", "activations")),
    "wide": ("mask", ("d_out x d_in", "activations")),
    "wordy": ("gate", ("vocabulary",)),
}


def build(size: Size, checkpointing: bool) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        use_cache=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=size.rank, target_modules="all-linear"))
    randomise_adapter(model, "default", 0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def batch_of(size: Size) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, size.vocabulary, (size.batch, size.length))
    labels = ids.clone()
    labels[:, : size.length // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def peak_bytes(model: torch.nn.Module, batch: dict[str, torch.Tensor], gate: AlphaToken | None) -> int:
    """High-water mark of the memory allocated within one step, its gradients included."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        sft_loss(model, batch, gate).backward()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def gate_of(model: torch.nn.Module, batch: dict[str, torch.Tensor], estimator: str) -> AlphaToken:
    layers = K if estimator == "ghost" else "all"
    config = AlphaTokenConfig(estimator=estimator, num_layers=layers, causal_window=WINDOW)
    scored = find_scored(model, layers, AlphaTokenConfig(estimator=estimator).scope)
    shapes = {site.name: site.shape for site in scored.sites}
    fisher = Fisher({name: (torch.full((out,), size / out), torch.ones(size)) for name, (out, size) in shapes.items()})
    return AlphaToken(model, target=target_gradient(model, batch, config=config), fisher=fisher, config=config)


def inventory(size: Size, scored_bytes: int, estimator: str) -> int:
    """Bytes that a gated step may hold beyond a plain one."""
    parts = 2  # target and drift
    if estimator == "difference":
        hidden = FLOAT * size.tokens * size.hidden
        # The direction (drift, and what it makes with the target), the nudged adapter, one hidden state.
        return 3 * scored_bytes + hidden
    accumulators = 2 * parts * FLOAT * size.tokens  # direct and causal
    # Of one site: x C_A^T, [B, C_B]^T d, their products; and the band's probabilities, in chunks of queries.
    site = 6 * (1 + parts) * size.rank * FLOAT * size.tokens
    queries = min(max(16, CHUNK_ELEMENTS // (size.tokens * size.heads)), max(CHUNK_ROWS, WINDOW), size.length)
    band = 3 * FLOAT * size.tokens * size.heads * queries
    # Gradients on their way through a block whose graph is kept; a plain backward has let go of as much by then.
    passing = FLOAT * size.tokens * 2 * (size.inner + size.hidden)
    # The drift, and one site's matrices side by side.
    return 2 * scored_bytes + accumulators + site + band + passing


def planted(kind: str, size: Size) -> torch.Tensor:
    shape = {
        "tokens x tokens": (size.tokens, size.tokens),
        "heads x time x time": (size.batch, size.heads, size.length, size.length),
        "d_out x d_in": (size.inner, size.hidden),
        "vocabulary": (size.tokens, size.vocabulary),
        "activations": (K, 10, size.tokens, size.hidden),  # some of what K blocks save
    }[kind]
    return torch.ones(shape)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["graph", "checkpointing"])
@pytest.mark.parametrize("estimator", ["ghost", "difference"])
@pytest.mark.parametrize("name", SIZES)
def test_a_gated_step_holds_its_inventory_and_no_more(name, estimator, checkpointing, monkeypatch):
    size = SIZES[name]
    model, batch = build(size, checkpointing), batch_of(size)
    gate = gate_of(model, batch, estimator)
    peak_bytes(model, batch, gate)  # what is found out once per model
    plain = peak_bytes(model, batch, None)
    scored = find_scored(model, gate.config.scored_layers, gate.config.scope)
    allowed = inventory(size, FLOAT * sum(p.numel() for p in scored.parameters.values()), estimator)
    assert peak_bytes(model, batch, gate) - plain <= allowed

    place, kinds = PLANTED[name]
    original = getattr(Step, place)
    for kind in kinds:

        def hoarding(step, given, kind=kind):
            step.held = planted(kind, size)
            return original(step, given)

        with monkeypatch.context() as patch:
            patch.setattr(Step, place, hoarding)
            assert peak_bytes(model, batch, gate) - plain > allowed, kind
