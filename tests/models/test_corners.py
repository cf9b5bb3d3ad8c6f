"""Corners where a plausible implementation goes wrong without a word."""

from __future__ import annotations

import cases
import pytest
import torch
from batches import pair_batch, sft_batch
from models import base_model, lora_model, nf4_lora_model
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    target_gradient,
)
from alphatoken_loss.losses.logps import _fused_pays

CONFIG = AlphaTokenConfig(num_layers=2, causal_window=4)
NO_DRIFT = AlphaTokenConfig(num_layers=2, stability_weight=0.0)


def test_float16_overflow_inside_the_blocks_is_left_to_the_loss_scaler():
    torch.manual_seed(0)
    model = lora_model("llama", dtype=torch.float32)
    batch = sft_batch("none")
    alphatoken = AlphaToken(model, target=target_gradient(model, [batch], config=NO_DRIFT), config=NO_DRIFT)
    seen = set()
    for scale in range(10, 40):
        model.zero_grad()
        with alphatoken(batch), torch.autocast("cpu", torch.float16):
            (model(**batch).loss * 2.0**scale).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        finite = all(bool(g.isfinite().all()) for g in gradients)
        assert (alphatoken.weights is None) <= (not finite)
        seen.add(finite)
    assert seen == {True, False}


def test_an_adapter_on_the_head_is_not_passed_over_by_the_fused_head():
    plain = get_peft_model(base_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).to("meta")
    on_head = get_peft_model(base_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])).to("meta")
    assert not _fused_pays(plain)  # float64
    assert _fused_pays(plain.float()) and not _fused_pays(on_head.float())


def test_adapters_on_expert_parameters_take_no_part_in_ghost_values():
    """That is said, and the others are valued; the difference estimator values them too."""
    config = MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = get_peft_model(
        MixtralForCausalLM(config),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    with pytest.warns(UserWarning, match=r"experts\..*takes no part in ghost values.*difference"):
        _, values = alphatoken_weights(model, None, sft_batch("none"), config=NO_DRIFT, return_values=True)
    assert float(values.total.abs().max()) > 0


def test_sampling_for_the_fisher_ignores_the_models_generation_config():
    def sampled(**options):
        model = lora_model("llama")
        model.get_base_model().generation_config.update(**options)
        fisher = estimate_fisher(model, [[3, 4, 5], [6, 7]], config=CONFIG, max_new_tokens=6, progress=False)
        assert model.get_base_model().generation_config.repetition_penalty == options.get("repetition_penalty")
        return fisher

    plain, changed = sampled(), sampled(repetition_penalty=5.0, no_repeat_ngram_size=1)
    for name in plain.names:
        assert torch.equal(plain.diagonal(name), changed.diagonal(name))


def test_sampling_ends_at_every_end_token():
    ends = list(range(61))  # every token ends a completion, so exactly one is sampled
    model = lora_model("llama")
    prompts = [[3, 4, 5], [6, 7]]
    model.get_base_model().generation_config.eos_token_id = ends
    many = estimate_fisher(model, prompts, config=CONFIG, max_new_tokens=6, progress=False)
    model.get_base_model().generation_config.eos_token_id = None
    one = estimate_fisher(model, prompts, config=CONFIG, max_new_tokens=1, progress=False)
    for name in one.names:
        assert torch.equal(one.diagonal(name), many.diagonal(name))


def test_without_a_target_pairs_are_valued_at_the_losss_beta():
    model = lora_model("llama")
    batch = pair_batch()
    alphatoken = AlphaToken(model, config=NO_DRIFT)
    for beta in (0.1, 5.0):
        dpo_loss(model, None, batch, alphatoken, beta=beta)
        assert torch.equal(alphatoken.weights, alphatoken_weights(model, None, batch, config=NO_DRIFT, beta=beta))


def test_pairs_that_bring_labels_are_valued_as_pairs():
    model = lora_model("llama")
    batch = pair_batch()
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    target = target_gradient(model, [sft_batch("none")], config=NO_DRIFT)
    alphatoken = AlphaToken(model, target=target, config=NO_DRIFT)
    dpo_loss(model, None, batch, alphatoken).backward()
    expected = alphatoken.weights
    dpo_loss(model, None, {**batch, "labels": labels}, alphatoken).backward()
    assert torch.equal(alphatoken.weights, expected)


def test_a_fisher_of_nothing_is_an_error():
    batch = sft_batch("none")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="no response token"):
        estimate_fisher(lora_model("llama"), [batch], config=CONFIG, generate=False, progress=False)


