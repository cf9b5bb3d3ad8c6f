"""Log-probabilities by chunks of rows, where TRL's fused head is not installed."""

from __future__ import annotations

import pytest
import torch
from batches import pair_batch, sft_batch
from checks import TOL64, assert_close, assert_same_grads, grads_of
from models import ROTARY, VOCAB, lora_model
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from alphatoken_loss import dpo_loss, target_gradient
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses import logps as module
from alphatoken_loss.losses.head import logits_of_hidden
from alphatoken_loss.losses.logps import token_logps

ROWS = 3  # of a chunk: batches here have 7 to 19 rows before a label


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.setattr(module, "_trls_head", lambda: None)
    monkeypatch.setattr("alphatoken_loss.losses.head.LOGITS", ROWS * VOCAB + VOCAB // 2)


KINDS = ("none", "full", "packed", "right", "left", "ragged")
# Gemma 2 caps its logits; its eager attention has NaN where a window holds padding alone.
CASES = [("llama", kind) for kind in KINDS] + [("gpt2", "left"), *(("gemma2", kind) for kind in KINDS[:3])]


@pytest.mark.parametrize("family, kind", CASES)
def test_as_from_whole_logits(family, kind, without_trl):
    """Each label's log-probability and, under uneven weights, the gradients."""
    for seed in (0, 1):
        batch = read_batch(sft_batch(kind, seed=seed))
        weights = torch.rand(batch.labels.shape, dtype=torch.float64)
        whole, chunked = lora_model(family, seed=seed), lora_model(family, seed=seed)
        logits = whole(**{**batch.inputs, "use_cache": False}).logits
        table = logits.log_softmax(-1)[:, :-1].gather(2, batch.labels[:, 1:, None].clamp(min=0))[..., 0]
        expected = torch.nn.functional.pad(table.masked_fill(batch.labels[:, 1:] == -100, 0), (1, 0))
        found = token_logps(chunked, batch, fused=True)
        assert_close(found.detach(), expected.detach(), TOL64)
        (expected * weights).sum().backward()
        (found * weights).sum().backward()
        assert_same_grads(grads_of(chunked), grads_of(whole), TOL64)
        assert "forward" not in chunked.get_base_model().__dict__


def test_no_more_than_a_chunk_of_logits_and_none_kept(without_trl):
    model, batch = lora_model("llama"), read_batch(sft_batch("right"))
    rows, kept = [], []
    model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))

    def keep(tensor):
        kept.append(tensor.shape[-1] if tensor.dim() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = token_logps(model, batch, fused=True)
    count, forward = int(batch.rows.sum()), list(rows)
    assert max(forward) == ROWS and sum(forward) == count and count % ROWS
    assert VOCAB not in kept
    logps.sum().backward()
    assert sorted(rows) == sorted(2 * forward)  # each once more


@pytest.mark.parametrize("enabled", [False, True])
def test_nothing_counts(enabled, without_trl):
    batch = sft_batch("right")
    model, read = lora_model("llama"), read_batch({**batch, "labels": torch.full_like(batch["labels"], -100)})
    with torch.set_grad_enabled(enabled):
        logps = token_logps(model, read, fused=True)
    assert not logps.any() and logps.requires_grad == enabled
    if enabled:
        logps.sum().backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_failing_head_leaves_the_forward_alone(without_trl):
    model = lora_model("llama")
    model.get_base_model().lm_head.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_logps(model, read_batch(sft_batch()), fused=True)
    assert "forward" not in model.get_base_model().__dict__


@pytest.mark.parametrize("config", [CohereConfig, GraniteConfig])
def test_scaled_logits(config):
    torch.manual_seed(0)
    scale = {"logit_scale": 0.37} if config is CohereConfig else {"logits_scaling": 3.1}
    base = AutoModelForCausalLM.from_config(config(num_hidden_layers=2, **ROTARY, **scale), dtype=torch.float64)
    ids = sft_batch("none")["input_ids"]
    outputs = base(ids, output_hidden_states=True, use_cache=False)
    assert_close(logits_of_hidden(base, outputs.hidden_states[-1]).detach(), outputs.logits.detach(), TOL64)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_target_and_dpo_without_trl(checkpointing, without_trl, monkeypatch):
    """As on an accelerator, where the library itself takes the fused head."""
    plain, chunked = lora_model("llama"), lora_model("llama")
    if checkpointing:
        for model in (plain, chunked):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
    validation, pairs = sft_batch("ragged", seed=3), pair_batch("stacked_left")
    target, loss = target_gradient(plain, [validation]), dpo_loss(plain, None, pairs)
    loss.backward()
    monkeypatch.setattr(module, "_fused_pays", lambda model: True)
    again, found = target_gradient(chunked, [validation]), dpo_loss(chunked, None, pairs)
    found.backward()
    assert_same_grads(again.gradients, target.gradients, TOL64)
    assert_close(found.detach(), loss.detach(), TOL64)
    assert_same_grads(grads_of(chunked), grads_of(plain), TOL64)
