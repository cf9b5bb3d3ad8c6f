"""Whatever PEFT trains: the difference (in blocks also the exact) estimator on adapters that are not plain LoRA."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from batches import response, sft_batch
from checks import assert_close, assert_same_grads, grads_of
from models import add_lora, base_model, nf4_base
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    sft_loss,
    target_gradient,
)
from alphatoken_loss.directions.drift import drift as drift_of
from alphatoken_loss.models.reference import reference_mode
from alphatoken_loss.models.sites import find_scored

QKV = ["c_attn", "c_proj"]
ADAPTERS = {
    "dora": LoraConfig(r=3, use_dora=True, target_modules=QKV, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], task_type="CAUSAL_LM"),
    "lora on embeddings": LoraConfig(r=3, target_modules=[*QKV, "wte"], task_type="CAUSAL_LM"),
    "lora with biases": LoraConfig(r=3, target_modules=QKV, bias="all", task_type="CAUSAL_LM"),
    "lora and norms": LoraConfig(r=3, target_modules=QKV, modules_to_save=["ln_1", "ln_2"], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
LLAMA = {  # these take nn.Linear only
    "loha": LoHaConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    "lokr": LoKrConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    "oft": OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lora with qkv biases": LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], bias="lora_only", task_type="CAUSAL_LM"
    ),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
}
# Outside the blocks; or with an autograd function of PEFT's that has no forward-mode rule.
NOT_EXACT = ("prompt", "prefix", "lora on embeddings", "loha")


def adapted(name, dtype=torch.float64):
    torch.manual_seed(0)
    family = "qwen2" if "qkv" in name else "llama" if name in LLAMA else "gpt2"
    config = (LLAMA | ADAPTERS)[name]
    model = get_peft_model(base_model(family, dtype=dtype), config).train()
    model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def nll_of(model, batch):
    """`(B, T)`; virtual tokens, which have no labels, stand before the batch's own."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] :]
    labels = batch["labels"]
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(nll * (labels[:, 1:] != -100), (1, 0))


def values_by_token(model, batch, direction):
    nll = nll_of(model, batch)
    parameters = {n: p for n, p in model.named_parameters() if n in direction}
    out = torch.zeros_like(nll)
    for b, t in response(batch).nonzero().tolist():
        grads = torch.autograd.grad(nll[b, t], list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(parameters, grads, strict=True)
        out[b, t] = sum((g * direction[n]).sum() for n, g in pairs if g is not None)
    return out.detach()


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", [*ADAPTERS, *LLAMA])
def test_difference(name):
    model, batch = adapted(name), sft_batch("right")
    # Llama's norm computes in float32: a smaller step would drown. DoRA's own gradient takes its norm as a constant,
    # which the nudged forward does not.
    coarse = name in LLAMA
    tol = 0.2 if name == "dora" else 2e-2 if coarse else 2e-3
    config = AlphaTokenConfig(estimator="difference", difference_rms=1e-3 if coarse else 1e-4)
    validation = sft_batch("none", seed=7)
    target = target_gradient(model, [validation], config=config)
    assert set(target.gradients) == set(trained(model)), "every trained parameter is scored"
    loss = nll_of(model, validation).sum() / response(validation).sum()
    grads = torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)
    for (n, p), g in zip(trained(model).items(), grads, strict=True):
        g = torch.zeros_like(p) if g is None else g
        torch.testing.assert_close(target.gradients[n], g, rtol=1e-5, atol=1e-6 * float(g.abs().max()) + 1e-12)
    fisher = estimate_fisher(model, [sft_batch("none")], generate=False, config=config, progress=False)
    with torch.no_grad():  # away from the reference
        for i, p in enumerate(trained(model).values()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    target = target_gradient(model, [validation], config=config)
    _, values = alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config, return_values=True)
    assert_close(values.adaptation, values_by_token(model, batch, target.gradients), tol, "adaptation")
    drift = drift_of(fisher, find_scored(model, "all", "anywhere"), None)
    assert set(drift) == set(target.gradients)
    assert_close(values.stability, values_by_token(model, batch, drift), tol, "stability")


@pytest.mark.parametrize("name", [name for name in (*ADAPTERS, *LLAMA) if name not in NOT_EXACT])
def test_exact(name):
    """The exact estimator has the same parameters where all of them lie in the blocks."""
    model, batch = adapted(name), sft_batch("right")
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    target = target_gradient(model, [sft_batch("none", seed=7)], config=config)
    _, values = alphatoken_weights(model, None, batch, target=target, config=config, return_values=True)
    assert_close(values.total, values_by_token(model, batch, target.gradients), 2e-6)


