"""The exact and the difference estimator against one backward per token."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math

import cases
import pytest
import reference
import torch
from batches import is_pairs, pair_batch, response, sft_batch, stacked
from checks import TOL_NF4, assert_close, assert_same_grads, error, grads_of, spearman
from explicit import directions, norms_in_own_dtype, per_token
from models import FAMILIES, VOCAB, base_model, lora_model, nf4_lora_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    sft_loss,
    target_gradient,
)
from alphatoken_loss.models.attention import AttentionCall

TOL = 1e-9
SMALL = 1e-5  # a nudge whose curvature is far below the tolerance it is compared with


def compare(model, family, batch, tol, *, estimator="exact", k=2, seed=0, **options):
    target, drift = directions(model, family, k, seed)
    adaptation, stability = per_token(model, batch, target, drift)
    weights, values = cases.found_values(model, family, batch, seed=seed, k=k, estimator=estimator, **options)
    total = adaptation + 1.5 * stability
    outside = ~response(batch)
    for name, wanted in (("adaptation", adaptation), ("stability", stability), ("total", total)):
        actual = getattr(values, name)
        assert float(actual[outside].abs().sum()) == 0, f"{name}: value without a label"
        assert not actual.requires_grad
        assert_close(actual, wanted, tol, name)
    assert values.direct_target is None and values.causal_drift is None and values.grad_norm is None
    assert torch.equal(weights, reference.keep(values.total, batch, 0.5).float())


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("k", [1, 3, "all"])
@pytest.mark.parametrize("kind", ["none", "right", "left", "ragged", "full", "packed"])
def test_exact_is_one_backward_per_token(kind, k):
    with norms_in_own_dtype():
        compare(lora_model("llama"), "llama", sft_batch(kind), TOL, k=k)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["stacked", "stacked_left", "stacked_ref", "separate", "separate_mask"])
def test_exact_values_of_pairs(kind, seed):
    with norms_in_own_dtype():
        compare(lora_model("llama", seed=seed), "llama", pair_batch(kind, seed), TOL, k="all", seed=seed)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_exact_in_families_with_layer_norm(family, kind):
    compare(lora_model(family), family, sft_batch(kind), TOL, k="all")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_exact_in_families_whose_norm_is_float32(family):
    compare(lora_model(family), family, sft_batch("right"), 2e-6, k="all")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_exact_in_gemma2(attn):
    compare(lora_model("gemma2", attn=attn, dtype=torch.float32), "gemma2", sft_batch("right"), 1e-4, k="all")


@pytest.mark.parametrize("length", [65, 150])
def test_exact_over_several_attention_chunks(length):
    """Queries are taken 64 at a time."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, VOCAB, (2, length), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, [3, 40, 63, 64, length - 1]] = ids[:, [3, 40, 63, 64, length - 1]]
    compare(lora_model("mistral", layers=2), "mistral", {"input_ids": ids, "labels": labels}, 2e-6, k="all")


@pytest.mark.parametrize("batch", [sft_batch("right"), sft_batch("packed"), pair_batch("stacked_left")])
def test_exact_on_nf4(batch):
    compare(nf4_lora_model("llama"), "llama", batch, 1e-3, k="all")


def test_exact_on_an_8_bit_base(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    targets = list(FAMILIES["llama"].linears)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5.0, target_modules=targets, task_type="CAUSAL_LM")).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    batch = sft_batch("right")
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    target = target_gradient(model, cases.validation(), config=config)
    _, values = alphatoken_weights(model, None, batch, target=target, config=config, return_values=True)
    (wanted,) = per_token(model, batch, target.gradients, work=model)  # a copy would lose the scales
    assert_close(values.total, wanted, 1e-3)


def test_exact_linears_that_are_not_adapted_are_dequantised_too():
    """LoRA on a part of the linears: the others, in NF4, still hand tangents on."""
    model = nf4_lora_model("llama", targets=["q_proj", "v_proj"])
    batch = sft_batch("left")
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    target = target_gradient(model, cases.validation(), config=config)
    _, values = alphatoken_weights(model, None, batch, target=target, config=config, return_values=True)
    (wanted,) = per_token(model, batch, target.gradients)
    assert_close(values.total, wanted, 1e-3)


