"""`sft_loss` and `dpo_loss`: values, gradients under any weights, and TRL's own numbers."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from batches import pair_batch, response, sft_batch, stacked
from checks import TOL64, assert_close, assert_same_grads, grads_of
from datasets import Dataset
from models import ROTARY, VOCAB, add_lora, base_model, lora_model, nf4_lora_model, randomise_adapter
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig
from trl import DPOConfig, DPOTrainer
from words import word_tokenizer

from alphatoken_loss import dpo_loss, sft_loss

KINDS = ("sigmoid", "hinge", "ipo", "robust", "exo_pair")
SMOOTHED = ("robust", "exo_pair")


def random_weights(batch, seed=0, binary=False):
    generator = torch.Generator().manual_seed(seed)
    mask = response(batch)
    weights = torch.rand(mask.shape, generator=generator)
    weights = (weights < 0.5).float() if binary else weights
    return weights * mask


# ---------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("kind", ["none", "right", "left", "ragged", "full", "packed"])
def test_without_weights_it_is_the_models_loss(kind):
    plain, ours = lora_model("llama"), lora_model("llama")
    batch = sft_batch(kind)
    expected = plain(**batch, use_cache=False).loss
    expected.backward()
    loss = sft_loss(ours, batch)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), TOL64)
    assert_same_grads(grads_of(ours), grads_of(plain), TOL64)


@pytest.mark.parametrize("kind", ["right", "ragged", "packed"])
@pytest.mark.parametrize("binary", [True, False])
def test_weighted_mean(kind, binary):
    """Eq. 13: sum(w * l) / sum(w), for masks and for any float weights."""
    model = lora_model("llama")
    batch = sft_batch(kind)
    weights = random_weights(batch, binary=binary)
    work = reference.frozen_copy(model)
    expected = (weights.double() * reference.token_nll(work, batch)).sum() / weights.double().sum()
    loss = sft_loss(model, batch, weights)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), TOL64)
    assert_same_grads(grads_of(model), reference.gradients(work, expected), TOL64)


def test_uniform_weights_change_nothing():
    model = lora_model("llama")
    batch = sft_batch("right")
    plain = sft_loss(model, batch)
    for scale in (1.0, 0.25):
        assert_close(sft_loss(model, batch, scale * response(batch).float()).detach(), plain.detach(), TOL64)


def test_weights_without_a_label_do_not_count():
    model = lora_model("llama")
    batch = sft_batch("right")
    weights = random_weights(batch)
    noisy = torch.where(response(batch), weights, torch.full_like(weights, 3.0))
    assert_close(sft_loss(model, batch, noisy).detach(), sft_loss(model, batch, weights).detach(), TOL64)


@pytest.mark.parametrize("weighted", [False, True])
def test_num_items_in_batch(weighted):
    """The denominator of a whole accumulation; the model's own convention without weights."""
    model = lora_model("llama")
    batch = sft_batch("right")
    weights = random_weights(batch) if weighted else None
    work = reference.frozen_copy(model)
    factor = response(batch).double() if weights is None else weights.double()
    expected = (factor * reference.token_nll(work, batch)).sum() / 37
    loss = sft_loss(model, batch, weights, num_items_in_batch=37)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), TOL64)
    assert_same_grads(grads_of(model), reference.gradients(work, expected), TOL64)
    if weights is None:
        own = model(**batch, num_items_in_batch=37).loss
        assert_close(loss.detach(), own.detach(), TOL64)
    as_tensor = sft_loss(model, batch, weights, num_items_in_batch=torch.tensor(37))
    assert torch.equal(as_tensor, loss)


def test_accumulated_eighths_are_the_whole():
    """Micro-batches with a common denominator add up to the batch's gradient."""
    whole, parts = lora_model("llama"), lora_model("llama")
    batch = sft_batch("right")
    weights = random_weights(batch)
    number = 11
    sft_loss(whole, batch, weights, num_items_in_batch=number).backward()
    for row in range(3):
        piece = {key: value[row : row + 1] for key, value in batch.items()}
        sft_loss(parts, piece, weights[row : row + 1], num_items_in_batch=number).backward()
    assert_same_grads(grads_of(parts), grads_of(whole), TOL64)


def test_return_outputs():
    model = lora_model("llama")
    batch = sft_batch("right")
    loss, outputs = sft_loss(model, batch, return_outputs=True)
    assert_close(loss.detach(), sft_loss(model, batch).detach(), TOL64)
    assert outputs.logits.shape == (*batch["input_ids"].shape, VOCAB)