def test_an_adapter_without_a_forward_mode_rule_is_named():
    model, batch = adapted("loha"), sft_batch("right")
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    with pytest.raises(NotImplementedError, match=r'self_attn.q_proj \(peft.*estimator="difference"'):
        alphatoken_weights(model, None, batch, target=[batch], config=config)


@pytest.mark.parametrize("name", [*ADAPTERS, *LLAMA])
def test_the_gradient_of_a_step_is_the_masked_one(name):
    model, batch = adapted(name), sft_batch("right")
    gate = AlphaToken(model, target=[sft_batch("none", seed=7)], config=AlphaTokenConfig(estimator="difference"))
    output = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    with gate(batch):
        output = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    logits, labels = output[:, -batch["labels"].shape[1] :][:, :-1], batch["labels"][:, 1:]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    mask = gate.weights
    assert 0 < mask.sum() < response(batch).sum()
    found = grads_of(model)
    model.zero_grad()
    (nll_of(model, batch) * mask).sum().backward()
    assert_same_grads(found, grads_of(model), 1e-6)


@pytest.mark.parametrize("name", ["dora", "ia3", "prompt", "lora and norms"])
def test_fisher_of_other_parameters_is_the_squared_gradient_per_prompt(name, monkeypatch):
    """Labels are drawn from the model; with them known, one backward per sequence gives the same."""
    from alphatoken_loss.directions import estimate as module

    model, batches, drawn = adapted(name), [sft_batch("right"), sft_batch("none")], []
    draw = module.draw_labels
    monkeypatch.setattr(module, "draw_labels", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    config = AlphaTokenConfig(estimator="difference")
    fisher = estimate_fisher(model, batches, generate=False, config=config, progress=False)
    others = find_scored(model, "all", "anywhere").others
    assert set(fisher.others) == set(others) and others
    sums = {n: torch.zeros_like(p) for n, p in others.items()}
    count = 0
    for batch in drawn:
        nll = nll_of(model, {**batch.inputs, "labels": batch.labels})
        for row in nll:
            grads = torch.autograd.grad(row.sum(), list(others.values()), retain_graph=True, allow_unused=True)
            for n, g in zip(others, grads, strict=True):
                sums[n] += 0 if g is None else g**2
            count += 1
    assert fisher.prompts == count
    for n, (diagonal, reference_value) in fisher.others.items():
        torch.testing.assert_close(diagonal, sums[n] / count, rtol=1e-5, atol=1e-12)
        assert torch.equal(reference_value, others[n])
    assert all(
        float(value.abs().max()) == 0 for n, value in drift_of(fisher, _scored(model), None).items() if n in others
    )


def _scored(model):
    return find_scored(model, "all", "anywhere")


def test_fisher_with_other_parameters_is_saved_whole(tmp_path):
    model = adapted("dora")
    config = AlphaTokenConfig(estimator="difference")
    fisher = estimate_fisher(model, [sft_batch("none")], generate=False, config=config, progress=False)
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    assert loaded.others.keys() == fisher.others.keys()
    for name, pair in fisher.others.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, loaded.others[name], strict=True))
    ia3 = adapted("ia3")
    with pytest.raises(ValueError, match=r"The Fisher covers .* which is not scored"):
        AlphaToken(ia3, target=[sft_batch("none")], fisher=loaded, config=config)
    with pytest.raises(ValueError, match="no entry of shape"):
        AlphaToken(ia3, target=[sft_batch("none")], fisher=Fisher({}), config=config)


@pytest.mark.parametrize("estimator", ["difference", "exact"])
def test_full_finetuning(estimator):
    """Every weight before the head; drift from a separate reference model."""
    model, ref_model = base_model("llama"), base_model("llama", seed=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("lm_head"))
    batch = sft_batch("right")
    config = AlphaTokenConfig(estimator=estimator, difference_rms=1e-3)
    target = target_gradient(model, [sft_batch("none", seed=7)], config=config)
    wanted = {n for n in trained(model) if estimator == "difference" or ".layers." in n}
    assert set(target.gradients) == wanted
    given = {"target": target, "config": config, "return_values": True}
    ref_model.requires_grad_(False)
    fisher = estimate_fisher(model, [batch], generate=False, ref_model=ref_model, config=config, progress=False)
    assert not any(p.requires_grad for p in ref_model.parameters())
    _, values = alphatoken_weights(model, ref_model, batch, fisher=fisher, **given)
    tol = 2e-2 if estimator == "difference" else 2e-6
    assert_close(values.adaptation, values_by_token(model, batch, target.gradients), tol)
    drift = drift_of(fisher, find_scored(model, "all", AlphaTokenConfig(estimator=estimator).scope), ref_model)
    assert_close(values.stability, values_by_token(model, batch, drift), tol)
    reference_values = dict(ref_model.named_parameters())
    for name, (diagonal, _) in fisher.others.items():
        parameter = dict(model.named_parameters())[name]
        assert_close(drift[name], diagonal * (parameter - reference_values[name]), 1e-6, name)


