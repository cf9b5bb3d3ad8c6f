"""A scored folder in stock TRL: what packing, padding-free batches and a maximal length make of its labels."""

from __future__ import annotations

import itertools

import pytest
import torch
import tuning
from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from alphatoken_loss.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, of attention on a CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with an adapter, and rows scored with it."""
    folder = tmp_path_factory.mktemp("scored")
    tuning.base().save_pretrained(folder / "model")
    tuning.tokenizer(chat=True).save_pretrained(folder / "model")
    tuning.with_adapter().save_pretrained(folder / "adapter")
    tuning.sft_data(count=11).to_json(folder / "rows.jsonl")
    tuning.sft_data("chat", 4, 50).to_json(folder / "target.jsonl")
    argv = ["score", "--model", folder / "model", "--adapter", folder / "adapter", "--dataset", folder / "rows.jsonl",
            "--target", folder / "target.jsonl", "--output", folder / "scored", "--num-layers", "2", "--device", "cpu",
            "--fisher-prompts", "2", "--fisher-new-tokens", "2"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    return folder


def rows_of(folder):
    rows = load_from_disk(folder / "scored")["train"]
    return list(zip(rows["input_ids"], rows["labels"], strict=True))


def model_of(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    return PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()


def train(folder, output, **settings):
    """One epoch of stock TRL, without a step: the batches' rows in their order, and the logged losses."""
    args = SFTConfig(
        output_dir=str(output), use_cpu=True, bf16=False, num_train_epochs=1, logging_steps=1, report_to="none",
        save_strategy="no", per_device_train_batch_size=3, learning_rate=0.0, disable_tqdm=True, **settings,
    )  # fmt: skip
    batches = []

    class Keeping(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append(split(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

    data = load_from_disk(folder / "scored")["train"]
    trainer = Keeping(model_of(folder), args=args, train_dataset=data, processing_class=tuning.tokenizer())
    trainer.train()
    return batches, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def split(batch):
    """The rows that a batch was made of, as tokens and labels."""
    found = []
    for number, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        flat = "attention_mask" not in batch  # rows follow each other, and positions begin anew
        starts = (batch["position_ids"][number] == 0).nonzero().flatten().tolist() if flat else [0]
        for start, stop in itertools.pairwise([*starts, len(ids)]):
            real = ids[start:stop] != 0  # <pad>
            if real.any():
                found.append((ids[start:stop][real].tolist(), labels[start:stop][real].tolist()))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": None},
        {"max_length": None, "padding_free": True},
        {"max_length": 64, "packing": True, "packing_strategy": "bfd"},
    ],
    ids=["padded", "padding-free", "packed"],
)
def test_labels_arrive_whole_and_make_the_masked_loss(folder, tmp_path, settings):
    batches, losses = train(folder, tmp_path, **settings)
    assert sorted(itertools.chain(*batches)) == sorted(rows_of(folder))
    model = model_of(folder)
    for batch, loss in zip(batches, losses, strict=True):
        total, count = 0.0, 0
        for ids, labels in batch:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            kept = [i for i, label in enumerate(labels) if label != -100]
            total -= float(sum(logps[i - 1, ids[i]] for i in kept))
            count += len(kept)
        assert loss == pytest.approx(total / count, rel=1e-4)


def test_a_maximal_length_cuts_labels_away(folder, tmp_path):
    """Without a word: the end of a row is its answer."""
    batches, _ = train(folder, tmp_path, max_length=14)
    rows = rows_of(folder)
    assert sorted(itertools.chain(*batches)) == sorted((ids[:14], labels[:14]) for ids, labels in rows)
    before, behind = (sum(label != -100 for _, labels in rows for label in labels[part])
                      for part in (slice(14), slice(14, None)))  # fmt: skip
    assert before and behind


def test_padding_free_batches_need_no_maximal_length(folder, tmp_path):
    with pytest.raises(ValueError, match="max_length=None"):
        train(folder, tmp_path, padding_free=True)
