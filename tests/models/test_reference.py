"""The reference checks itself: each formula against a second, different way to the same number."""

from __future__ import annotations

import pytest
import reference
import torch
from batches import pair_batch, response, segments, sft_batch, stacked
from checks import assert_close, assert_same_grads, error
from models import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, base_model, lora_model, nf4_lora_model
from reference import random_fisher

ALL = tuple(FAMILIES)


@pytest.mark.parametrize("family", ALL)
def test_direct_terms_sum_to_inner_products(family):
    """With a label everywhere, sum_t d_t^T C h_t is <gradient, C>."""
    with reference.softmax_in_own_dtype():
        check_direct_sums(family)


def check_direct_sums(family):
    model = lora_model(family)
    batch = sft_batch("full")
    layers = reference.scored_layers(model, FAMILIES[family], 2)
    names = [n for layer in layers for n in (layer.a, layer.b)]
    target = reference.target_gradient(model, [sft_batch("right", seed=1)], names)
    fisher = random_fisher(model, layers)
    values = reference.token_values(model, family, batch, target=target, fisher=fisher)
    work = reference.frozen_copy(model)
    grads = reference.gradients(work, reference.token_nll(work, batch).sum())
    drift = reference.drift_gradient(model, layers, fisher)
    for name, goal in (("direct_target", target), ("direct_drift", drift)):
        expected = sum((grads[n] * goal[n]).sum() for n in names)
        assert_close(getattr(values, name).sum(), expected, 1e-6, name)


@pytest.mark.parametrize("make", [lora_model, nf4_lora_model], ids=["float64", "nf4"])
def test_layer_view_equals_the_factors_own_inputs_and_errors(make):
    """h and d from the LoRA layer, s B^T d and A h equal what hooks on lora_A and lora_B see."""
    model = make("llama", r=3, alpha=7.0, use_rslora=True, rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 2})
    batch = sft_batch("right")
    layers = reference.scored_layers(model, FAMILIES["llama"], "all")
    work = reference.frozen_copy(model)
    taps = reference.collect(work, [x.name for x in layers], lambda: reference.token_nll(work, batch).sum())
    factors = [f"{x.name}.lora_{part}.default" for x in layers for part in "AB"]
    own = reference.collect(work, factors, lambda: reference.token_nll(work, batch).sum())
    tol = 1e-5 if make is nf4_lora_model else 1e-7
    for layer in layers:
        a, b = reference.weights_of(model, layer)
        h, d = taps[layer.name]
        for part, x, err in (("A", h, layer.scale * d @ b), ("B", h @ a.T, layer.scale * d)):
            assert_close(own[f"{layer.name}.lora_{part}.default"][0], x, tol, f"{layer.name} {part} input")
            assert_close(own[f"{layer.name}.lora_{part}.default"][1], err, tol, f"{layer.name} {part} error")