def test_plain_model_without_adapters():
    """Weights from anywhere, any causal LM."""
    model = base_model("llama")
    batch = sft_batch("right")
    assert_close(sft_loss(model, batch).detach(), model(**batch).loss.detach(), TOL64)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_answer_anywhere_is_a_zero_with_a_graph(weighted):
    model = lora_model("llama")
    batch = sft_batch("right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = sft_loss(model, batch, torch.zeros(batch["labels"].shape) if weighted else None)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


def test_all_weights_zero_is_a_zero_with_a_graph():
    model = lora_model("llama")
    batch = sft_batch("right")
    loss = sft_loss(model, batch, torch.zeros(batch["labels"].shape))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


# ---------------------------------------------------------------------------------------------- DPO


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["stacked", "stacked_left", "stacked_ref", "separate", "separate_mask"])
def test_dpo_loss_types_and_forms(kind, form):
    """Value of the full loss, gradient with every token's log-probability scaled by its weight."""
    batch = pair_batch(form)
    eps = 0.2 if kind in SMOOTHED else 0.0
    for weights in (None, random_weights(batch, binary=True), random_weights(batch)):
        model = lora_model("llama")
        mask = response(batch).double() if weights is None else weights
        value, grads = reference.masked_dpo(model, batch, mask, beta=0.3, kind=kind, eps=eps)
        loss = dpo_loss(model, None, batch, weights, beta=0.3, loss_type=kind, label_smoothing=eps)
        loss.backward()
        assert_close(loss.detach(), value, TOL64)
        assert_same_grads(grads_of(model), grads, TOL64)


def test_dpo_gradient_is_eq_14():
    model = lora_model("llama")
    batch = pair_batch()
    weights = random_weights(batch, binary=True)
    dpo_loss(model, None, batch, weights, beta=0.3).backward()
    assert_same_grads(grads_of(model), reference.eq14(model, batch, weights, beta=0.3), TOL64)


def test_dpo_by_hand():
    """No drift from the reference: s = 0, the loss is log 2 and omega is beta / 2."""
    model = lora_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    batch = pair_batch()
    loss = dpo_loss(model, None, batch, beta=torch.tensor(0.4), label_smoothing=False)
    assert torch.equal(loss, dpo_loss(model, None, batch, beta=0.4))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(2.0, dtype=torch.float64).log(), TOL64)
    work = reference.frozen_copy(model)
    chosen, rejected = reference.token_nll(work, stacked(batch)).sum(1).chunk(2)
    expected = reference.gradients(work, 0.2 * (chosen - rejected).mean())
    assert_same_grads(grads_of(model), expected, TOL64)


def test_reference_is_the_adapter_called_ref():
    model = lora_model("llama", others=["ref"])
    batch = pair_batch()
    value, grads = reference.masked_dpo(model, batch, response(batch))
    off = copy.deepcopy(model)
    off.delete_adapter("ref")
    other, _ = reference.masked_dpo(off, batch, response(batch))
    assert abs(float(value - other)) > 1e-3
    loss = dpo_loss(model, None, batch)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_separate_reference_model():
    model = lora_model("llama")
    ref_model = base_model("llama", seed=77)
    batch = pair_batch()
    value, grads = reference.masked_dpo(model, batch, response(batch), ref_model=ref_model)
    assert abs(float(value - reference.masked_dpo(model, batch, response(batch))[0])) > 1e-3
    loss = dpo_loss(model, ref_model, batch)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)
    assert all(p.grad is None for p in ref_model.parameters())


def test_nf4_dpo():
    model = nf4_lora_model("llama")
    batch = pair_batch()
    weights = random_weights(batch, binary=True)
    value, grads = reference.masked_dpo(model, batch, weights)
    loss = dpo_loss(model, None, batch, weights)
    loss.backward()
    assert_close(loss.detach(), value, 1e-4)
    assert_same_grads(grads_of(model), grads, 1e-4)


def test_return_metrics():
    model = lora_model("llama")
    batch = pair_batch()
    loss, metrics = dpo_loss(model, None, batch, return_metrics=True)
    assert_close(loss.detach(), dpo_loss(model, None, batch).detach(), TOL64)
    nll = reference.token_nll(reference.frozen_copy(model), stacked(batch)).detach()
    s = reference.margins(nll, reference.reference_logps(model, batch), 0.1)
    numbers = [float(value) for value in metrics.values() if torch.as_tensor(value).numel() == 1]
    assert any(abs(value - float(s.mean())) < 1e-5 for value in numbers), metrics
    assert any(abs(value - float((s > 0).double().mean())) < 1e-6 for value in numbers), metrics