@pytest.mark.parametrize("kind", ["full", "packed"])
def test_both_views_split_the_same_total(kind):
    """Over tokens (exact) and over positions (ghost) values sum to <summed gradient, D>, with K = all."""
    model, batch = lora_model("gpt2"), sft_batch("full")
    target, drift = directions(model, "gpt2", "all")
    work = reference.frozen_copy(model)
    grads = reference.gradients(work, reference.token_nll(work, batch).sum())
    product = sum((grads[n] * (target[n] + 1.5 * drift[n])).sum() for n in target)
    _, exact = cases.found_values(model, "gpt2", batch, k="all", estimator="exact")
    _, ghost = cases.found_values(model, "gpt2", batch, k="all", window=0)
    assert_close(exact.total.sum(), product, TOL)
    assert_close(ghost.total.sum(), product, TOL)
    assert error(exact.total, ghost.total) > 0.1, "the split itself differs"


def drop_value_path(call, query, key, value, dq, dk, dv, batch, _right=AttentionCall.velocity):
    return _right(call, query, key, value, dq, dk, torch.zeros_like(dv), batch)


def drop_key_path(call, query, key, value, dq, dk, dv, batch, _right=AttentionCall.velocity):
    return _right(call, query, key, value, dq, torch.zeros_like(dk), dv, batch)


@pytest.mark.parametrize("wrong", [drop_value_path, drop_key_path])
def test_a_dropped_attention_tangent_is_noticed(wrong, monkeypatch):
    model, batch = lora_model("llama"), sft_batch("right")
    compare(model, "llama", batch, 2e-6, k="all")
    monkeypatch.setattr(AttentionCall, "velocity", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        compare(model, "llama", batch, 1e-2, k="all")


def test_a_dropped_norm_tangent_is_noticed(monkeypatch):
    model, batch = lora_model("llama"), sft_batch("right")
    target, drift = directions(model, "llama", "all")
    (wanted,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in target})

    def forward(self, hidden):
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden * scale.detach()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", "all"))
    config = AlphaTokenConfig(estimator="exact")
    given = {"target": copy.copy(target_of(target)), "fisher": fisher, "config": config, "return_values": True}
    _, values = alphatoken_weights(model, None, batch, **given)
    assert error(values.total, wanted) > 1e-2


def target_of(gradients):
    from alphatoken_loss import Target

    return Target(gradients, 1)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_dropped_factor_is_noticed(estimator, factor):
    model, batch = lora_model("llama"), sft_batch("right")
    target, _ = directions(model, "llama", "all")
    (wanted,) = per_token(model, batch, {n: t * (factor not in n) for n, t in target.items()})
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0, difference_rms=1e-4)
    _, values = alphatoken_weights(model, None, batch, target=target_of(target), config=config, return_values=True)
    assert error(values.total, wanted) > 1e-2


# ----------------------------------------------------------------------------------------- difference


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch", [sft_batch("left"), sft_batch("packed"), pair_batch("stacked")])
def test_difference_converges_at_first_order(family, batch):
    """The error falls tenfold with the step: the slope of its logarithm is 1."""
    with norms_in_own_dtype():
        model = lora_model(family)
        target, drift = directions(model, family, "all")
        (wanted,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in target})
        errors = []
        for effect in (1e-2, 1e-3, 1e-4, 1e-5):
            given = {"estimator": "difference", "difference_rms": effect, "k": "all"}
            errors.append(error(cases.found_values(model, family, batch, **given)[1].total, wanted))
    slopes = [math.log10(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.9 < slope < 1.1 for slope in slopes[1:]), (errors, slopes)
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("k", [1, 2, "all"])
@pytest.mark.parametrize("kind", ["right", "ragged", "packed"])
def test_difference_with_some_blocks(kind, k):
    compare(lora_model("gpt2"), "gpt2", sft_batch(kind), 1e-4, estimator="difference", k=k, difference_rms=SMALL)


@pytest.mark.parametrize("kind", ["stacked", "stacked_ref", "separate"])
def test_difference_of_pairs(kind):
    compare(lora_model("gpt2"), "gpt2", pair_batch(kind), 1e-4, estimator="difference", k="all", difference_rms=SMALL)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_difference_by_default_in_every_family(family):
    model = lora_model(family, dtype=torch.float32)
    agree(model, family, sft_batch("right"))


def test_difference_by_default_on_nf4():
    agree(nf4_lora_model("llama"), "llama", sft_batch("left"))


def agree(model, family, batch, at_least=0.95, **given):
    """Ranks at the default step against one backward per token."""
    target, drift = directions(model, family, "all")
    (wanted,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in target})
    _, values = cases.found_values(model, family, batch, k="all", estimator="difference", **given)
    mask = response(batch)
    found = spearman(values.total[mask], wanted[mask])
    assert found >= at_least, found
    return found


