"""The report of a run, from what a real training run leaves in its folder."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import batches
import pytest
import torch
import tuning
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from shown import Reader, tokenizer, values_of
from transformers import Trainer

from alphatoken_loss import AlphaTokenSFTConfig, SampleWriter
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.tools.arguments import add_command
from alphatoken_loss.tools.report import report as reporting
from alphatoken_loss.tools.report.report import write_report
from alphatoken_loss.tools.report.samples import FOLDER, read_log, read_samples
from alphatoken_loss.tools.show.charts import Line, chart

pytestmark = pytest.mark.filterwarnings("ignore")


class Valued:
    """What an AlphaToken knows of the batch it valued."""

    def __init__(self, batch: Any, seed: int = 0) -> None:
        self.weights, self.values = values_of(batch, seed)


def train(kind: str, folder: Any, **options: Any) -> Any:
    """Three steps with values on; the trainer also keeps its masks."""
    data = tuning.sft_data() if kind == "sft" else tuning.dpo_data()
    trainer = tuning.recording(tuning.TRAINERS[kind][0])(
        tuning.base(),
        args=tuning.arguments(kind, folder, **{"sample_every": 1, **options}),
        train_dataset=data,
        target_dataset=tuning.sft_data(count=4, first=50),
        processing_class=tuning.tokenizer(),
        peft_config=tuning.lora(),
    )
    trainer.train()
    return trainer


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), "report")
    return parser.parse_args(["report", *map(str, words)])


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    return folder, train("sft", folder, save_strategy="steps", save_steps=3)


def test_the_trainer_records_the_batches_it_trains_on(sft_run):
    folder, trainer = sft_run
    samples = list(read_samples(folder))
    assert [sample.step for sample in samples] == [0, 1, 2]
    for sample, mask in zip(samples, trainer.masks, strict=True):
        labels = sample.batch["labels"]
        assert torch.equal(sample.weights + (labels == -100), mask)
        assert torch.equal(labels[labels != -100], sample.batch["input_ids"][labels != -100])
        assert sample.values.direct_target is not None and bool((sample.values.total[labels != -100] != 0).any())
    log = read_log(folder / FOLDER / "metrics.jsonl")
    assert [(f["step"], f["loss"]) for f in log] == [(f["step"], f["loss"]) for f in trainer.state.log_history[:-1]]
    assert all("alphatoken/kept" in figures for figures in log)


def test_the_command_writes_one_page_with_everything(sft_run, capsys):
    folder, _ = sft_run
    args = parse(folder)
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert printed == f"Report written to {folder / reporting.REPORT_FILE}\n"
    made = (folder / reporting.REPORT_FILE).read_text()
    found = Reader(made)
    assert not found.stack
    assert "http" not in made and "src=" not in made and "@import" not in made and "link" not in found.tags
    for words in ("training loss", "share kept", "mean direct target", "age of the target", "seconds spent valuing"):
        assert f'aria-label="{words}' in made
    for words in ("Distribution of the terms", "place in the answer", "Kept most", "Dropped most", "Sequences"):
        assert words in made
    first = next(iter(read_samples(folder)))
    texts = [tuning.tokenizer().decode(row[mask.bool()]) for row, mask in zip(*rows_and_masks(first), strict=True)]
    assert found.texts[: len(texts)] == texts
    assert made.count("a band") == 2 * 7  # of each term that a training step has


def rows_and_masks(sample: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return sample.batch["input_ids"], sample.batch["attention_mask"]


def test_shares_are_those_of_the_masks(sft_run):
    """Counted again from the trainer's masks: per token, and over the places in the answer."""
    folder, trainer = sft_run
    tokens = [token for sample in read_samples(folder) for token in reporting._tokens(sample)]
    labels = [sample.batch["labels"] for sample in read_samples(folder)]
    seen: dict[int, list[float]] = {}
    for label, mask in zip(labels, trainer.masks, strict=True):
        for number, kept in zip(label[label != -100].tolist(), mask[label != -100].tolist(), strict=True):
            seen.setdefault(number, []).append(kept)
    assert len(tokens) == sum(map(len, seen.values()))
    for number, marks in seen.items():
        assert sum(t.kept for t in tokens if t.id == number) == sum(marks)
    first_row = labels[0][0]
    count = int((first_row != -100).sum())
    assert [t.place for t in tokens[:count]] == [(i + 0.5) / count for i in range(count)]
    assert [t.kept for t in tokens[:count]] == trainer.masks[0][0][first_row != -100].bool().tolist()


