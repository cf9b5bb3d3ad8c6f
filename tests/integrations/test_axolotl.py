"""The plugin in the real Axolotl, on a tiny model and a CPU; `make test-tools` runs this where Axolotl is installed."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
pytest.importorskip("axolotl", reason="Axolotl is not installed here; `make test-tools` makes an environment for it")

import tiny
import torch
import yaml
from steps import check_step, record

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


BEST = {"estimator": "path", "path_start": True, "path_kl": 0.6}  # AlphaTokenConfig.best()
BEST_PAIRS = {**BEST, "threshold": "zero", "threshold_scope": "pair", "path_from": "reference"}
PACKING = {"sample_packing": True, "sdp_attention": True}


def train_with_values(files, output, monkeypatch, look, *, kind="sft", own=None, **changes):
    """Train with the plugin; `look` sees the trainer, the model and the inputs behind each micro-batch."""
    step = AlphaTokenMixin.training_step

    def recording(self, model, inputs, *args, **kwargs):
        before = {name: t.clone() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
        loss = step(self, model, inputs, *args, **kwargs)
        look(self, model, before)
        return loss

    monkeypatch.setattr(AlphaTokenMixin, "training_step", recording)
    if own is not None:
        changes["alphatoken"] = {"target": str(files / "target.jsonl"), "fisher_prompts": 4, "fisher_new_tokens": 4,
                                 **own}  # fmt: skip
    trainer = run(configuration(files, output, kind, **changes))
    assert type(trainer).__name__ == ("AlphaTokenAxolotlDPOTrainer" if kind == "dpo" else "AlphaTokenAxolotlTrainer")
    assert any(output.glob("adapter_model*"))
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("kind", "own", "changes", "step"),
    [
        ("sft", {"num_layers": 2}, {}, 0),
        ("sft", {"num_layers": 2}, PACKING, 0),
        ("dpo", {"num_layers": 2}, {}, 0),
        ("sft", {"estimator": "path"}, PACKING, 0),
        ("dpo", {"estimator": "path"}, {}, 0),
        ("sft", BEST, {}, 1),  # begun at theta*, all is worth nothing at the first step, and all is kept
    ],
    ids=["sft", "sft packed", "dpo", "sft packed, path", "dpo, path", "sft, best()"],
)
def test_a_step_has_the_gradient_of_the_masked_loss(files, tmp_path, monkeypatch, kind, own, changes, step):
    seen = {}
    logs = train_with_values(
        files, tmp_path, monkeypatch, lambda *given: record(seen, *given, step=step), kind=kind, own=own, **changes
    )
    assert len(logs) == 3 and all(0.4 < log["alphatoken/kept"] < 0.65 for log in logs[step:])
    check_step(seen, pairs=kind == "dpo")


def test_best_for_pairs_keeps_them_whole(files, tmp_path, monkeypatch):
    kept = []

    def look(trainer, model, inputs):
        answers, weights = inputs["completion_mask"] != 0, trainer.alphatoken.weights
        answers[:, 0] = False
        assert torch.equal(weights, answers * weights.amax(1, keepdim=True))
        assert torch.equal(*weights.amax(1).chunk(2)), "a pair is kept or dropped in both branches"
        kept.extend(weights.amax(1).chunk(2)[0].tolist())

    train_with_values(files, tmp_path, monkeypatch, look, kind="dpo", own=BEST_PAIRS)
    assert len(kept) == 12 and set(kept) == {0, 1}


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
    ids=["a key that is none", "a share over 1", "LoRA kernels", "KTO"],
)
def test_what_does_not_fit_is_refused(files, tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        if changes == {"rl": "kto"}:
            from axolotl.utils.dict import DictDefault

            from alphatoken_loss.integrations.axolotl import AlphaTokenPlugin

            AlphaTokenPlugin().get_trainer_cls(DictDefault({**changes, "alphatoken": {}, "adapter": "lora"}))
        run(configuration(files, tmp_path / "out", **changes))


@pytest.fixture(scope="module")
def scored(files):
    """An output of `alphatoken score`."""
    from alphatoken_loss.__main__ import main

    tiny.sft_data(count=24).to_json(files / "rows.jsonl")
    argv = ["score", "--model", files / "model", "--dataset", files / "rows.jsonl", "--target",
            files / "target.jsonl", "--output", files / "scored", "--num-layers", "2"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return files / "scored"


def train_on(scored, files, output, monkeypatch, **changes):
    """One epoch of plain Axolotl on a scored folder, as any of its users trains on it.

    Returns:
        The trainer, and the rows that its steps were given, in their order.
    """
    from transformers import Trainer

    fed, step = [], Trainer.training_step

    def recording(self, model, inputs, *args, **kwargs):
        fed.extend(rows_of(inputs))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", recording)
    changes = {"datasets": [{"path": str(scored / "train"), "ds_type": "arrow", "type": None}], **PLAIN,
               "max_steps": None, "gradient_accumulation_steps": 1, **changes}  # fmt: skip
    return run(configuration(files, output, **changes)), fed


def rows_of(batch):
    """The rows that a batch was made of, as tokens and labels: a packed one begins where positions begin anew."""
    found = []
    for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        starts = (batch["position_ids"][number] == 0).nonzero().flatten().tolist() if "position_ids" in batch else [0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            real = ids[start:stop] != 0  # <pad>
            assert (labels[start:stop][~real] == -100).all()
            if real.any():
                found.append((ids[start:stop][real].tolist(), labels[start:stop][real].tolist()))
    return found


def written(scored):
    from datasets import load_from_disk

    rows = load_from_disk(scored)["train"]
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


@pytest.mark.parametrize("sequence_len", [128, 16], ids=["all rows fit", "some are too long"])
def test_labels_of_a_scored_folder_arrive_whole(scored, files, tmp_path, monkeypatch, sequence_len):
    """Of rows that fit: Axolotl drops longer ones whole, and says so, unless `excess_length_strategy` is another."""
    _, fed = train_on(scored, files, tmp_path / "out", monkeypatch, sequence_len=sequence_len)
    expected = [row for row in written(scored) if len(row[0]) <= sequence_len]
    assert len(expected) == 24 if sequence_len == 128 else 0 < len(expected) < 24
    assert sorted(fed) == sorted(expected)


@pytest.mark.parametrize("micro_batch_size", [1, 2], ids=["none with one pack a batch", "one with two"])
def test_packs_that_fill_no_micro_batch_are_left_out(scored, files, tmp_path, monkeypatch, micro_batch_size):
    """By Axolotl, with the last rows of an epoch; packed in order, each pack closes where the next row does not fit."""
    packing = {**PACKING, "sample_packing_sequentially": True, "curriculum_sampling": True, "sequence_len": 96,
               "micro_batch_size": micro_batch_size}  # fmt: skip
    _, fed = train_on(scored, files, tmp_path / "out", monkeypatch, **packing)
    packs = [[]]
    for row in written(scored):
        if sum(len(ids) for ids, _ in packs[-1]) + len(row[0]) > 96:
            packs.append([])
        packs[-1].append(row)
    assert len(packs) % 2, "one pack is over where two are taken together"
    whole = len(packs) // micro_batch_size * micro_batch_size
    assert fed == [row for pack in packs[:whole] for row in pack]


def test_shuffled_packs_carry_our_labels(scored, files, tmp_path, monkeypatch):
    """Axolotl counts the steps of an epoch on another shuffle, whose packs may be fewer: it ends there."""
    from axolotl.utils.samplers.multipack import MultipackBatchSampler

    epoch, batches = [], MultipackBatchSampler.__iter__
    monkeypatch.setattr(
        MultipackBatchSampler, "__iter__", lambda self: iter(epoch.append(list(batches(self))) or epoch[-1])
    )
    trainer, fed = train_on(scored, files, tmp_path / "out", monkeypatch, **PACKING)
    taken, steps = trainer.train_dataset, trainer.state.global_step
    rows = list(zip(taken["input_ids"], taken["labels"], strict=True))
    assert sorted(rows) == sorted(written(scored))
    assert fed == [rows[i] for batch in epoch[-1][:steps] for pack in batch for i in pack] and fed
    assert steps == min(trainer.args.max_steps, len(epoch[-1]))
    assert len({tuple(ids) for ids, _ in fed}) == len(fed), "no row twice"