@pytest.mark.parametrize("family", [name for name in ALL if name != "gemma2"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_attention_maps_are_those_of_the_sdpa_model(family, kind):
    """The eager copy gives the same logits; its maps are causal and sum to one over the own sequence."""
    model = lora_model(family)
    batch = sft_batch(kind)
    work = reference.frozen_copy(model)
    eager = reference.frozen_copy(model)
    eager.base_model.model.set_attn_implementation("eager")
    inside = segments(batch) >= 0
    with torch.no_grad(), reference.softmax_in_own_dtype():
        first, second = reference.logits_of(work, batch), reference.logits_of(eager, batch)
    assert_close(first[inside], second[inside], 1e-6)
    for probabilities in reference.attention(model, batch):
        assert float(probabilities.triu(1).abs().max()) == 0
        sums = probabilities.sum(-1)
        assert_close(sums[inside], torch.ones_like(sums[inside]), 1e-12)
        assert float(sums[~inside].abs().sum()) == 0


def test_sliding_window_cuts_the_maps():
    batch = sft_batch("none")
    maps = reference.attention(lora_model("mistral"), batch)
    far = torch.ones(10, 10).tril(-4).bool()
    for probabilities in maps:
        assert float(probabilities[:, far].abs().max()) == 0
        assert float(probabilities[:, ~far].max()) > 0


@pytest.mark.parametrize("family", ALL)
def test_value_rows_by_what_they_change(family):
    """Other values leave the block's own attention map as it is; other queries and keys move it."""
    model = base_model(family)
    info = FAMILIES[family]
    batch = sft_batch("none")
    before = reference.attention(model, batch)[0]
    layer = model.get_submodule(f"{info.blocks.format(0)}.{info.value}")
    outputs = layer.weight.shape[1] if family == "gpt2" else layer.weight.shape[0]
    rows = list(info.value_rows)
    kv_heads = HEADS if family in ("gpt2", "gpt_neox") else KV_HEADS
    assert len(set(rows)) == kv_heads * HEAD_DIM
    bias = torch.zeros(outputs, dtype=torch.float64)

    def moved(which):
        bias.zero_()
        bias[which] = torch.linspace(-2, 3, len(which), dtype=torch.float64)
        handle = layer.register_forward_hook(lambda _m, _a, out: out + bias)
        after = reference.attention(model, batch)[0]
        handle.remove()
        return float((after - before).abs().max())

    assert moved(rows) < 1e-12
    rest = [i for i in range(outputs) if i not in set(rows)]
    for row in rest:
        assert moved([row]) > 1e-12 or moved([row, *rest]) > 1e-6
    assert not rest or moved(rest) > 1e-3


@pytest.mark.parametrize("reference_is", ["base", "ref"])
def test_drift_is_the_gradient_of_the_quadratic(reference_is):
    model = lora_model("llama", others=["ref"] if reference_is == "ref" else [])
    layers = reference.scored_layers(model, FAMILIES["llama"], 2)
    ref_layers = reference.scored_layers(model, FAMILIES["llama"], 2, "ref") if reference_is == "ref" else None
    fisher = random_fisher(model, layers)
    found = reference.drift_gradient(model, layers, fisher, ref_layers)
    for i, layer in enumerate(layers):
        a, b = (w.requires_grad_() for w in reference.weights_of(model, layer))
        dw = layer.scale * b @ a
        if ref_layers is not None:
            ra, rb = reference.weights_of(model, ref_layers[i])
            dw = dw - ref_layers[i].scale * rb @ ra
        expected = torch.autograd.grad(0.5 * (fisher[layer.name] * dw**2).sum(), [a, b])
        assert_close(found[layer.a], expected[0], 1e-12)
        assert_close(found[layer.b], expected[1], 1e-12)


@pytest.mark.parametrize("kind", ["stacked", "stacked_left", "stacked_ref", "separate", "separate_mask"])
def test_masked_dpo_is_eq_14(kind):
    model = lora_model("llama")
    batch = pair_batch(kind)
    mask = response(batch) & (torch.rand(response(batch).shape) < 0.5)
    _, held = reference.masked_dpo(model, batch, mask)
    assert_same_grads(reference.eq14(model, batch, mask), held, 1e-6)


def test_masked_sft_is_a_sum_of_single_token_gradients():
    model = lora_model("llama")
    batch = sft_batch("ragged")
    mask = response(batch) & (torch.rand(response(batch).shape) < 0.5)
    _, found = reference.masked_sft(model, batch, mask, 7.0)
    work = reference.frozen_copy(model)
    total = {name: torch.zeros_like(p) for name, p in reference.trainable(model).items()}
    for b, t in mask.nonzero().tolist():
        only = torch.full_like(batch["labels"], -100)
        only[b, t] = batch["labels"][b, t]
        loss = reference.token_nll(work, {**batch, "labels": only}).sum()
        for name, grad in reference.gradients(work, loss).items():
            total[name] += grad / 7.0
    assert_same_grads(total, found, 1e-6)


def test_factored_form_has_the_marginals():
    fisher = torch.rand(5, 7, dtype=torch.float64)
    form = reference.factored(fisher)
    assert_close(form.sum(0), fisher.sum(0), 1e-12)
    assert_close(form.sum(1), fisher.sum(1), 1e-12)
    assert error(form, fisher) > 0.1


def test_batches_say_what_they_claim():
    left, right = sft_batch("left"), sft_batch("right")
    assert int(left["attention_mask"][1, 0]) == 0 and int(right["attention_mask"][1, -1]) == 0
    assert int(response(sft_batch("ragged"))[3].sum()) == 0
    packed = sft_batch("packed")
    assert segments(packed)[0].tolist() == [0] * 7 + [1] * 5 + [2] * 8
    assert (packed["labels"][packed["position_ids"] == 0] == -100).all()
    forms = [stacked(pair_batch(kind))["labels"] for kind in ("stacked", "separate", "separate_mask")]
    assert torch.equal(forms[0], forms[1]) and torch.equal(forms[0], forms[2])