def test_pairs_and_a_run_without_checkpoints(tmp_path, capsys):
    train("dpo", tmp_path, max_steps=2)
    args = parse(tmp_path, "--rows", "2", "--out", tmp_path / "else.html")
    assert args.run(args) == 0
    made = (tmp_path / "else.html").read_text()
    assert "Missing: text: no tokenizer is in the folder" in capsys.readouterr().out
    assert 'class="group pair"' in made and ">chosen</text>" in made and ">rejected</text>" in made
    assert made.count('class="group pair"') == 2 and "⟨" in Reader(made).texts[0]
    write_report(tmp_path, tokenizer=tuning.tokenizer())
    made = (tmp_path / reporting.REPORT_FILE).read_text()
    assert "Missing" not in made and "times" in Reader(made).texts[0]


def test_nothing_is_recorded_where_nothing_is_valued_or_asked_for(tmp_path):
    train_plain = tuning.TRAINERS["sft"][0](
        tuning.base(),
        args=tuning.arguments("sft", tmp_path / "plain", rho=1.0, sample_every=1),
        train_dataset=tuning.sft_data(),
        processing_class=tuning.tokenizer(),
        peft_config=tuning.lora(),
    )
    train_plain.train()
    train("sft", tmp_path / "off", sample_every=0, max_steps=1)
    assert not (tmp_path / "plain" / FOLDER).exists() and not (tmp_path / "off" / FOLDER).exists()
    with pytest.raises(ValueError, match="sample_every is -1"):
        AlphaTokenSFTConfig(output_dir=str(tmp_path), sample_every=-1, use_cpu=True, bf16=False)


