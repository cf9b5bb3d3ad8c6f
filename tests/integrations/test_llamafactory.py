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
from steps import check_first_step, record
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


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_first_step_has_the_gradient_of_the_masked_loss(files, tmp_path, monkeypatch, capsys, stage):
    """With gradient checkpointing, which LLaMA-Factory switches on, and not reentrant, which the recipe sees to."""
    trainer = CustomDPOTrainer if stage == "dpo" else CustomSeq2SeqTrainer
    monkeypatch.setattr(trainer, "compute_loss", trainer.compute_loss)  # put back behind the test
    seen, step = {}, Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        loss = step(self, model, inputs, *args, **kwargs)
        if stage == "dpo":
            before["completion_mask"] = (before["labels"] != -100).long()
        record(seen, self, model, before)
        return loss

    monkeypatch.setattr(Trainer, "training_step", recording)
    own = {"num_layers": 2, "target_size": 6}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(settings(files, tmp_path / "out", stage, alphatoken=own, report_to="none"))
    )
    recipe.main([str(tmp_path / "config.yaml")])
    assert capsys.readouterr().out.count("'alphatoken/kept': 0.5") >= 2
    check_first_step(seen, pairs=stage == "dpo")


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
