"""The plugin in the real Axolotl, on a tiny model and a CPU; `make test-tools` runs this where Axolotl is installed."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
pytest.importorskip("axolotl", reason="Axolotl is not installed here; `make test-tools` makes an environment for it")

import tiny
import torch
import yaml
from steps import check_first_step, record

from alphatoken_loss.trl.mixin import AlphaTokenMixin

PLUGIN = "alphatoken_loss.integrations.axolotl.AlphaTokenPlugin"
PAIRS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "prompt_format": "{prompt}",
         "chosen_format": "{chosen}", "rejected_format": "{rejected}"}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    tiny.base().save_pretrained(folder / "model")
    tiny.tokenizer(chat=True).save_pretrained(folder / "model")
    tiny.sft_data("messages", 24).to_json(folder / "messages.jsonl")
    tiny.sft_data("chat", 8, 50).to_json(folder / "target.jsonl")
    tiny.dpo_data(count=24).to_json(folder / "pairs.jsonl")
    return folder


# Axolotl switches its kernels on by itself; they need CUDA.
PLAIN = {"alphatoken": None, **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
                                              "lora_embedding_kernel"), False)}  # fmt: skip


def configuration(files, output, kind="sft", **changes):
    data = {"path": str(files / "messages.jsonl"), "ds_type": "json", "type": "chat_template",
            "field_messages": "messages"}  # fmt: skip
    if kind == "dpo":
        data = {"path": str(files / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": PAIRS}
        changes = {"rl": "dpo", **changes}
    settings = {
        "base_model": str(files / "model"), "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
        "lora_target_linear": True, "datasets": [data], "plugins": [PLUGIN], "sequence_len": 128,
        "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1, "num_epochs": 1,
        "learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "constant", "bf16": False, "fp16": False,
        "tf32": False, "special_tokens": {"pad_token": "<pad>"}, "save_strategy": "no", "output_dir": str(output),
        "dataset_prepared_path": str(output / "prepared"),
        "alphatoken": {"target": str(files / "target.jsonl"), "num_layers": 2, "fisher_prompts": 4,
                       "fisher_new_tokens": 4},
    }  # fmt: skip
    output.mkdir(exist_ok=True)
    (output / "config.yml").write_text(yaml.safe_dump({**settings, **changes}))
    return output / "config.yml"


def run(path):
    """What `axolotl train` does: the trainer, after training."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train

    cfg = load_cfg(str(path))
    load = load_preference_datasets if cfg.rl else load_datasets
    return train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))[2]


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo"])
def test_the_first_step_has_the_gradient_of_the_masked_loss(files, tmp_path, monkeypatch, kind):
    seen, step = {}, AlphaTokenMixin.training_step

    def recording(self, model, inputs, *args, **kwargs):
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        loss = step(self, model, inputs, *args, **kwargs)
        record(seen, self, model, before)
        return loss

    monkeypatch.setattr(AlphaTokenMixin, "training_step", recording)
    changes = {"sample_packing": True, "sdp_attention": True} if kind == "packed" else {}
    trainer = run(configuration(files, tmp_path / "out", "dpo" if kind == "dpo" else "sft", **changes))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 3 and all(0.4 < log["alphatoken/kept"] < 0.65 for log in logs)
    assert type(trainer).__name__ == ("AlphaTokenAxolotlDPOTrainer" if kind == "dpo" else "AlphaTokenAxolotlTrainer")
    assert any((tmp_path / "out").glob("adapter_model*"))
    check_first_step(seen, pairs=kind == "dpo")


def test_without_the_key_axolotl_trains_as_ever(files, tmp_path):
    trainer = run(configuration(files, tmp_path / "out", **PLAIN))
    assert not isinstance(trainer, AlphaTokenMixin)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphatoken": {"rhoo": 0.5}}, "alphatoken: rhoo is no setting of token values"),
        ({"alphatoken": {"rho": 1.5}}, "rho is 1.5"),
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel: Axolotl's LoRA kernels pass by"),
        ({"rl": "kto"}, "token values train SFT, rl: dpo and rl: ipo"),
    ],
)
def test_what_does_not_fit_is_refused(files, tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        if changes == {"rl": "kto"}:
            from axolotl.utils.dict import DictDefault

            from alphatoken_loss.integrations.axolotl import AlphaTokenPlugin

            AlphaTokenPlugin().get_trainer_cls(DictDefault({**changes, "alphatoken": {}, "adapter": "lora"}))
        run(configuration(files, tmp_path / "out", **changes))


@pytest.mark.parametrize("packing", [False, True])
def test_labels_of_a_scored_folder_arrive_whole(files, tmp_path, monkeypatch, packing):
    """Plain Axolotl on the output of `alphatoken score`, as any of its users trains on it."""
    from transformers import Trainer

    from alphatoken_loss.__main__ import main

    tiny.sft_data(count=24).to_json(tmp_path / "rows.jsonl")
    argv = ["score", "--model", files / "model", "--dataset", tmp_path / "rows.jsonl", "--target",
            files / "target.jsonl", "--output", tmp_path / "scored", "--num-layers", "2"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    labels, step = [], Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        labels.extend(inputs["labels"][inputs["labels"] != -100].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", recording)
    changes = {"datasets": [{"path": str(tmp_path / "scored" / "train"), "ds_type": "arrow", "type": None}],
               **PLAIN, "max_steps": None, "sample_packing": packing,
               "sdp_attention": packing, "gradient_accumulation_steps": 1}  # fmt: skip
    run(configuration(files, tmp_path / "out", **changes))
    from datasets import load_from_disk

    rows = load_from_disk(tmp_path / "scored")["train"]["labels"]
    assert sorted(labels) == sorted(label for row in rows for label in row if label != -100)