def test_accumulation_records_the_first_batch_of_a_step_and_a_resumed_run_goes_on(tmp_path):
    run = train("sft", tmp_path, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    before = {sample.step: sample for sample in read_samples(tmp_path)}
    assert list(before) == [0, 1, 2] and len(run.masks) == 6
    for sample, mask in zip(before.values(), run.masks[::2], strict=True):
        assert torch.equal(sample.weights + (sample.batch["labels"] == -100), mask)
    again = tuning.TRAINERS["sft"][0](
        tuning.base(),
        args=tuning.arguments("sft", tmp_path, gradient_accumulation_steps=2, sample_every=1),
        train_dataset=tuning.sft_data(),
        target_dataset=tuning.sft_data(count=4, first=50),
        processing_class=tuning.tokenizer(),
        peft_config=tuning.lora(),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = {sample.step: sample for sample in read_samples(tmp_path)}
    assert list(after) == [0, 1, 2]
    assert all(torch.equal(before[step].weights, after[step].weights) for step in before)
    assert [f["step"] for f in read_log(tmp_path / FOLDER / "metrics.jsonl")] == [1, 2, 3]


def test_pushing_to_the_hub_leaves_out_what_holds_training_data():
    """With the patterns that the trainer gives to the hub's own filter."""
    (patterns,) = re.findall(r"ignore_patterns=(\[.*\])", inspect.getsource(Trainer.push_to_hub))
    ignored = eval(patterns, {"PREFIX_CHECKPOINT_DIR": "checkpoint"})
    names = [f"{FOLDER}/step-000000000.safetensors", f"{FOLDER}/metrics.jsonl", reporting.REPORT_FILE, "README.md"]
    assert list(filter_repo_objects(names, ignore_patterns=ignored)) == ["README.md"]


def test_weights_between_0_and_1_stay_what_they_are(tmp_path):
    batch = batches.sft_batch()
    valued = Valued(batch)
    valued.weights = valued.weights * torch.linspace(0.1, 0.9, valued.weights.numel()).view_as(valued.weights)
    assert SampleWriter(tmp_path).add(0, batch, valued)
    (sample,) = read_samples(tmp_path)
    assert torch.equal(sample.weights, valued.weights) and bool((sample.weights > 0).any())


@pytest.mark.parametrize("kind", ["right", "left", "packed", "ragged", "stacked", "stacked_left", "separate"])
def test_samples_of_every_form_come_back(tmp_path, kind):
    batch = batches.pair_batch(kind) if kind.startswith(("stacked", "sep")) else batches.sft_batch(kind)
    valued = Valued(batch)
    assert SampleWriter(tmp_path, rows=4).add(0, batch, valued)
    (sample,) = read_samples(tmp_path)
    read, whole = read_batch(sample.batch), read_batch(batch)
    take = torch.tensor([0, 1, 3, 4]) if whole.pairs else torch.arange(min(4, whole.shape[0]))
    assert read.pairs == whole.pairs and read.packed == whole.packed
    assert torch.equal(read.labels, whole.labels[take]) and torch.equal(sample.weights, valued.weights[take])
    assert torch.equal(sample.values.causal_drift, valued.values.causal_drift[take])
    assert torch.equal(read.segments, whole.segments[: len(take)])
    with safe_open(next((tmp_path / FOLDER).glob("*.safetensors")), framework="pt") as file:
        assert file.metadata()["step"] == "0"


def test_the_record_stays_small_and_covers_the_run(tmp_path):
    batch = batches.sft_batch()
    writer = SampleWriter(tmp_path, every=2, limit=5)
    for step in range(100):
        writer.add(step, batch, Valued(batch))
    steps = [sample.step for sample in read_samples(tmp_path)]
    assert steps == [0, 32, 64, 96]
    assert not [name for name in os.listdir(tmp_path / FOLDER) if not name.startswith("step-")]
    SampleWriter(tmp_path, every=2, limit=5, step=64)
    assert [sample.step for sample in read_samples(tmp_path)] == [0, 32]
    SampleWriter(tmp_path)
    assert not list(read_samples(tmp_path))
    for name in ("every", "limit", "rows"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            SampleWriter(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match=r"shape .3, 11.,? and this one has .2, 9."):
        SampleWriter(tmp_path).add(0, batches.sft_batch("full"), Valued(batch))


def test_a_loop_of_ones_own(tmp_path):
    batch, writer = batches.sft_batch(), SampleWriter(tmp_path, every=1)
    for step in range(3):
        writer.add(step, batch, Valued(batch, step))
        writer.log(step, {"loss": 2.0 - step, "alphatoken/kept": 0.5, "note": "not a number"})
    _, missing = write_report(tmp_path, tokenizer=tokenizer())
    made = (tmp_path / reporting.REPORT_FILE).read_text()
    assert not missing and "training loss" in made and "note" not in made


def test_what_is_missing_is_said(tmp_path, sft_run):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="rows is -1"):
        write_report(tmp_path, rows=-1)
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    state = (sft_run[0] / "checkpoint-3" / "trainer_state.json").read_text()
    (checkpoint / "trainer_state.json").write_text(state)
    _, (words,) = write_report(tmp_path)
    assert words.startswith("values, positions, tokens and sequences: no samples")
    made = (tmp_path / reporting.REPORT_FILE).read_text()
    assert "Missing: values" in made and "training loss" in made
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 1.0, "step": 1}]}))
    assert "no alphatoken/ figures" in write_report(tmp_path)[1][0]
    (checkpoint / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state.json is not valid JSON"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="No tokenizer can be loaded from"):
        write_report(sft_run[0], tokenizer=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cannot be written there"):
        write_report(sft_run[0], out=tmp_path / "no" / "report.html")


def test_samples_alone_make_a_report(tmp_path):
    batch = batches.sft_batch()
    SampleWriter(tmp_path).add(0, batch, Valued(batch))
    path, missing = write_report(tmp_path)
    assert [words.split(":")[0] for words in missing] == ["curves", "text"]
    assert isinstance(path, Path) and path.is_file()


def test_token_texts_in_tables_are_escaped(tmp_path):
    class Evil:
        pad_token_id = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(f"<script>{i}</script>\0\n" for i in ids)

    batch = batches.sft_batch()
    SampleWriter(tmp_path).add(0, batch, Valued(batch))
    write_report(tmp_path, tokenizer=Evil())
    made = (tmp_path / reporting.REPORT_FILE).read_text()
    assert Reader(made).tags.count("script") == 1 and "\0" not in made


def test_charts_of_hard_figures():
    inf = float("inf")
    for y in ([], [1.0], [0.0, 0.0], [1e-12, 2e-12], [-1e30, 1e30], [float("nan"), 1.0, inf], [inf], [5.0, 5.0]):
        made = chart("<t>", list(range(len(y))), [Line(y, "n")], x_name="&")
        assert "nan" not in made and "inf" not in made and "&lt;t&gt;" in made
    made = chart("t", [0, 10], [Line([0.0, 1.0])], x_name="x")
    assert 'points="58.0,176.0 350.0,28.0"' in made


def test_rare_tokens_do_not_lead():
    assert reporting._at_least(1, 1) < reporting._at_least(9, 10) < reporting._at_least(90, 100) < 0.9
    assert reporting._at_least(0, 5) == pytest.approx(0, abs=1e-12)