def counting(length):
    """Sequences that count upwards from random starts: learnt within seconds."""
    starts = torch.randint(1, VOCAB, (16, 1), generator=torch.Generator().manual_seed(length))
    ids = (starts + torch.arange(length)) % (VOCAB - 1) + 1
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module", params=["float32", "nf4"])
def trained(request):
    """A model after some training: confident, and with losses that differ from token to token."""
    torch.manual_seed(0)
    model = nf4_lora_model("llama") if request.param == "nf4" else lora_model("llama", dtype=torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = sft_loss(model, counting(12)).item()
    for _ in range(60):
        sft_loss(model, counting(12)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sft_loss(model, counting(12)).item() < 0.5 * before
    return model


@pytest.mark.parametrize("seed", [0, 1])
def test_difference_by_default_on_a_trained_model(trained, seed):
    batch = counting(12)
    noise = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    batch["input_ids"][noise] = 1
    batch["labels"] = batch["input_ids"].clone()
    agree(trained, "llama", batch, seed=0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_difference_under_bf16_autocast(seed):
    """The nudged forward runs under the training forward's own autocast, though the context was entered before it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    batch = counting(20)
    config = AlphaTokenConfig(estimator="difference", stability_weight=0)
    target = target_gradient(model, [sft_batch("none")], config=config)
    gate = AlphaToken(model, target=target, config=config)
    mask = response(batch)
    (wanted,) = per_token(model, batch, target.gradients)
    for _ in range(2):  # the first step searches, the second carries
        with gate(batch), torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        assert spearman(gate.values.total[mask], wanted[mask]) > 0.95
        assert gate.metrics()["difference_rms"] == pytest.approx(2**-4, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_under_autocast_and_in_bf16(dtype):
    """Tangents follow the precision of what they belong to."""
    model, batch = lora_model("llama", dtype=torch.float32), counting(20)
    target, _ = directions(model, "llama", "all")
    (wanted,) = per_token(model, batch, target)
    model = model.to(dtype)
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    gate = AlphaToken(model, target=target_of(target), config=config)
    with gate(batch), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        loss = model(**batch).loss
    loss.backward()
    mask = response(batch)
    assert spearman(gate.values.total[mask], wanted[mask]) > 0.95


def test_the_step_is_carried_and_corrected():
    """After the first batch one nudged forward a step, and its effect stays near what is wanted."""
    model, batch = lora_model("gpt2"), sft_batch("right")
    calls = []
    handle = model.get_base_model().transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    config = AlphaTokenConfig(estimator="difference", difference_rms=1e-3, stability_weight=0)
    target = target_gradient(model, cases.validation(), config=config)
    gate = AlphaToken(model, target=target, config=config)
    for step in range(6):
        calls.clear()
        with gate(batch):
            model(**batch).loss.backward()
        if step:
            assert calls == [False, True]
        assert gate.metrics()["difference_rms"] == pytest.approx(1e-3, rel=0.1 if not step else 0.5)
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


def without_response(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


@pytest.mark.parametrize("first", [True, False])
def test_batches_without_a_response_teach_nothing(first):
    model, batch = lora_model("gpt2"), sft_batch("right")
    target, _ = directions(model, "gpt2", "all")
    (wanted,) = per_token(model, batch, target)
    config = AlphaTokenConfig(estimator="difference", difference_rms=1e-4, stability_weight=0)
    gate = AlphaToken(model, target=target_of(target), config=config)
    for each in [batch] * (not first) + [without_response(batch)] * 5 + [batch]:
        with gate(each):
            logits = model(**{k: v for k, v in each.items() if k != "labels"}).logits
        reference_loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        reference_loss.backward()
    assert_close(gate.values.total, wanted, 1e-3)
    assert gate.metrics()["difference_rms"] == pytest.approx(1e-4, rel=0.1)


def test_a_nudge_that_reaches_no_response_token_teaches_nothing():
    """Queries and keys alone are adapted: where the only row attends to itself alone, nothing can change."""
    model = lora_model("llama", targets=["q_proj", "k_proj"], dtype=torch.float32)
    config = AlphaTokenConfig(estimator="difference", stability_weight=0)
    target = target_gradient(model, cases.validation(), config=config)
    gate = AlphaToken(model, target=target, config=config)
    ids = torch.tensor([[3, 5]])
    for _ in range(3):
        with gate({"input_ids": ids, "labels": ids}):
            model(input_ids=ids, labels=ids).loss.backward()
    batch = sft_batch("right")
    with gate(batch):
        model(**batch).loss.backward()
    (wanted,) = per_token(model, batch, target.gradients)
    mask = response(batch)
    assert spearman(gate.values.total[mask], wanted[mask]) > 0.95


def test_a_direction_that_was_zero_for_a_while():
    model, batch = lora_model("gpt2"), sft_batch("right")
    target, _ = directions(model, "gpt2", "all")
    (wanted,) = per_token(model, batch, target)
    config = AlphaTokenConfig(estimator="difference", difference_rms=1e-4, stability_weight=0)
    gate = AlphaToken(model, target=target_of(target), config=config)
    for scale in (1.0, 0.0, 0.0, 0.0, 1e-6, 1.0):
        gate.source.target = target_of({name: scale * tensor for name, tensor in target.items()})
        with gate(batch):
            model(**batch).loss.backward()
        assert_close(gate.values.total * int(response(batch).sum()), scale * wanted, 1e-2) if scale else None
        assert scale or float(gate.values.total.abs().max()) == 0


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_a_target_that_is_not_finite_at_the_first_batch(estimator):
    model, batch = lora_model("llama"), sft_batch("right")
    target, _ = directions(model, "llama", "all")
    next(iter(target.values()))[0, 0] = float("nan")
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0)
    with pytest.raises(FloatingPointError, match="target gradient"):
        alphatoken_weights(model, None, batch, target=target_of(target), config=config)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_small_gradients_do_not_vanish_in_float16(estimator):
    model, batch = lora_model("llama", dtype=torch.float32), counting(12)
    target, _ = directions(model, "llama", "all")
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0)
    found = []
    for scale in (1.0, 1e-7):
        scaled = target_of({name: scale * tensor for name, tensor in target.items()})
        gate = AlphaToken(model, target=scaled, config=config)
        with gate(batch), torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        loss.backward()
        found.append(gate.values.total / scale)
    assert_close(found[1], found[0], 1e-3)


def test_no_head_and_no_logits_in_the_nudged_forward():
    model, batch = lora_model("llama"), sft_batch("right")
    head = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: head.append(1))
    gate = gate_for(model, "difference")
    gate.source.target = target_gradient(model, cases.validation(), config=gate.config)
    for _ in range(2):  # with the first step's probes, and without
        head.clear()
        with gate(batch):
            model(**batch).loss.backward()
        assert len(head) == 1
    handle.remove()


# ----------------------------------------------------------------------------------- in a training step


def gate_for(model, estimator, family="llama", k="all", **options):
    config = AlphaTokenConfig(estimator=estimator, num_layers=k, **options)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, family, k))
    return AlphaToken(model, target=cases.validation(), fisher=fisher, config=config)


@pytest.mark.parametrize("how", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_the_gradient_is_exactly_the_masked_one(estimator, kind, how):
    model, batch = lora_model("llama"), sft_batch(kind)
    target, drift = directions(model, "llama", "all")
    (values,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in target})
    mask = reference.keep(values, batch, 0.5)
    if how != "off":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    gate = gate_for(model, estimator, difference_rms=1e-4)
    with gate(batch):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    value, grads = reference.masked_sft(model, batch, mask, int(response(batch).sum()))
    assert torch.equal(gate.weights, mask.float()), "other tokens kept"
    assert_close(loss, value, 1e-6)
    assert_same_grads(grads_of(model), grads, 1e-6)
    assert_close(gate.values.total * int(response(batch).sum()), values, 1e-2, "units of the loss")
    assert gate.values.adaptation is None and gate.values.stability is None


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_step(estimator, checkpointing):
    model, batch = lora_model("llama"), pair_batch("stacked")
    target, drift = directions(model, "llama", "all")
    (values,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in target})
    mask = reference.keep(values, batch, 0.5)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gate = gate_for(model, estimator, difference_rms=1e-4)
    loss = dpo_loss(model, None, batch, gate)
    loss.backward()
    value, grads = reference.masked_dpo(model, batch, mask)
    assert torch.equal(gate.weights, mask.float())
    assert_close(loss, value, 1e-6)
    assert_same_grads(grads_of(model), grads, 1e-6)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_nf4_step(estimator):
    model, batch = nf4_lora_model("llama"), sft_batch("left")
    gate = gate_for(model, estimator)
    sft_loss(model, batch, gate).backward()
    mask = gate.weights.bool()
    _, grads = reference.masked_sft(model, batch, mask, int(mask.sum()))
    assert 0 < int(mask.sum()) < int(response(batch).sum())
    assert_same_grads(grads_of(model), grads, TOL_NF4)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_weights_and_gate_agree(estimator):
    model, batch = lora_model("llama"), sft_batch("ragged")
    weights, _ = cases.found_values(model, "llama", batch, k="all", estimator=estimator, difference_rms=1e-4)
    gate = gate_for(model, estimator, difference_rms=1e-4)
    sft_loss(model, batch, gate).backward()
    assert torch.equal(gate.weights, weights)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("batch", [sft_batch("right"), sft_batch("packed"), pair_batch("stacked")])
def test_without_a_target_each_is_valued_by_the_others(estimator, batch):
    model = lora_model("gpt2")
    names = cases.factor_names(model, "gpt2", "all")
    drift = directions(model, "gpt2", "all")[1]
    left_out = reference.left_out_targets(model, batch, names)
    wanted = torch.zeros(response(batch).shape, dtype=torch.float64)
    owner = reference_owner(batch)
    for number, target in left_out.items():
        (values,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in names})
        wanted = torch.where(owner == number, values, wanted)
    config = AlphaTokenConfig(estimator=estimator, difference_rms=SMALL)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "gpt2", "all"))
    _, values = alphatoken_weights(model, None, batch, fisher=fisher, config=config, return_values=True)
    assert_close(values.total, wanted, 1e-4)
    gate = AlphaToken(model, fisher=fisher, config=config)
    loss = dpo_loss(model, None, batch, gate) if is_pairs(batch) else sft_loss(model, batch, gate)
    loss.backward()
    assert torch.equal(gate.weights, reference.keep(wanted, batch, 0.5).float())


def reference_owner(batch):
    """`(B, T)`: the sequence or pair that a label belongs to."""
    rows = stacked(batch)
    if is_pairs(batch):
        half = len(rows["labels"]) // 2
        return torch.arange(half).repeat(2)[:, None].expand(rows["labels"].shape)
    from batches import segments

    return segments(batch)


# ------------------------------------------------------------------------------------ nothing left behind


def bits(model):
    return {name: (parameter.data_ptr(), parameter.detach().clone()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("fails", [None, "norm", "mlp"])
def test_parameters_are_the_same_objects_and_bits(estimator, fails):
    model, batch = lora_model("llama", dtype=torch.float32), sft_batch("right")
    gate = gate_for(model, estimator)
    with gate(batch):
        model(**batch).loss.backward()  # the first step, with its probes
    before, versions = bits(model), {n: p._version for n, p in model.named_parameters()}
    objects = {n: id(p) for n, p in model.named_parameters()}
    forwards = []

    def boom(module, args):
        forwards.append(torch.is_grad_enabled())
        if not forwards[-1]:
            raise RuntimeError("boom")

    decoder = model.get_base_model().model
    if fails:
        place = decoder.norm if fails == "norm" and estimator == "difference" else decoder.layers[1].mlp
        handle = place.register_forward_pre_hook(boom)
        with pytest.raises(RuntimeError, match="boom"), gate(batch):
            model(**batch)
        handle.remove()
        assert False in forwards
    else:
        with gate(batch):
            loss = model(**batch).loss
        assert versions == {n: p._version for n, p in model.named_parameters()}, "a graph's version counters moved"
        loss.backward()
    after = bits(model)
    assert objects == {n: id(p) for n, p in model.named_parameters()}
    assert all(before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) for n in before)
    assert versions == {n: p._version for n, p in model.named_parameters()}
    with gate(batch):  # and it works again
        model(**batch).loss.backward()


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("how", ["off", "non_reentrant"])
def test_dropout_draws_what_it_would_have_drawn(estimator, how):
    """The training pass and the generator are those of a plain step, bit for bit."""
    batch = sft_batch("right")
    results = []
    for gated in (False, True):
        model = lora_model("llama", dtype=torch.float32, lora_dropout=0.3)
        if how != "off":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        gate = gate_for(model, estimator)
        if gated:
            gate.source.target = target_gradient(model, cases.validation(), config=gate.config)
            gate.target_batches = None
        torch.manual_seed(5)
        with gate(batch) if gated else contextlib.nullcontext():
            output = model(**batch)
        output.loss.backward()
        results.append((output.logits.detach(), torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0]), "the training pass drew other masks"
    assert torch.equal(results[0][1], results[1][1]), "the generator stands elsewhere"


def test_the_nudged_pass_drops_what_the_training_pass_drops():
    model, batch = lora_model("gpt2", lora_dropout=0.4), sft_batch("right")
    target, _ = directions(model, "gpt2", "all")
    config = AlphaTokenConfig(estimator="difference", stability_weight=0, difference_rms=SMALL)
    gate = AlphaToken(model, target=target_of(target), config=config)
    torch.manual_seed(11)
    with gate(batch):
        model(**batch).loss.backward()
    # The same masks in one backward per token.
    wanted = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for b, t in response(batch).nonzero().tolist():
        torch.manual_seed(11)
        nll = reference.token_nll(model, batch)[b, t]
        grads = torch.autograd.grad(nll, [p for n, p in model.named_parameters() if n in target])
        names = [n for n, _ in model.named_parameters() if n in target]
        wanted[b, t] = sum((g * target[n]).sum() for n, g in zip(names, grads, strict=True))
    assert_close(gate.values.total * int(response(batch).sum()), wanted, 1e-3)


def test_a_cached_call_is_refused():
    model, batch = lora_model("llama"), sft_batch("none")
    with torch.no_grad():
        cache = model(input_ids=batch["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"), gate_for(model, "difference")(batch):
        model(input_ids=batch["input_ids"], past_key_values=cache)


def test_packed_batches_need_no_cache():
    model, batch = lora_model("llama"), sft_batch("packed")
    model.config.use_cache = True
    with pytest.raises(ValueError, match="attend across"), gate_for(model, "difference")(batch):
        model(**batch)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad


class Kernel(nn.Module):
    def forward(self, x):
        return Opaque.apply(x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach() * 1.0


@pytest.mark.parametrize("kind", [Kernel, Detached])
def test_a_module_without_a_forward_mode_rule_is_named(kind):
    model, batch = lora_model("llama"), sft_batch("right")
    model.get_base_model().model.layers[-1].mlp.act_fn = kind()
    with pytest.raises(NotImplementedError, match=rf"mlp\.act_fn.*{kind.__name__}.*estimator=\"difference\""):
        cases.found_values(model, "llama", batch, k=2, estimator="exact")
    cases.found_values(model, "llama", batch, k=2, estimator="difference")


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5, float("nan"), "0.1", True])
def test_difference_rms_is_checked(value):
    with pytest.raises(ValueError, match=r"difference_rms is .* must be in \(0, 1\]"):
        AlphaTokenConfig(difference_rms=value)


def test_blocks_by_default():
    assert AlphaTokenConfig().scored_layers == 3
    assert AlphaTokenConfig(estimator="difference").scored_layers == "all"
    assert AlphaTokenConfig(estimator="exact").scored_layers == "all"
    assert AlphaTokenConfig(estimator="exact", num_layers=2).scored_layers == 2


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("what", ["adapter", "target"])
def test_what_is_not_finite_is_named(estimator, what):
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model, estimator)
    with gate(batch):
        model(**batch).loss.backward()
    if what == "adapter":
        name, parameter = next((n, p) for n, p in model.named_parameters() if "layers.2" in n and "lora_A" in n)
        with torch.no_grad():
            parameter[0, 0] = float("inf")
        match = "adapter weight " + name.replace(".", r"\.")
    else:
        next(iter(gate.target.gradients.values()))[0, 0] = float("nan")
        match = "target's validation loss is not finite"
    with pytest.raises(FloatingPointError, match=match), gate(batch):
        model(**batch).loss.backward()