@pytest.mark.parametrize("name", ["dora", "ia3", "prompt"])
def test_dpo(name):
    from batches import pair_batch

    model, batch = adapted(name), pair_batch("stacked_ref")
    gate = AlphaToken(model, target=[sft_batch("none", seed=7)], config=AlphaTokenConfig(estimator="difference"))
    dpo_loss(model, None, batch, gate).backward()
    assert 0 < gate.weights.sum() < response(batch).sum()
    assert all(torch.isfinite(g).all() for g in grads_of(model).values())


def test_dora_on_nf4():
    model = add_lora(nf4_base("llama"), use_dora=True)
    gate = AlphaToken(model, target=[sft_batch("none", seed=7)], config=AlphaTokenConfig(estimator="difference"))
    sft_loss(model, sft_batch("right"), gate).backward()
    mask = gate.weights.bool()
    _, grads = reference.masked_sft(model, sft_batch("right"), mask, int(mask.sum()))
    assert_same_grads(grads_of(model), grads, 1e-4)


def test_a_plain_base_as_reference_of_an_adapter_that_is_no_lora():
    """It has no parameter of the adapter's names: those take the values they have when the Fisher is estimated."""
    model, ref_model = adapted("dora"), base_model("gpt2")
    config = AlphaTokenConfig(estimator="difference")
    fisher = estimate_fisher(model, [sft_batch("none")], generate=False, ref_model=ref_model, config=config)
    own = trained(model)
    assert set(fisher.others) == set(own)
    assert all(torch.equal(value, own[name]) for name, (_, value) in fisher.others.items())


@pytest.mark.parametrize("name", ["prompt", "prefix", "ia3", "lora and norms"])
def test_the_reference_leaves_nothing_and_is_the_base(name):
    model, batch = adapted(name), sft_batch("right")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    before, out = dict(model.__dict__), model(**inputs).logits
    with reference_mode(model, None) as reference_model, torch.no_grad():
        logits = reference_model(**inputs).logits
    assert_close(logits, base_model("gpt2")(**inputs).logits, 1e-6)
    assert model.__dict__.keys() == before.keys() and torch.equal(model(**inputs).logits, out)


@pytest.mark.parametrize("name", ["ia3", "prompt", "lora and norms"])
def test_the_adapter_ref_is_the_reference(name):
    model = adapted(name)
    config = copy.deepcopy(ADAPTERS[name])
    config.modules_to_save = None
    model.add_adapter("ref", config)
    model.to(torch.float64)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".ref." in n or n.endswith(".ref"):
                p += 0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": sft_batch("none")["input_ids"]}
    with reference_mode(model, None) as reference_model, torch.no_grad():
        found = reference_model(**inputs).logits
    active = model.active_adapter
    off = model(**inputs).logits
    model.set_adapter("ref")
    wanted = model(**inputs).logits
    model.set_adapter(active)
    if (
        name == "lora and norms"
    ):  # PEFT itself keeps "default"'s norms under "ref", which has none: the reference has none
        assert not torch.equal(found, off)
    else:
        assert torch.equal(found, wanted)


def test_dropout_of_a_recurrent_prompt_encoder_is_silent():
    config = PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.5,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base_model("gpt2", dtype=torch.float32), config).train()
    options = AlphaTokenConfig(estimator="difference", stability_weight=0)
    before = torch.get_rng_state()
    first, second = (target_gradient(model, [sft_batch("none")], config=options) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first.gradients[n], second.gradients[n]) for n in first.gradients)


def test_what_lies_behind_the_decoder_is_refused():
    model = add_lora(base_model("llama"), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.* is trained and lies behind the decoder"):
        AlphaToken(model, target=[sft_batch("none")], config=AlphaTokenConfig(estimator="difference"))


def test_a_trained_final_norm_is_masked_too():
    """It stands before the gate at the decoder's output; the ghost estimator's gate refuses it."""
    model, batch = add_lora(base_model("llama"), modules_to_save=["model.norm"]), sft_batch("right")
    with pytest.raises(ValueError, match="lies behind the last block"):
        AlphaToken(model, target=[sft_batch("none")])
    gate = AlphaToken(model, target=[sft_batch("none", seed=7)], config=AlphaTokenConfig(estimator="difference"))
    sft_loss(model, batch, gate).backward()
    mask = gate.weights.bool()
    _, grads = reference.masked_sft(model, batch, mask, int(mask.sum()))
    assert any("norm" in name and float(g.abs().max()) > 0 for name, g in grads.items())
    assert_same_grads(grads_of(model), grads, 1e-6)