def test_padding_behind_packed_sequences_is_no_prompt():
    batch = sft_batch("packed")
    pads = 3
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, pads)),
        "position_ids": torch.nn.functional.pad(batch["position_ids"], (0, pads)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, pads), value=-100),
    }
    counts = [
        estimate_fisher(lora_model("llama"), [b], config=CONFIG, generate=False, progress=False).prompts
        for b in (batch, padded)
    ]
    assert counts[0] == counts[1] > 1


def test_a_fisher_of_another_base_of_the_same_shape_is_an_error(tmp_path):
    model = lora_model("llama")
    fisher = estimate_fisher(model, [[3, 4, 5]], config=CONFIG, max_new_tokens=2, progress=False)
    fisher.save(tmp_path / "fisher.safetensors")
    again = Fisher.load(tmp_path / "fisher.safetensors")
    options = {"target": cases.validation(), "config": CONFIG}
    alphatoken_weights(model, None, sft_batch("none"), fisher=again, **options)
    other = lora_model("llama")
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    with pytest.raises(ValueError, match="another base model"):
        alphatoken_weights(other, None, sft_batch("none"), fisher=again, **options)
    with pytest.raises(ValueError, match="another base model"):
        AlphaToken(other, fisher=again, **options)


def test_a_backward_after_a_failed_one_is_refused():
    model = lora_model("llama")
    batch = sft_batch("none")
    target = target_gradient(model, [batch], config=NO_DRIFT)
    alphatoken = AlphaToken(model, target=target, config=NO_DRIFT)
    next(iter(target.gradients.values())).fill_(float("nan"))
    with alphatoken(batch):
        loss = model(**batch).loss
    with pytest.raises(FloatingPointError, match="not finite"):
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="failed in an earlier backward"):
        loss.backward()


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        target_gradient(lora_model("llama"), [sft_batch("none")], config=NO_DRIFT)


def test_a_weight_outside_the_response_does_not_count():
    model = lora_model("llama")
    batch = pair_batch()
    weights = torch.ones(batch["input_ids"].shape, dtype=torch.float64).masked_fill(
        batch["completion_mask"] == 0, torch.nan
    )
    assert torch.equal(dpo_loss(model, None, batch, weights), dpo_loss(model, None, batch, torch.ones_like(weights)))


def test_a_4_bit_model_in_evaluation_mode_keeps_its_gradients():
    batch = sft_batch("none")
    found = {}
    for mode in (True, False):
        model = nf4_lora_model("llama").train(mode)
        fisher = estimate_fisher(model, [[3, 4, 5], [6, 7]], config=CONFIG, max_new_tokens=4, progress=False)
        _, values = alphatoken_weights(
            model, None, batch, target=[batch], fisher=fisher, config=CONFIG, return_values=True
        )
        assert {module.training for module in model.modules()} == {mode}
        found[mode] = values.total
        alphatoken_weights(model, None, batch, target=[batch], fisher=fisher, config=CONFIG)
    assert torch.equal(found[True], found[False])


def test_a_repacked_4_bit_model_is_refused():
    model = nf4_lora_model("llama")
    layer = model.get_base_model().model.layers[-1].mlp.down_proj.get_base_layer()
    layer.weight.quant_state.packing_format_for_cpu = True  # what an evaluation forward leaves on some processors
    with pytest.raises(ValueError, match=r"down_proj.*repacked"):
        target_gradient(model, [sft_batch("none")], config=CONFIG)


def test_with_rho_1_the_share_kept_is_still_reported():
    assert AlphaToken(lora_model("llama"), config=AlphaTokenConfig(rho=1.0)).metrics() == {"kept": 1.0}


def test_noise_on_embeddings_stays_out_of_the_librarys_own_passes():
    """NEFTune's hook adds noise to an embedding's output by its mode."""
    model = lora_model("llama")
    plain = target_gradient(model, [sft_batch()]).gradients

    def noisy(module, args, output):
        return output + torch.randn_like(output) if module.training else output

    model.get_input_embeddings().register_forward_hook(noisy)
    model.train()
    state = torch.get_rng_state()
    found = target_gradient(model, [sft_batch()]).gradients
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert model.get_input_embeddings().training
