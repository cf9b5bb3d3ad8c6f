"""TRL's trainers: with values on, every feature takes the steps of the explicitly masked stock trainer."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import tuning
from checks import error
from datasets import Dataset
from peft import IA3Config, PeftModel, get_peft_model
from trainer_cases import feature, make, offload_on_a_cpu, own_loss
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import (
    DPOConfig,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from tuning import arguments, base, dpo_data, history, lora, masked, recording, sft_data, tokenizer, trained

import alphatoken_loss
from alphatoken_loss import (
    AlphaTokenArguments,
    AlphaTokenConfig,
    AlphaTokenDPOConfig,
    AlphaTokenMixin,
    AlphaTokenSFTConfig,
)
from alphatoken_loss.selection import SELECTIONS
from alphatoken_loss.trl import arguments as fields
from alphatoken_loss.trl import fisher as fisher_of_prompts
from alphatoken_loss.trl.refused import refuse_what_is_not_modelled

# feature -> (arguments, form of the data, model, adapter, more for the trainer)


SFT = {
    "nll": feature(),
    "dft": feature(loss_type="dft"),
    "label_smoothing": feature(label_smoothing_factor=0.1, loss_type="nll"),
    "compute_loss_func": feature(options=lambda: {"compute_loss_func": own_loss}, loss_type="nll"),
    "packing_bfd": feature(packing=True, max_length=40),
    "packing_bfd_split": feature(packing=True, packing_strategy="bfd_split", max_length=16),
    "packing_wrapped": feature(packing=True, packing_strategy="wrapped", max_length=16),
    "padding_free": feature(padding_free=True, max_length=None),
    "every_token": feature(completion_only_loss=False),
    "text": feature("text"),
    "conversational": feature("chat"),
    "assistant_only": feature("messages", assistant_only_loss=True),
    "truncation": feature(max_length=12, truncation_mode="keep_end"),
    "streaming": feature(options=lambda: {"stream": True}),
    "accumulation": feature(gradient_accumulation_steps=2),
    "per_sequence": feature(threshold_scope="sequence"),
    "difference": feature(estimator="difference"),
    "difference_offloading": feature(estimator="difference", activation_offloading=True, gradient_checkpointing=False),
    "exact": feature(estimator="exact"),
    "adams_step": feature(precondition=True, optim="adamw_torch", learning_rate=1e-2),
    "adams_step_8bit": feature(precondition=True, optim="adamw_8bit", learning_rate=1e-2, estimator="difference"),
    "above_zero": feature(threshold="zero"),
    "clipping_and_adamw": feature(optim="adamw_torch", max_grad_norm=0.1, learning_rate=1e-3),
    "bf16": feature(bf16=True),
    "no_checkpointing": feature(gradient_checkpointing=False),
    "reentrant": feature(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "offloading": feature(activation_offloading=True),
    "offloading_only": feature(activation_offloading=True, gradient_checkpointing=False),
    "nf4": feature(model=tuning.nf4),
    "existing_adapter": feature(model=tuning.with_adapter, peft=None),
    "dropout": feature(peft=lambda: lora(lora_dropout=0.2)),
    "full": feature(model=tuning.partly_trained, peft=None, options=lambda: {"ref_model": base()}),
}
LOSSES = (
    "sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DPO = {
    **{loss: feature(loss_type=[loss]) for loss in LOSSES},
    "exo_pair": feature(loss_type=["exo_pair"], label_smoothing=0.05),
    "combination": feature(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "forward_kl": feature(f_divergence_type="forward_kl"),
    "js_divergence": feature(f_divergence_type="js_divergence"),
    "alpha_divergence": feature(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5),
    "ld_alpha": feature(ld_alpha=0.5),
    "use_weighting": feature(use_weighting=True),
    "precomputed": feature(precompute_ref_log_probs=True),
    "ref_model": feature(options=lambda: {"ref_model": base(1)}, stability_weight=0.0),  # another base: no drift
    "existing_adapter": feature(model=tuning.with_adapter, peft=None),
    "full": feature(model=tuning.partly_trained, peft=None, options=lambda: {"ref_model": base()}),
    "sync_ref_model": feature(
        model=tuning.partly_trained, peft=None, options=lambda: {"ref_model": base()}, sync_ref_model=True,
        ref_model_sync_steps=1,
    ),
    "difference": feature(estimator="difference"),
    "exact": feature(estimator="exact"),
    "adams_step": feature(precondition=True, optim="adamw_torch", learning_rate=1e-2),
    "above_zero": feature(threshold="zero"),
    "conversational": feature("chat"),
    "truncation": feature(max_length=12, truncation_mode="keep_end"),
    "streaming": feature(options=lambda: {"stream": True}),
    "accumulation": feature(gradient_accumulation_steps=2),
    "per_sequence": feature(threshold_scope="sequence"),
    "bf16": feature(bf16=True),
    "no_checkpointing": feature(gradient_checkpointing=False),
    "reentrant": feature(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "offloading": feature(activation_offloading=True),
    "offloading_only": feature(activation_offloading=True, gradient_checkpointing=False),
    "nf4": feature(model=tuning.nf4),
}  # fmt: skip
CASES = [("sft", name) for name in SFT] + [("dpo", name) for name in DPO]
# Where the loss weights tokens beyond SFT's mean and DPO's sigmoid, or dropout moves it, its values are its own.
OWN_VALUES = {
    "difference", "difference_offloading", "dft", "label_smoothing", "dropout", "bf16", "nf4", *LOSSES, "exo_pair",
    "combination", "forward_kl", "js_divergence", "alpha_divergence", "ld_alpha", "use_weighting",
} - {"sigmoid"}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_steps_are_those_of_the_explicitly_masked_stock_trainer(kind, name, tmp_path, monkeypatch):
    offload_on_a_cpu(monkeypatch)
    case = (SFT if kind == "sft" else DPO)[name]
    ours, stock = tuning.TRAINERS[kind]
    trainer = make(kind, recording(ours), case, tmp_path)
    before = dict(trained(trainer.model))
    trainer.train()
    other = make(kind, masked(stock, trainer.masks), case, tmp_path, ours=False)
    other.train()

    assert len(trainer.masks) == 3 * case["args"].get("gradient_accumulation_steps", 1) == other.step_count
    figures = [log for log in trainer.state.log_history if "alphatoken/kept" in log]
    # Rejected answers are worth nothing either way to the loss "sft", and all stay.
    low, high = {"sft": (0.4, 0.95), "above_zero": (0.2, 0.8)}.get(name, (0.4, 0.75))
    assert all(low < log["alphatoken/kept"] < high for log in figures) and len(figures) == 3, figures
    if name not in OWN_VALUES:
        for mask, expected in zip(trainer.masks, trainer.expected, strict=True):
            assert torch.equal(mask, expected)
    tolerance = {"bf16": 2e-2, "nf4": 2e-2}.get(name, 1e-4)
    after, expected = dict(trained(trainer.model)), dict(trained(other.model))
    assert set(after) == set(expected)
    moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
    assert moved > 0
    for key in expected:
        assert float((after[key] - expected[key]).abs().max()) < tolerance * moved, key
    for log, stock_log in zip(history(trainer), history(other), strict=True):
        assert set(log) == set(stock_log)
        for key, value in stock_log.items():
            assert log[key] == pytest.approx(value, rel=20 * tolerance, abs=20 * tolerance), key


# ------------------------------------------------------------------------------------ rho = 1


REFUSED = {
    "dora": feature(peft=lambda: lora(use_dora=True), rho=1.0),
    "trained_head": feature(peft=lambda: lora(modules_to_save=["lm_head"]), rho=1.0),
    "ia3": feature(peft=lambda: IA3Config(task_type="CAUSAL_LM"), rho=1.0),
    "everything_trained": feature(peft=None, rho=1.0),
    "no_rows_to_spare": feature(rho=1.0, target_size=1000, num_train_epochs=1, max_steps=-1),
    "stream": feature(rho=1.0, options=lambda: {"stream": True}),
    "nf4": feature(model=tuning.nf4, rho=1.0),
    "accumulation": feature(rho=1.0, gradient_accumulation_steps=2, max_grad_norm=0.5, optim="adamw_torch"),
}


def timeless(logs: list[dict[str, float]], *without: str) -> list[dict[str, float]]:
    times = ("runtime", "per_second", "preparation_time", *without)
    return [{k: v for k, v in log.items() if not any(part in k for part in times)} for log in logs]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_with_rho_1_they_are_trls_trainers_to_the_last_bit(kind, name, tmp_path):
    """Same losses, metrics, evaluation and parameters, also for models that could not be valued."""
    case = dict(REFUSED[name])
    if kind == "dpo" and name == "everything_trained":
        case["options"] = lambda: {"ref_model": base()}
    ours, stock = tuning.TRAINERS[kind]
    evaluate = {} if name == "nf4" else {"eval_strategy": "steps", "eval_steps": 1}  # see docs/troubleshooting.md
    results = []
    for trainer_class in (ours, stock):
        trainer = make(kind, trainer_class, case, tmp_path, ours=False, evaluate=name != "nf4", **evaluate)
        trainer.train()
        results.append(trainer)
    first, second = results
    assert first.alphatoken is None
    assert name == "stream" or len(first.train_dataset) == len(second.train_dataset) == 12
    logs = [timeless(trainer.state.log_history) for trainer in results]
    assert logs[0] == logs[1] and len(logs[0]) >= 4
    for (key, after), (_, expected) in zip(trained(first.model), trained(second.model), strict=True):
        assert torch.equal(after, expected), key


def test_with_rho_1_data_for_valuing_is_left_alone(tmp_path):
    data = sft_data(first=50)
    case = feature(rho=1.0, options=lambda: {"target_dataset": data, "fisher": "nowhere", "ref_model": base()})
    trainer = make("sft", tuning.TRAINERS["sft"][0], case, tmp_path)
    assert trainer.alphatoken is None and not trainer.model._forward_hooks


# ------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_evaluation_and_prediction_are_those_of_the_stock_trainer(kind, tmp_path):
    """After training with values on, on the same parameters; nothing is valued meanwhile."""
    ours, stock = tuning.TRAINERS[kind]
    trainer, other = (make(kind, cls, feature(), tmp_path, ours=cls is ours) for cls in (ours, stock))
    trainer.train()
    other.model.load_state_dict(trainer.model.state_dict())
    data = (sft_data if kind == "sft" else dpo_data)(first=30)
    mask, _ = trainer.alphatoken.weights, trainer.alphatoken.metrics()
    for t in (trainer, other):
        t.evaluate(data)
    logs = [timeless(t.state.log_history[-1:], "num_tokens", "epoch", "step") for t in (trainer, other)]
    assert logs[0] == logs[1] and "eval_loss" in logs[0][0] and "eval_entropy" in logs[0][0]
    prepared = [t._remove_unused_columns(t.train_dataset, "test") for t in (trainer, other)]
    predictions = [t.predict(rows) for t, rows in zip((trainer, other), prepared, strict=True)]
    found = [p.predictions if isinstance(p.predictions, tuple) else (p.predictions,) for p in predictions]
    assert all((one == other).all() for one, other in zip(*found, strict=True))
    assert predictions[0].metrics["test_loss"] == predictions[1].metrics["test_loss"]
    assert trainer.alphatoken.weights is mask and "kept" not in trainer.alphatoken.metrics()


# ------------------------------------------------------------------------------------ accumulation


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_1_x_8_equals_8_x_1(kind, tmp_path):
    """The same 8 rows in one micro-batch or in eight: the kept gradient is divided by all response tokens (for DPO,
    pairs) of both, so parameters agree; with one threshold per micro-batch, the share kept does."""
    changes = []
    for size in (1, 8):
        case = feature(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=2,
                       threshold_scope="sequence", target_batch_size=4, stability_weight=0.0)  # fmt: skip
        trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
        before = dict(trained(trainer.model))
        trainer.train()
        changes.append({name: p - before[name] for name, p in trained(trainer.model)})
        assert trainer.state.global_step == 2
    moved = max(float(change.abs().max()) for change in changes[1].values())
    assert moved > 0
    for name, change in changes[1].items():
        assert float((changes[0][name] - change).abs().max()) < 1e-4 * moved, name
    kept = []
    for size in (1, 8):
        case = feature(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1)
        trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
        trainer.train()
        kept.append(trainer.state.log_history[0]["alphatoken/kept"])
    assert kept[0] == pytest.approx(kept[1], abs=0.08) and kept[1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.filterwarnings("ignore")
def test_the_kept_gradient_is_divided_by_all_response_tokens(tmp_path):
    """One SGD step: (1 / N) * sum over kept tokens of grad nll, N all response tokens of the two micro-batches."""
    case = feature(gradient_accumulation_steps=2, max_steps=1, learning_rate=1.0, gradient_checkpointing=False)
    seen = []

    class Keeping(recording(tuning.TRAINERS["sft"][0])):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({k: v.clone() for k, v in inputs.items() if k != "use_cache"})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = make("sft", Keeping, case, tmp_path)
    model = get_peft_model(base(), lora())
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in seen)
    loss = 0.0
    for batch, mask in zip(seen, trainer.masks, strict=True):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        loss = loss + (nll * mask[:, 1:]).sum() / tokens
    loss.backward()
    for (name, before), (_, after) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        if before.requires_grad and float(before.grad.abs().max()) > 0:
            assert error(before.detach() - after.detach(), before.grad) < 1e-4, name


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    ("kind", "estimator"), [("sft", "ghost"), ("dpo", "ghost"), ("sft", "difference"), ("dpo", "exact")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_reproduces_the_uninterrupted_one(kind, estimator, tmp_path, monkeypatch):
    """Interrupted in the middle of a target's life; with dropout, a held-out target and a Fisher of its own."""
    case = feature(peft=lambda: lora(lora_dropout=0.1), options=lambda: {"target_dataset": None}, max_steps=6,
                   save_strategy="steps", save_steps=3, target_every=4, optim="adamw_torch",
                   learning_rate=1e-2)  # fmt: skip
    case["args"]["estimator"] = estimator
    if kind == "dpo":
        case["args"]["disable_dropout"] = False
    ours = tuning.TRAINERS[kind][0]
    whole = make(kind, recording(ours), case, tmp_path)
    whole.train()
    assert (tmp_path / "fisher.safetensors").is_file()
    assert not list(tmp_path.glob("checkpoint-*/fisher.safetensors"))
    monkeypatch.setattr(fisher_of_prompts, "estimate_fisher", None)  # what was saved is used
    resumed = make(kind, recording(ours), case, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(resumed.masks) == 3
    for mask, expected in zip(resumed.masks, whole.masks[3:], strict=True):
        assert torch.equal(mask, expected)
    for (name, after), (_, expected) in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(after, expected), name
    ages = [
        [log["alphatoken/target_age"] for log in t.state.log_history if "alphatoken/kept" in log]
        for t in (whole, resumed)
    ]
    assert ages[0] == ages[1] == [0, 1, 2, 3, 0, 1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ["ghost", "difference"])
def test_a_run_of_preconditioned_values_resumed_from_its_first_checkpoint(estimator, tmp_path):
    """The first step's direction is not scaled, and the next one's nudge is found anew: in a resumed run too."""
    case = feature(max_steps=4, save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-2,
                   precondition=True, estimator=estimator)  # fmt: skip
    ours = tuning.TRAINERS["sft"][0]
    whole = make("sft", recording(ours), case, tmp_path)
    whole.train()
    resumed = make("sft", recording(ours), case, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for mask, expected in zip(resumed.masks, whole.masks[1:], strict=True):
        assert torch.equal(mask, expected)
    for (name, after), (_, expected) in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(after, expected), name
    rms = [
        [log["alphatoken/difference_rms"] for log in t.state.log_history if "alphatoken/difference_rms" in log]
        for t in (whole, resumed)
    ]
    assert rms[0] == rms[1] and (len(rms[0]) > 1) == (estimator == "difference")


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_target_says_so_and_goes_on(tmp_path, caplog):
    case = feature(max_steps=2, save_strategy="steps", save_steps=1)
    make("sft", tuning.TRAINERS["sft"][1], case, tmp_path, ours=False).train()
    trainer = make("sft", tuning.TRAINERS["sft"][0], case, tmp_path)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has no alphatoken.safetensors" in caplog.text
    assert trainer.state.global_step == 2
    text = (tmp_path / "README.md").read_text()  # the model card of the last checkpoint
    assert "alphatoken" in text and "sft" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fisher_given_or_loaded_is_not_estimated(tmp_path, monkeypatch):
    trainer = make("sft", tuning.TRAINERS["sft"][0], feature(max_steps=1), tmp_path)
    trainer.train()
    fisher, path = trainer.alphatoken.fisher, tmp_path / "fisher.safetensors"
    assert fisher.prompts == 4 and path.is_file()
    monkeypatch.setattr(fisher_of_prompts, "estimate_fisher", None)
    cases = (
        feature(max_steps=1, options=lambda: {"fisher": fisher}),
        feature(max_steps=1, options=lambda: {"fisher": str(path)}),
        feature(max_steps=1, fisher_path=str(path)),
    )
    for case in cases:
        again = make("sft", tuning.TRAINERS["sft"][0], case, tmp_path / "other")
        again.train()
        for name in fisher.names:
            assert torch.equal(again.alphatoken.fisher.diagonal(name), fisher.diagonal(name))
    assert not (tmp_path / "other" / "fisher.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_fisher_is_estimated_from_the_prompts_of_the_training_data(tmp_path, monkeypatch):
    asked = {}

    def estimate(model, prompts, **options):
        asked["prompts"] = [trainer._tokenizer.decode(p) for p in prompts]
        return real(model, prompts, **options)

    real = fisher_of_prompts.estimate_fisher
    monkeypatch.setattr(fisher_of_prompts, "estimate_fisher", estimate)
    known = {row["prompt"] for row in tuning.rows()}
    halves = {row["prompt"] + row["completion"] + "</s>" for row in tuning.rows()}
    for kind, form, stream in (
        ("sft", "plain", False),
        ("dpo", "plain", False),
        ("sft", "plain", True),
        ("sft", "text", False),
    ):
        case = feature(form, max_steps=1, fisher_prompts=5, options=lambda stream=stream: {"stream": stream})
        trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
        trainer.train()
        assert len(set(asked["prompts"])) == 5
        for prompt in asked["prompts"]:
            assert prompt in known or (
                form == "text" and any(text[: (len(text) - 3 + 1) // 2] == prompt for text in halves)
            ), prompt


# ------------------------------------------------------------------------------------ target


@pytest.mark.parametrize("form", ["plain", "chat", "messages"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_target_is_the_gradient_of_trls_own_sft_loss(kind, form, tmp_path):
    """Of the stock SFT trainer, on the same rows: the same tokens count, in every form of data, for both trainers."""
    data = sft_data(form, count=5, first=60)
    case = feature("chat" if form == "messages" and kind == "dpo" else form, max_steps=1, learning_rate=0.0,
                   options=lambda: {"target_dataset": data}, target_batch_size=2)  # fmt: skip
    trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
    trainer.train()
    stock = tuning.TRAINERS["sft"][1](
        base(), args=arguments("sft", tmp_path, per_device_train_batch_size=5, gradient_checkpointing=False),
        train_dataset=data, processing_class=tokenizer(chat=form != "plain"), peft_config=lora(),
    )  # fmt: skip
    stock.model.load_state_dict(trainer.model.state_dict(), strict=False)
    (batch,) = stock.get_train_dataloader()
    stock.compute_loss(stock.model, dict(batch)).backward()
    parameters = dict(stock.model.named_parameters())
    target = trainer.alphatoken.target
    assert target.tokens == int((batch["labels"][:, 1:] != -100).sum())
    compared = 0
    for name, gradient in target.gradients.items():
        if float(parameters[name].grad.abs().max()) > 0:
            assert error(gradient, parameters[name].grad) < 1e-4, name
            compared += 1
    assert compared >= 14


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("only", [False, True])
def test_turns_of_users_in_messages_are_told_of(only, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        make("sft", tuning.TRAINERS["sft"][0], feature("messages", assistant_only_loss=only), tmp_path)
    assert ("all turns are trained on and valued" in caplog.text) is not only


@pytest.mark.filterwarnings("ignore")
def test_without_target_dataset_a_slice_is_held_out(tmp_path, caplog):
    """So many rows as asked for, the same ones for the same seed, and the chosen answers of pairs count."""
    slices = {}
    for kind in ("sft", "dpo"):
        for seed in (3, 3, 4):
            case = feature(options=lambda: {"target_dataset": None}, target_size=5, target_batch_size=2, seed=seed)
            with caplog.at_level("WARNING"):
                caplog.clear()
                trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
            assert "5 of 12 training rows are held out" in caplog.text
            assert len(trainer.train_dataset) == 7
            batches = trainer.alphatoken.source.batches
            answers = 2 if kind == "dpo" else 1
            assert [len(batch["input_ids"]) // answers for batch in batches] == [2, 2, 1]
            decode = trainer._tokenizer.batch_decode
            texts = [
                text
                for b in batches
                for text in decode(b["input_ids"][: len(b["input_ids"]) // answers], skip_special_tokens=True)
            ]
            left = {row["prompt"] for row in trainer.train_dataset}
            known = {row["prompt"] + row["completion"]: row["prompt"] for row in tuning.rows()}
            assert {known[text] for text in texts} | left == set(known.values()) and len(texts) == 5
            slices.setdefault((kind, seed), []).append(texts)
    assert slices["sft", 3][0] == slices["sft", 3][1] != slices["sft", 4][0]


# ------------------------------------------------------------------------------------ metrics, mixin


@pytest.mark.filterwarnings("ignore")
def test_figures_go_to_every_tracker_with_trls_own(tmp_path):
    """Trackers get what `on_log` gets."""
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    case = feature(max_steps=4, logging_steps=2, target_every=3, eval_strategy="steps", eval_steps=4)
    trainer = make("dpo", tuning.TRAINERS["dpo"][0], case, tmp_path, evaluate=True)
    trainer.add_callback(Tracker())
    trainer.train()
    names = ("kept", "direct_target", "causal_target", "direct_drift", "causal_drift", "target_age", "seconds")
    training = [logs for logs in logged if "loss" in logs]
    assert len(training) == 2
    for logs in training:
        assert all(isinstance(logs[f"alphatoken/{name}"], float) for name in names) and "rewards/margins" in logs
        assert logs["alphatoken/seconds"] > 0
    assert [logs["alphatoken/target_age"] for logs in training] == [1, 0]
    others = [logs for logs in logged if "loss" not in logs]
    assert any("eval_loss" in logs for logs in others)
    assert not any("alphatoken" in key for logs in others for key in logs)


@dataclass
class PlainArguments(AlphaTokenArguments, TrainingArguments):
    pass


class PlainTrainer(AlphaTokenMixin, Trainer):
    pass


class MaskedTrainer(Trainer):
    """Cross-entropy of the tokens of a mask, written out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = self.masks[self.state.global_step]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
        return (nll * mask[:, 1:]).sum() / num_items_in_batch


@pytest.mark.filterwarnings("ignore")
def test_mixin_on_transformers_trainer(tmp_path):
    words = tokenizer()
    data = [{"input_ids": words(r["prompt"] + r["completion"])["input_ids"]} for r in tuning.rows(20)]
    data = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in data]
    collate = DataCollatorForSeq2Seq(words, label_pad_token_id=-100)
    options = {"use_cpu": True, "max_steps": 3, "report_to": "none", "learning_rate": 0.3, "optim": "sgd",
               "num_layers": 2, "per_device_train_batch_size": 3, "target_size": 5, "fisher_prompts": 4,
               "fisher_new_tokens": 4, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}  # fmt: skip
    for rows in (Dataset.from_list(data), data):  # a list is a dataset too
        torch.manual_seed(0)
        models = [get_peft_model(base(), lora()) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        args = PlainArguments(output_dir=str(tmp_path), **options)
        trainer = recording(PlainTrainer)(
            models[0], args, train_dataset=rows, data_collator=collate, processing_class=words
        )
        before = dict(trained(models[0]))
        trainer.train()
        assert len(trainer.train_dataset) == 15 and "alphatoken/kept" in trainer.state.log_history[0]
        other = MaskedTrainer(models[1], args, train_dataset=trainer.train_dataset, data_collator=collate)
        other.masks, other.model_accepts_loss_kwargs = trainer.masks, True
        other.train()
        for mask, expected in zip(trainer.masks, trainer.expected, strict=True):
            assert torch.equal(mask, expected)
        for (name, after), (_, expected) in zip(trained(models[0]), trained(models[1]), strict=True):
            if not torch.equal(expected, before[name]):
                assert error(after - before[name], expected - before[name]) < 1e-4, name


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_made_when_training_starts(tmp_path):
    """`model_init`: another model than the one that the trainer was made with."""
    words = tokenizer()
    data = [{"input_ids": words(r["prompt"] + r["completion"])["input_ids"]} for r in tuning.rows(12)]
    data = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in data]
    args = PlainArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to="none", num_layers=2, target_size=4,
        fisher_prompts=2, fisher_new_tokens=2, save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(words, label_pad_token_id=-100)
    trainer = PlainTrainer(
        model_init=lambda: get_peft_model(base(), lora()), args=args, train_dataset=data, data_collator=collate,
        processing_class=words,
    )  # fmt: skip
    first = trainer.model
    trainer.train()
    assert trainer.model is not first and trainer.alphatoken.model is trainer.model
    assert 0 < trainer.state.log_history[0]["alphatoken/kept"] < 1


def test_a_reference_that_is_no_model(tmp_path):
    trainer_class = tuning.TRAINERS["sft"][0]
    with pytest.raises(TypeError, match="ref_model is a str; it must be a model"):
        trainer_class(base(), args=arguments("sft", tmp_path), train_dataset=sft_data(), ref_model="some/model",
                      processing_class=tokenizer(), peft_config=lora())  # fmt: skip


@dataclass
class KTOArguments(AlphaTokenArguments, KTOConfig):
    pass


class AlphaTokenKTOTrainer(AlphaTokenMixin, KTOTrainer):
    def alphatoken_batch(self, inputs):
        if "completion_mask" not in inputs:
            return inputs  # a target batch, in SFT form
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


@dataclass
class ORPOArguments(AlphaTokenArguments, ORPOConfig):
    pass


class AlphaTokenORPOTrainer(AlphaTokenMixin, ORPOTrainer):
    pass


@pytest.mark.parametrize("name", ["kto", pytest.param("orpo", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_mixin_on_other_trainers_of_trl(name, tmp_path):
    ours, stock, config = {
        "kto": (AlphaTokenKTOTrainer, KTOTrainer, KTOArguments),
        "orpo": (AlphaTokenORPOTrainer, ORPOTrainer, ORPOArguments),
    }[name]
    data = dpo_data()
    if name == "kto":
        data = sft_data().add_column("label", [i % 2 == 0 for i in range(12)])
    options = vars(arguments("sft", tmp_path))
    wanted = {k: options[k] for k in ("use_cpu", "bf16", "max_steps", "logging_steps", "save_strategy", "optim", "seed",
              "learning_rate", "max_grad_norm", "lr_scheduler_type", "disable_tqdm", "num_layers", "target_every",
              "fisher_prompts", "fisher_new_tokens", "per_device_train_batch_size")}  # fmt: skip
    args = config(output_dir=str(tmp_path), report_to="none", **wanted)
    common = {"args": args, "train_dataset": data, "processing_class": tokenizer(), "peft_config": lora()}
    trainer = recording(ours)(base(), target_dataset=sft_data(count=4, first=50), **common)
    before = dict(trained(trainer.model))
    trainer.train()
    assert 0.4 < trainer.state.log_history[0]["alphatoken/kept"] < 0.75
    other = masked(stock, trainer.masks)(base(), **common)
    other.train()
    for (key, after), (_, expected) in zip(trained(trainer.model), trained(other.model), strict=True):
        if not torch.equal(expected, before[key]):
            assert error(after - before[key], expected - before[key]) < 1e-3, key


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_by_its_path_is_loaded_quantised_and_reloads(kind, tmp_path):
    """As TRL's scripts do, with `ModelConfig`'s flags; what is saved is a plain PEFT adapter."""
    base().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    flags = ModelConfig(load_in_4bit=True, use_peft=True, lora_r=2, lora_target_modules=["all-linear"], dtype="float32")
    trainer = tuning.TRAINERS[kind][0](
        str(tmp_path / "model"),
        args=arguments(kind, tmp_path / "out", max_steps=2),
        train_dataset=(sft_data if kind == "sft" else dpo_data)(),
        quantization_config=get_quantization_config(flags),
        peft_config=get_peft_config(flags),
    )
    assert trainer.model.is_loaded_in_4bit and len(trainer.train_dataset) == 8
    trainer.train()
    trainer.save_model()
    assert "alphatoken/kept" in trainer.state.log_history[0]
    again = PeftModel.from_pretrained(base(), tmp_path / "out")
    saved = {name: p for name, p in again.named_parameters() if "lora_" in name}
    for name, parameter in trained(trainer.model):
        assert torch.equal(saved[name], parameter.float()), name


# ------------------------------------------------------------------------------------ arguments


def test_config_has_every_field_of_the_librarys_own():
    for config in (AlphaTokenSFTConfig, AlphaTokenDPOConfig):
        for setting in dataclasses.fields(AlphaTokenConfig):
            (found,) = [f for f in dataclasses.fields(config) if f.name == setting.name]
            assert found.default == setting.default and found.metadata["help"], setting.name
    own = {f.name: f.metadata.get("help") for f in dataclasses.fields(AlphaTokenArguments)}
    assert all(own.values()), own
    assert all(f'`"{name}"`' in own["selection"] for name in SELECTIONS if name != "given")
    for taken in (SFTConfig, DPOConfig, TrainingArguments, KTOConfig, ModelConfig, ScriptArguments):
        assert not own.keys() & {f.name for f in dataclasses.fields(taken)}, taken


@pytest.mark.parametrize("rho", [0.3, 0.5, 1.0])
def test_the_preset_as_arguments(rho, tmp_path):
    """A KL beside a loss that is divided by all tokens, kept or not, is rho times that beside the mean of the kept."""
    given = {"output_dir": str(tmp_path), "bf16": False, "learning_rate": 3e-4, "rho": rho}
    for made, preset, kl in (
        (AlphaTokenSFTConfig.best(**given), AlphaTokenConfig.best(rho=rho), 0.6 * rho),
        (AlphaTokenDPOConfig.best(**given), AlphaTokenConfig.best(pairs=True, rho=rho), 0.6),
    ):
        assert made.alphatoken_config == dataclasses.replace(preset, path_kl=kl)
        assert (made.learning_rate, made.output_dir) == (3e-4, str(tmp_path))
    assert AlphaTokenSFTConfig.best(**given, path_kl=0.7).path_kl == 0.7
    assert AlphaTokenSFTConfig.best(**given).gain_rows == AlphaTokenDPOConfig.best(**given).gain_rows == 0
    other = AlphaTokenSFTConfig.best(**given, estimator="difference").alphatoken_config
    assert other == AlphaTokenConfig.best(estimator="difference", rho=rho)


def test_the_preset_finds_rho_where_none_is_given(tmp_path):
    given = {"output_dir": str(tmp_path), "bf16": False}
    made = AlphaTokenSFTConfig.best(**given)
    assert (made.gain_rows, made.rho, made.path_kl) == (64, 0.5, 0.3)
    assert AlphaTokenSFTConfig.best(**given, selection="alphatoken").gain_rows == 64
    assert AlphaTokenSFTConfig.best(**given, gain_rows=0).gain_rows == 0
    assert AlphaTokenSFTConfig.best(**given, estimator="difference").gain_rows == 0
    assert AlphaTokenSFTConfig(**given).gain_rows == AlphaTokenDPOConfig.best(**given).gain_rows == 0


def test_a_setting_added_to_the_library_is_an_argument_at_once(monkeypatch):
    @dataclass(frozen=True)
    class Later(AlphaTokenConfig):
        """Settings.

        Args:
            difference_rms (`float`, *optional*):
                Size of the nudge, 10% of something.
        """

        difference_rms: float | None = None

    monkeypatch.setattr(fields, "AlphaTokenConfig", Later)
    (found,) = [setting for setting in fields._settings() if setting[0] == "difference_rms"]
    assert found[1] == float | None and found[2].default is None
    assert found[2].metadata["help"] == "Size of the nudge, 10%% of something."


@pytest.mark.parametrize("config", [AlphaTokenSFTConfig, AlphaTokenDPOConfig])
def test_command_line_and_yaml(config, tmp_path):
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    _, args, _ = parser.parse_args_and_config([*common, "--num_layers", "2", "--rho", "0.3", "--fisher", "dense"])
    assert args.alphatoken_config == AlphaTokenConfig(num_layers=2, rho=0.3, fisher="dense")
    _, args, _ = parser.parse_args_and_config([*common, "--num_layers", "all", "--threshold_scope", "sequence"])
    assert args.alphatoken_config == AlphaTokenConfig(num_layers="all", threshold_scope="sequence")
    _, args, _ = parser.parse_args_and_config(common)
    assert args.alphatoken_config == AlphaTokenConfig()
    file = tmp_path / "run.yaml"
    file.write_text("num_layers: 1\nstability_weight: 0.5\ntarget_size: 7\nload_in_4bit: true\nlearning_rate: 1e-3\n")
    _, args, model = TrlParser((ScriptArguments, config, ModelConfig)).parse_args_and_config(
        [*common, "--config", str(file), "--stability_weight", "2"]
    )
    assert args.alphatoken_config == AlphaTokenConfig(num_layers=1, stability_weight=2.0)
    assert args.target_size == 7 and model.load_in_4bit and args.learning_rate == 1e-3
    saved = json.loads(args.to_json_string())
    assert saved["num_layers"] == 1 and saved["rho"] == 0.5
    assert "lambda of Eq. 12" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"rho": 0.0}, "rho is 0.0"),
    ({"num_layers": "some"}, "num_layers is 'some'"),
    ({"target_size": 0}, "target_size is 0"),
    ({"target_batch_size": 0}, "target_batch_size is 0"),
    ({"fisher_prompts": 0}, "fisher_prompts is 0"),
])  # fmt: skip
def test_wrong_settings_are_refused_with_the_arguments(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments("sft", tmp_path, **wrong)


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("kind", "case", "error_type", "message"), [
    ("sft", feature(options=lambda: {"target_dataset": None, "stream": True}), ValueError, "a stream.*target_dataset"),
    ("dpo", feature(options=lambda: {"target_dataset": None, "stream": True}), ValueError, "a stream.*target_dataset"),
    ("sft", feature(options=lambda: {"target_dataset": None}, target_size=12), ValueError, "leaves none to train on"),
    ("sft", feature(options=lambda: {"target_dataset": sft_data().to_iterable_dataset()}), TypeError, "a datasets"),
    ("sft", feature(model=tuning.partly_trained, peft=None), ValueError, "no ref_model"),
    ("dpo", feature(model=tuning.partly_trained, peft=None, precompute_ref_log_probs=True), ValueError, "no ref_model"),
    ("sft", feature(peft=None, options=lambda: {"ref_model": base()}), ValueError, "behind the last block|lies behind"),
    ("sft", feature(peft=lambda: lora(use_dora=True)), ValueError, "DoraLinearVariant.*Use plain LoRA"),
    ("sft", feature(torch_compile=True), ValueError, "torch_compile=True.*rho=1.0"),
    ("dpo", feature(loss_type=["robust"], label_smoothing=0.5), ValueError, r"label_smoothing is 0.5;.*in \[0, 0.5\)"),
    ("sft", feature(options=lambda: {"fisher": "nowhere"}), FileNotFoundError, "No Fisher at nowhere"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_errors_come_with_the_trainer_and_say_what_to_do(kind, case, error_type, message, tmp_path):
    with pytest.raises(error_type, match=message):
        make(kind, tuning.TRAINERS[kind][0], case, tmp_path)


def test_adams_step_is_refused_under_deepspeed(tmp_path):
    trainer = make("sft", tuning.TRAINERS["sft"][0], feature(precondition=True), tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"precondition=True reads.*DeepSpeed.*Set precondition=False"):
        refuse_what_is_not_modelled(trainer)


@pytest.mark.filterwarnings("ignore")
def test_arguments_of_trl_alone_are_refused_and_none_means_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = {
        "train_dataset": sft_data(),
        "processing_class": tokenizer(),
        "peft_config": lora(),
        "target_dataset": sft_data(),
    }
    with pytest.raises(TypeError, match=r"args is a SFTConfig.*AlphaTokenSFTConfig"):
        tuning.TRAINERS["sft"][0](base(), args=SFTConfig(output_dir=".", use_cpu=True, bf16=False), **common)
    words = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 40
    trainer = PlainTrainer(get_peft_model(base(), lora()), train_dataset=words)
    assert trainer.alphatoken.config == AlphaTokenConfig() and len(trainer.train_dataset) == 8


@pytest.mark.parametrize("how", ["fsdp", "zero3"])
@pytest.mark.filterwarnings("ignore")
def test_sharded_training_is_refused(how, tmp_path):
    """Where accelerate says that parameters are sharded."""

    class Sharded(tuning.TRAINERS["sft"][1]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_fsdp_enabled, self.is_deepspeed_enabled = how == "fsdp", how == "zero3"
            state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
            self.accelerator = SimpleNamespace(state=state, parallelism_config=None)

    class Ours(AlphaTokenMixin, Sharded):
        pass

    with pytest.raises(ValueError, match=("FSDP" if how == "fsdp" else "DeepSpeed ZeRO-3") + ".*rho=1.0"):
        make("sft", Ours, feature(), tmp_path)
    assert make("sft", Ours, feature(rho=1.0), tmp_path, ours=False).alphatoken is None


def test_importing_the_package_does_not_import_trl():
    code = "import alphatoken_loss, sys; assert not {'trl', 'bitsandbytes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "AlphaTokenSFTTrainer" in dir(alphatoken_loss)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = alphatoken_loss.Nothing
