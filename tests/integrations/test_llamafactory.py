"""The recipe in the real LLaMA-Factory, on a tiny model and a CPU; `make test-tools` runs this where it can be."""

from __future__ import annotations

import json
import os

import pytest

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # LLaMA-Factory's, of packages that text on a CPU does not need
pytest.importorskip(
    "llamafactory", reason="LLaMA-Factory is not installed here; `make test-tools` makes an environment for it"
)

import tiny
import torch
import with_llamafactory as recipe
import yaml
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp
from steps import check_step, record
from transformers import Trainer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    tiny.base().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.sft_data(count=24).to_json(folder / "rows.jsonl")
    tiny.dpo_data(count=24).to_json(folder / "pairs.jsonl")
    columns = {"prompt": "prompt", "response": "completion"}
    about = {
        "sft": {"file_name": "rows.jsonl", "columns": columns},
        "dpo": {"file_name": "pairs.jsonl", "ranking": True,
                "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(about))
    return folder


def settings(files, output, stage, **changes):
    defaults = {
        "model_name_or_path": str(files / "model"), "stage": stage, "do_train": True, "finetuning_type": "lora",
        "lora_rank": 4, "lora_target": "all", "dataset": stage, "dataset_dir": str(files), "template": "default",
        "cutoff_len": 128, "output_dir": str(output), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    return {**defaults, **changes}


BEST = {"estimator": "path", "path_start": True, "path_kl": 0.6}  # AlphaTokenConfig.best()
BEST_PAIRS = {**BEST, "threshold": "zero", "threshold_scope": "pair", "path_from": "reference"}


@pytest.mark.parametrize(
    ("stage", "own", "step"),
    [
        ("sft", {"num_layers": 2}, 0),
        ("dpo", {"num_layers": 2}, 0),
        ("sft", {"estimator": "path"}, 0),
        ("dpo", {"estimator": "path"}, 0),
        ("sft", BEST, 1),  # begun at theta*, all is worth nothing at the first step, and all is kept
    ],
    ids=["sft", "dpo", "sft, path", "dpo, path", "sft, best()"],
)
def test_a_step_has_the_gradient_of_the_masked_loss(files, tmp_path, monkeypatch, capsys, stage, own, step):
    """With gradient checkpointing, which LLaMA-Factory switches on, and not reentrant, which the recipe sees to."""
    seen = {}
    run(files, tmp_path, monkeypatch, stage, own, lambda *given: record(seen, *given, step=step))
    assert capsys.readouterr().out.count("'alphatoken/kept': 0.5") >= 2
    check_step(seen, pairs=stage == "dpo")


def test_best_for_pairs_keeps_them_whole(files, tmp_path, monkeypatch):
    kept = []

    def look(trainer, model, inputs):
        answers, weights = inputs["labels"] != -100, trainer.alphatoken.weights
        answers[:, 0] = False
        assert torch.equal(weights, answers * weights.amax(1, keepdim=True))
        assert torch.equal(*weights.amax(1).chunk(2)), "a pair is kept or dropped in both branches"
        kept.extend(weights.amax(1).chunk(2)[0].tolist())

    run(files, tmp_path, monkeypatch, "dpo", BEST_PAIRS, look)
    assert len(kept) == 12 and set(kept) == {0, 1}


def run(files, output, monkeypatch, stage, own, look):
    """Train by the recipe; `look` sees the trainer, the model and the inputs behind each micro-batch."""
    trainer = CustomDPOTrainer if stage == "dpo" else CustomSeq2SeqTrainer
    monkeypatch.setattr(trainer, "compute_loss", trainer.compute_loss)  # put back behind the test
    step = Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        loss = step(self, model, inputs, *args, **kwargs)
        if stage == "dpo":
            before["completion_mask"] = (before["labels"] != -100).long()
        look(self, model, before)
        return loss

    monkeypatch.setattr(Trainer, "training_step", recording)
    (output / "config.yaml").write_text(
        yaml.safe_dump(settings(files, output / "out", stage, alphatoken={"target_size": 6, **own}))
    )
    recipe.main([str(output / "config.yaml")])


def test_reentrant_checkpointing_is_refused(files, tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(settings(files, tmp_path / "out", "sft", use_reentrant_gc=True))
    )
    with pytest.raises(ValueError, match="use_reentrant_gc is true; token values need false"):
        recipe.main([str(tmp_path / "config.yaml")])


def test_labels_of_a_scored_folder_arrive_whole(files, tmp_path, monkeypatch):
    """Plain LLaMA-Factory on the output of `alphatoken score`: `tokenized_path`, and a `dataset` that goes unused."""
    from datasets import load_from_disk

    scored = os.environ.get("ALPHATOKEN_SCORED")
    if scored is None:
        pytest.skip("ALPHATOKEN_SCORED names no scored folder; `make test-tools` makes one with the main environment")
    labels, step = [], Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        labels.extend(inputs["labels"][inputs["labels"] != -100].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", recording)
    changes = {"tokenized_path": scored, "dataset": "unused", "max_steps": -1, "num_train_epochs": 1,
               "gradient_accumulation_steps": 1}  # fmt: skip
    run_exp(settings(files, tmp_path / "out", "sft", **changes))
    rows = load_from_disk(scored)["train"]["labels"]
    assert sorted(labels) == sorted(label for row in rows for label in row if label != -100)


def test_v1_weighs_tokens_by_a_scored_folder(files, tmp_path, monkeypatch):
    """Its own trainer with the recipe's two plugins: labels and weights arrive whole, and make the masked mean."""
    import with_llamafactory_v1
    from datasets import load_from_disk
    from llamafactory.v1.trainers.sft_trainer import SFTTrainer

    scored = os.environ.get("ALPHATOKEN_SCORED")
    if scored is None:
        pytest.skip("ALPHATOKEN_SCORED names no scored folder; `make test-tools` makes one with the main environment")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"scored": {"path": scored, "converter": "scored"}}))
    keys = {"model": str(files / "model"), "template": "scored", "train_dataset": str(tmp_path / "data.yaml"),
            "output_dir": str(tmp_path / "out"), "micro_batch_size": 2, "global_batch_size": 4, "cutoff_len": 128,
            "num_train_epochs": 1, "batching_workers": 0, "bf16": False,
            "peft_config": {"name": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
                            "target_modules": "all"}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(keys))
    fed, compute_loss = [], SFTTrainer.compute_loss

    def recording(self, batch):
        real = batch["attention_mask"].bool()
        assert torch.equal(batch["loss_weights"], (batch["labels"] != -100).float())
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], real, strict=True):
            fed.append((ids[mask].tolist(), labels[mask].tolist()))
        loss = compute_loss(self, batch)
        with torch.no_grad():
            own = self.model(input_ids=batch["input_ids"], attention_mask=real.long(), labels=batch["labels"]).loss
        assert abs(loss.item() - own.item()) < 1e-5
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", recording)
    monkeypatch.setattr("sys.argv", ["with_llamafactory_v1.py", str(tmp_path / "config.yaml")])
    with_llamafactory_v1.main()
    rows = load_from_disk(scored)["train"]
    assert sorted(fed) == sorted(zip(rows["input_ids"], rows["labels"], strict=True))
    assert any((tmp_path / "out").glob("adapter_model*"))