def test_no_completion_anywhere_is_a_zero_gradient_with_a_graph():
    model = lora_model("llama")
    batch = pair_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss = dpo_loss(model, None, batch)
    assert torch.isfinite(loss)
    loss.backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


# ---------------------------------------------------------------------------------------------- TRL


def trainer_and_twin(folder, **options):
    """A `DPOTrainer`, its policy moved away from its reference, and a model of ours with equal adapters."""
    rows = [
        {"prompt": "a b c", "chosen": " d e f g", "rejected": " h i"},
        {"prompt": "k", "chosen": " l", "rejected": " m n o"},
    ]
    args = DPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=64,
        **options,
    )
    trainer = DPOTrainer(
        model=lora_model("llama"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )
    randomise_adapter(trainer.model, "default", seed=31)
    ours = lora_model("llama")
    ours.add_adapter("ref", ours.peft_config["default"])
    ours.load_state_dict(trainer.model.state_dict())
    return trainer, ours


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_trls_dpo_trainer(kind, tmp_path):
    """The same model and batch through `DPOTrainer._compute_loss`: value and gradients."""
    eps = 0.15 if kind in SMOOTHED else 0.0
    trainer, ours = trainer_and_twin(tmp_path, loss_type=[kind], beta=0.25, label_smoothing=eps)
    batch = pair_batch()
    value = trainer._compute_loss(trainer.model, dict(batch), return_outputs=False)
    value.backward()
    loss = dpo_loss(ours, None, batch, beta=0.25, loss_type=kind, label_smoothing=eps)
    loss.backward()
    theirs = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in trainer.model.named_parameters()
        if ".default." in name
    }
    assert_close(loss.detach(), value.detach(), 1e-5)
    assert_same_grads(grads_of(ours), theirs, 1e-5)


def test_equal_on_a_batch_from_trls_own_loader(tmp_path):
    trainer, ours = trainer_and_twin(tmp_path, per_device_train_batch_size=2)
    batch = next(iter(trainer.get_train_dataloader()))
    value = trainer._compute_loss(trainer.model, dict(batch), return_outputs=False)
    assert_close(dpo_loss(ours, None, batch).detach(), value.detach(), 1e-5)


def test_sigmoid_loss_against_torch():
    """Worked with plain log-softmax sums."""
    model = lora_model("llama")
    batch = pair_batch()
    rows = stacked(batch)
    policy = reference.frozen_copy(model)
    base = reference.frozen_copy(model, "off")
    with torch.no_grad():
        ratio = reference.token_nll(base, rows).sum(1) - reference.token_nll(policy, rows).sum(1)
    expected = -F.logsigmoid(0.1 * (ratio[:3] - ratio[3:])).mean()
    assert_close(dpo_loss(model, None, batch).detach(), expected, TOL64)


# ---------------------------------------------------------------------------------------------- outputs, routers


def test_outputs_behind_virtual_tokens():
    batch = sft_batch("right")
    model = get_peft_model(base_model("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    weights = random_weights(batch)
    loss, outputs = sft_loss(model, batch, weights, return_outputs=True)
    assert outputs.logits.shape[1] == batch["labels"].shape[1] + 3
    assert_close(loss.detach(), sft_loss(model, batch, weights).detach(), TOL64)


@pytest.mark.parametrize("weighted", [False, True])
def test_dpo_of_a_mixture_of_experts_has_the_loss_of_its_router(weighted):
    """As TRL's, router_aux_loss_coef times the model's own."""
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5, **ROTARY)
    config.num_hidden_layers = 2
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # as its kernels want it
    model, batch = add_lora(base, targets=["q_proj", "v_proj"]), pair_batch("stacked")
    rows, weights = stacked(batch), response(batch).double() if weighted else None
    loss = dpo_loss(model, None, batch, weights)
    loss.backward()
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    ours, balance = grads_of(model), model(**inputs, use_cache=False).aux_loss
    assert float(balance.detach()) > 0.1
    model.zero_grad()
    config.output_router_logits = False
    alone = dpo_loss(model, None, batch, weights)
    (alone + 0.5 * balance).backward()
    assert_close(loss.detach(), (alone + 0.5 * balance).detach(), 1e-5)
    assert_same_grads(ours, grads_of(model), 1e-4)
