"""What a CPU cannot show: the same values, masks and gradients on a CUDA device. Skipped where there is none.

Expected figures come from explicit computations on the CPU; only the library runs on the device.
"""

from __future__ import annotations

import copy
import tempfile
import warnings

import bitsandbytes as bnb
import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from batches import pair_batch, response, sft_batch
from cases import expected_values
from checks import TOL_NF4, assert_close, assert_same_grads, grads_of, spearman
from gates import CHECKPOINTING, checkpointed, gate_for, steady
from models import add_lora, base_model, lora_model
from penalties import COEF, penalised
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from alphatoken_loss import AlphaToken, AlphaTokenConfig, dpo_loss, estimate_fisher, sft_loss
from alphatoken_loss.directions.preconditioning import preconditioned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ESTIMATORS = ("ghost", "difference", "exact")
TOL = 1e-5  # transformers' norms compute in float32, on each device in its own order


def on_device(batch):
    return {name: tensor.cuda() for name, tensor in batch.items()}


def on_host(gradients):
    return {name: gradient.cpu() for name, gradient in gradients.items()}


def values_on_host(values):
    return type("OnHost", (), {name: getattr(values, name).cpu() for name in reference.TERMS})


@pytest.mark.parametrize("kind", ["right", "left", "ragged", "packed", "stacked", "separate_mask"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_values(family, kind):
    """Fisher and target batches lie on the host, as a user may leave them."""
    model = lora_model(family)
    batch = pair_batch(kind) if kind in ("stacked", "separate_mask") else sft_batch(kind)
    with steady(family):
        expected = expected_values(model, family, batch)
        weights, values = cases.found_values(model.cuda(), family, on_device(batch))
    cases.compare(values_on_host(values), expected, batch, TOL)
    assert weights.is_cuda and torch.equal(weights.cpu(), reference.keep(expected.total, batch, 0.5).float())


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gate(estimator, how, loss, attn):
    """The mask of the CPU's values, and the gradient of the written-out masked loss."""
    model = lora_model("llama", attn=attn)
    batch = pair_batch() if loss == "dpo" else sft_batch("left" if attn == "sdpa" else "right")
    mask, _ = cases.found_values(model, "llama", batch, estimator=estimator)
    if loss == "dpo":
        value, expected = reference.masked_dpo(model, batch, mask)
    else:
        value, expected = reference.masked_sft(model, batch, mask, float(mask.sum()))
    checkpointed(model.cuda(), how)
    gate = gate_for(model, estimator=estimator)
    found = dpo_loss(model, None, on_device(batch), gate) if loss == "dpo" else sft_loss(model, on_device(batch), gate)
    found.backward()
    assert torch.equal(gate.weights.cpu(), mask)
    if loss == "dpo":
        assert_close(found.detach().cpu(), value, TOL)
    assert_same_grads(on_host(grads_of(model)), expected, TOL)


def nf4_and_its_twin():
    """A QLoRA model with CUDA's 4-bit kernels, and on the CPU a float32 LoRA model of its dequantised weights."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        twin = base_model("llama", dtype=torch.float32)
        twin.save_pretrained(folder)
        options = {"quantization_config": quantisation, "device_map": {"": 0}, "dtype": torch.float32}
        base = AutoModelForCausalLM.from_pretrained(folder, **options)
    linears = {name: module for name, module in base.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(linears) == 21
    with torch.no_grad():
        for name, linear in linears.items():
            weight = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
            twin.get_submodule(name).weight.copy_(weight)
    return add_lora(base.train()).cuda(), add_lora(twin.train())


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nf4(estimator, how, loss):
    model, twin = nf4_and_its_twin()
    batch = pair_batch() if loss == "dpo" else sft_batch("right")
    mask, _ = cases.found_values(twin, "llama", batch, estimator=estimator)
    if loss == "dpo":
        _, expected = reference.masked_dpo(twin, batch, mask)
    else:
        _, expected = reference.masked_sft(twin, batch, mask, float(mask.sum()))
    checkpointed(model, how)
    gate = gate_for(model, estimator=estimator)
    found = dpo_loss(model, None, on_device(batch), gate) if loss == "dpo" else sft_loss(model, on_device(batch), gate)
    found.backward()
    assert torch.equal(gate.weights.cpu(), mask)
    assert_same_grads(on_host(grads_of(model)), expected, 3 * TOL_NF4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, estimator):
    """Half precision with fused attention: float32 values in rank, and the gradient of the mask that was found."""
    model = lora_model("llama", dtype=torch.float32)
    batch = sft_batch("none")
    _, precise = cases.found_values(model, "llama", batch, estimator=estimator)
    model, batch = model.cuda(), on_device(batch)
    other, counted = copy.deepcopy(model), response(batch)
    gate = gate_for(model, estimator=estimator)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16, init_scale=1024.0)
    with torch.autocast("cuda", dtype=dtype):
        _, values = cases.found_values(other, "llama", batch, estimator=estimator)
        scaler.scale(sft_loss(model, batch, gate)).backward()
    assert spearman(values.total[counted].cpu(), precise.total[counted.cpu()]) > 0.9
    assert float(gate.weights[counted].mean()) == pytest.approx(0.5, abs=0.05)
    sft_loss(other, batch, gate.weights).backward()
    found = torch.cat([g.flatten() for g in grads_of(model).values()]) / scaler.get_scale()
    expected = torch.cat([g.flatten() for g in grads_of(other).values()])
    assert float(F.cosine_similarity(found, expected, dim=0)) > 0.99
    assert float(found.norm() / expected.norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("gated", [False, True])
def test_kl(gated):
    model, batch = lora_model("llama"), sft_batch("right")
    mask, _ = cases.found_values(model, "llama", batch) if gated else (response(batch), None)
    plain, value, expected = penalised(model, batch, mask=mask.bool())
    model.cuda()
    loss = sft_loss(model, on_device(batch), gate_for(model) if gated else None, kl_coef=COEF)
    loss.backward()
    assert_close(loss.detach().cpu(), plain if gated else value, TOL)
    assert_same_grads(on_host(grads_of(model)), expected, TOL)


@pytest.mark.parametrize("kind", ["AdamW8bit", "PagedAdamW8bit", "AdamW32bit"])
def test_second_moments_of_bitsandbytes(kind):
    def moments(model, make):
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        for step in range(6):
            sft_loss(model, on_device(sft_batch("ragged", seed=50 + step))).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    ours = lora_model("llama", dtype=torch.float32, r=16, targets=["q_proj", "up_proj", "down_proj"]).cuda()
    theirs = copy.deepcopy(ours)
    one = moments(ours, lambda p: getattr(bnb.optim, kind)(p, lr=1e-4, weight_decay=0.0, min_8bit_size=64))
    other = moments(theirs, lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0))
    scales = []
    for model, optimizer in ((ours, one), (theirs, other)):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ones = {n: torch.ones_like(p) for n, p in parameters.items()}
        scale = preconditioned({"target": ones}, parameters, optimizer)["target"]
        scales.append(torch.cat([scale[n].flatten() for n in parameters]).cpu())
    assert spearman(*scales) > (0.95 if "8bit" in kind else 0.9999)


def test_fisher_is_a_seeds():
    model = lora_model("llama", dtype=torch.float32).cuda()
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    config = AlphaTokenConfig(num_layers=2)
    one, same, another = (estimate_fisher(model, prompts, max_new_tokens=4, seed=s, config=config) for s in (0, 0, 1))
    a, b, c = (torch.cat([f.diagonal(name).flatten().cpu() for name in f.names]) for f in (one, same, another))
    assert bool((a >= 0).all()) and float(a.max()) > 0
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_waits_for_the_device(checkpointing):
    """CUDA's own count of what tests/test_syncs.py counts on a CPU: one more wait than a plain step."""

    def waits(step):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [w for w in caught if "synchronizing" in str(w.message)]

    model, batch = lora_model("llama", dtype=torch.float32).cuda(), on_device(sft_batch("none"))
    checkpointed(model, "non_reentrant" if checkpointing else "off")
    gate = gate_for(model, target_every=10**6)
    sft_loss(model, batch).backward()
    sft_loss(model, batch, gate).backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()
    plain = waits(lambda: sft_loss(model, batch).backward())
    gated = waits(lambda: sft_loss(model, batch, gate).backward())
    assert len(gated) == len(plain) + 1, [f"{w.filename}:{w.lineno}" for w in gated]


@pytest.mark.parametrize("estimator", ["ghost", "difference", "path"])
def test_a_state_that_was_read_on_the_host_goes_on_with(estimator, tmp_path):
    """A resumed target goes into the running average on the device, and theta* into the model."""
    model, batches = lora_model("llama").cuda(), [on_device(sft_batch("right", seed=seed)) for seed in range(2)]
    options = {"path_steps": 2} if estimator == "path" else {}
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0, **options)
    first, second = (AlphaToken(model, target=cases.validation(), config=config) for _ in range(2))
    sft_loss(model, batches[0], first).backward()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for gate in (first, second):
        sft_loss(model, batches[1], gate).backward()
    assert_close(second.values.total.cpu(), first.values.total.cpu(), TOL)
