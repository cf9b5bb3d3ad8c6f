"""`alphatoken score` and `reselect`: values against single rows, resuming, formats, and stock TRL on its output."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import tuning
from checks import error
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

from alphatoken_loss import AlphaTokenConfig, Fisher, alphatoken_weights, estimate_fisher, target_gradient
from alphatoken_loss import Path as ThetaStar
from alphatoken_loss.__main__ import main
from alphatoken_loss.tools.cli import UserError
from alphatoken_loss.tools.score import parts
from alphatoken_loss.tools.score import scorer as scoring
from alphatoken_loss.tools.score.reselect import reselect
from alphatoken_loss.tools.score.rows import Tokens

CONFIG = AlphaTokenConfig(num_layers=2)
PAIR_COLUMNS = [f"{b}_{c}" for b in ("chosen", "rejected") for c in ("input_ids", "attention_mask", "labels")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, an adapter, a Fisher, and data in every form."""
    folder = tmp_path_factory.mktemp("score")
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    tuning.base().save_pretrained(folder / "model")
    tuning.tokenizer(chat=True).save_pretrained(folder / "model")
    tuning.with_adapter().save_pretrained(folder / "adapter")
    tuning.sft_data(count=11).to_json(folder / "rows.jsonl")
    tuning.sft_data("chat", 4, 50).to_json(folder / "target.jsonl")
    tuning.dpo_data(count=7).to_parquet(folder / "pairs.parquet")
    fisher = estimate_fisher(model_of(folder), [[5, 6], [7]], config=CONFIG, max_new_tokens=4, progress=False)
    fisher.save(folder / "fisher.safetensors")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


def model_of(folder, adapter="adapter"):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    return PeftModel.from_pretrained(base, folder / adapter, is_trainable=True).train()


def arguments(files, output, *, dataset="rows.jsonl", **changes):
    """Of the command; None leaves one out."""
    options = {
        "model": files / "model", "adapter": files / "adapter", "dataset": files / dataset,
        "target": files / "target.jsonl", "output": output, "fisher": files / "fisher.safetensors",
        "num_layers": 2, "rows_per_part": 4, "device": "cpu",
    }  # fmt: skip
    argv = ["score"]
    for name, value in (options | changes).items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


def scored(folder):
    """Rows of an output with all their columns."""
    return [row for part in sorted((folder / "scored").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def encode(prompt, completion):
    """A prompt-completion row by hand: bytes, then the end token."""
    tokenizer = tuning.tokenizer()
    prompt, answer = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def target_of(folder, model):
    target = []
    for row in tuning.rows(4, 50):
        ids, labels = encode(f"user: {row['prompt']}\nassistant: ", row["completion"])
        target.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return target_gradient(model, target, config=CONFIG)


def single(model, folder, batch, **config):
    given = {"target": target_of(folder, model), "fisher": Fisher.load(folder / "fisher.safetensors")}
    return alphatoken_weights(model, None, batch, config=CONFIG, return_values=True, **given)


# ------------------------------------------------------------------------------------ values


@pytest.fixture(scope="module")
def output(files):
    folder = files / "out"
    assert main(arguments(files, folder)) == 0
    return folder


def test_values_and_labels_are_those_of_single_rows(files, output):
    model = model_of(files)
    rows = scored(output)
    assert [row["row"] for row in rows] == list(range(11))
    shifted = 0
    for row, source in zip(rows, tuning.rows(11), strict=True):
        ids, labels = encode(source["prompt"], source["completion"])
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        weights, values = single(model, files, batch)
        assert row["input_ids"] == ids and row["attention_mask"] == [1] * len(ids)
        assert row["response_mask"] == [int(label != -100) for label in labels]
        assert row["labels"] == torch.tensor(labels).masked_fill(weights[0] == 0, -100).tolist()
        found = torch.tensor(row["token_values"])
        assert error(found, values.total[0]) < 1e-4 and not found[torch.tensor(labels) == -100].any()
        shifted += error(found.roll(1), values.total[0]) > 0.1
    assert shifted == 11
    schema = pq.read_schema(output / "scored" / "part-00000.parquet")
    assert str(schema.field("token_values").type) == "list<element: float>"


def test_values_of_pairs_are_those_of_single_pairs(files, tmp_path):
    assert main(arguments(files, tmp_path / "out", dataset="pairs.parquet")) == 0
    model, kept = model_of(files), 0
    rows = scored(tmp_path / "out")
    for row, source in zip(rows, tuning.dpo_data(count=7), strict=True):
        batch = {}
        for branch in ("chosen", "rejected"):
            ids, labels = encode(source["prompt"], source[branch])
            batch[f"{branch}_input_ids"], batch[f"{branch}_labels"] = torch.tensor([ids]), torch.tensor([labels])
            assert row[f"{branch}_input_ids"] == ids
        _, values = single(model, files, batch)
        for place, branch in enumerate(("chosen", "rejected")):
            length = len(row[f"{branch}_input_ids"])
            assert error(torch.tensor(row[f"{branch}_token_values"]), values.total[place, :length]) < 1e-4
            count = sum(label != -100 for label in row[f"{branch}_labels"])
            inside = sum(row[f"{branch}_response_mask"])
            assert count in (inside // 2, (inside + 1) // 2)
            kept += count
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["kept_tokens"] == kept and meta["rows"] == 7 and meta["form"] == "pairs"
    assert load_from_disk(tmp_path / "out")["train"].column_names == PAIR_COLUMNS


@pytest.mark.parametrize("changes", [{"tokens_per_batch": 1}, {"tokens_per_batch": 60}, {"rows_per_part": 3}])
def test_how_rows_run_together_does_not_change_values(files, output, tmp_path, changes):
    assert main(arguments(files, tmp_path / "out", **changes)) == 0
    for row, other in zip(scored(output), scored(tmp_path / "out"), strict=True):
        assert {k: v for k, v in row.items() if k != "token_values"} == {
            k: v for k, v in other.items() if k != "token_values"
        }
        assert error(torch.tensor(other["token_values"]), torch.tensor(row["token_values"])) < 1e-4


def test_batches_are_of_like_length_and_within_the_budget(files, tmp_path, monkeypatch):
    seen = []
    collate = scoring.collate
    monkeypatch.setattr(scoring, "collate", lambda *args: seen.append(collate(*args)) or seen[-1])
    assert main(arguments(files, tmp_path / "out", tokens_per_batch=60, rows_per_part=100)) == 0
    shapes = [tuple(batch["input_ids"].shape) for batch in seen]
    assert max(b * t for b, t in shapes) <= 60 and sum(b for b, _ in shapes) == 4 + 11 and len(shapes) < 15
    lengths = [t for _, t in shapes[-4:]]
    assert lengths == sorted(lengths)


# ------------------------------------------------------------------------------------ resuming


def content(folder):
    """Everything in an output but when and where it was made."""
    train = load_from_disk(folder)["train"].to_list()
    meta = json.loads((folder / "meta.json").read_text())
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return train, scored(folder), meta, names


def test_an_interrupted_run_goes_on(files, output, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second part: that part is run again, the first is not, and nothing is lost or repeated."""
    folder, rows = tmp_path / "out", []
    values = scoring.Scorer._values

    def counting(self, together):
        if len(rows) >= 6 and stop:
            raise KeyboardInterrupt
        rows.extend(together)
        return values(self, together)

    monkeypatch.setattr(scoring.Scorer, "_values", counting)
    stop = True
    assert main(arguments(files, folder, tokens_per_batch=60)) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert [path.name for path in (folder / "scored").iterdir()] == ["part-00000.parquet"]
    with pytest.raises(FileNotFoundError):
        load_from_disk(folder)
    with pytest.raises(UserError, match="was interrupted"):
        reselect(folder, rho=0.3)
    stop = False
    rows.clear()
    assert main(arguments(files, folder, tokens_per_batch=60)) == 0
    assert len(rows) == 11 - 4
    found, expected = content(folder), content(output)
    assert found[0] == expected[0] and found[2:] == expected[2:]
    rows.clear()
    assert main(arguments(files, folder, tokens_per_batch=60)) == 0 and not rows
    assert content(folder) == found


KILL = """
import argparse, os, signal, sys
import pyarrow.parquet as pq

write, parse, calls = pq.write_table, argparse.ArgumentParser.parse_args, []

def write_and_die(table, path, *args, **kwargs):
    calls.append(path)
    write(table, path, *args, **kwargs)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

def parse_and_tell(*args, **kwargs):
    print([name for name in ("trl", "bitsandbytes", "datasets") if name in sys.modules], flush=True)
    return parse(*args, **kwargs)

pq.write_table, argparse.ArgumentParser.parse_args = write_and_die, parse_and_tell
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files_and_goes_on(files, output, tmp_path):
    """The command itself, killed while it writes its second part, and started again."""
    folder, argv = tmp_path / "out", arguments(files, tmp_path / "out")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILL)
    here = str(Path(scoring.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(files / "cache"),
           "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), here])}  # fmt: skip
    command = [sys.executable, "-m", "alphatoken_loss", *argv]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == -9 and "Score:" in done.stderr, done.stderr
    assert done.stdout == "[]\n"  # what `--help` has to wait for is light
    assert [path.name for path in (folder / "scored").glob("part-*")] == ["part-00000.parquet"]
    assert main(argv) == 0
    found, expected = content(folder), content(output)
    assert found == expected


def test_a_run_only_goes_on_with_what_it_began(files, output, tmp_path, capsys):
    before = content(output)
    for changes, named in (
        ({"stability_weight": 1.0}, "--stability-weight"),
        ({"dataset": "pairs.parquet"}, "--dataset"),
        ({"adapter": None}, "--adapter"),
        ({"max_length": 20}, "--max-length"),
    ):
        assert main(arguments(files, output, **changes)) == 2
        assert f"begun with other arguments or files ({named}" in capsys.readouterr().err
    assert content(output) == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("")
    assert main(arguments(files, tmp_path / "taken")) == 2
    assert "is no output of this command" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ selecting again


@pytest.mark.parametrize("scope", ["sequence", "dataset"])
def test_labels_by_values_of_neighbours_too(scope, output, tmp_path):
    """What the docstring of `smoothed` says, place by place."""
    before = scored(output)
    inside = [[i for i, x in enumerate(row["response_mask"]) if x and i] for row in before]
    every = [abs(row["token_values"][i]) for row, places in zip(before, inside, strict=True) for i in places]
    judged = []
    for row, places in zip(before, inside, strict=True):
        values = {i: row["token_values"][i] for i in places}
        group = every if scope == "dataset" else [abs(value) for value in values.values()]
        scale = sum(group) / len(group) if group else 1.0
        bounded = {i: value / (abs(value) + scale) for i, value in values.items()}
        near = [{j: 3 - abs(i - j) for j in places if abs(i - j) <= 2} for i in places]
        judged.append([sum(w * bounded[j] for j, w in some.items()) / sum(some.values()) for some in near])
    least = torch.tensor([value for some in judged for value in some]).quantile(0.7)
    arguments = ["--rho", "0.3", "--threshold-scope", scope, "--smoothing", "2", "--output", str(tmp_path / "made")]
    assert main(["reselect", str(output), *arguments]) == 0
    plain = scored(reselect(output, rho=0.3, threshold_scope=scope, output=tmp_path / "plain"))
    found = scored(tmp_path / "made")
    for row, places, values in zip(found, inside, judged, strict=True):
        bound = least if scope == "dataset" else torch.tensor(values or [0.0]).quantile(0.7)
        kept = [i for i, value in zip(places, values, strict=True) if value >= bound - 1e-6]
        assert [i for i, label in enumerate(row["labels"]) if label != -100] == kept
    assert [row["labels"] for row in found] != [row["labels"] for row in plain]
    assert [row["token_values"] for row in found] == [row["token_values"] for row in before]
    end = {"sequence": "", "dataset": "-dataset"}[scope]
    folder = reselect(tmp_path / "made", rho=0.3, threshold_scope=scope, smoothing=1)
    assert folder.name == f"made-rho0.3{end}-smoothing1"


def test_labels_of_before_smoothing_are_those_without_it(output, tmp_path):
    """An output whose `meta.json` does not tell of it yet."""
    folder = reselect(output, rho=0.4, output=tmp_path / "out")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["selection"].pop("smoothing") == 0
    (folder / "meta.json").write_text(json.dumps(meta))
    assert reselect(folder, rho=0.4, output=folder) == folder
    assert reselect(output, rho=0.4, output=folder) == folder, "asked for again"
    with pytest.raises(UserError, match=r"rho 0.4 by sequence and smoothing 0 already"):
        reselect(folder, rho=0.4, smoothing=1, output=folder)
    with pytest.raises(UserError, match=r"--rho 0\.4 --threshold-scope dataset --smoothing 1\.$"):
        reselect(folder, rho=0.4, threshold_scope="dataset", smoothing=1, output=folder)
    with pytest.raises(ValueError, match="smoothing is -1"):
        reselect(folder, rho=0.4, smoothing=-1)


def test_other_labels_need_no_second_scoring(files, output, tmp_path, monkeypatch, capsys):
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(scoring, name, lambda *args: pytest.fail("a model was loaded"))
    folder = reselect(output, rho=0.2, output=tmp_path / "out")
    for row in scored(folder):
        inside = [i for i, x in enumerate(row["response_mask"]) if x and i]
        values = torch.tensor(row["token_values"])[inside]
        kept = [i for i, value in zip(inside, values, strict=True) if value >= values.quantile(0.8)]
        assert [i for i, label in enumerate(row["labels"]) if label != -100] == kept and kept
    again = tmp_path / "out-rho0.2-dataset"
    assert main(["reselect", str(folder), "--rho", "0.2", "--threshold-scope", "dataset"]) == 0
    rows = scored(again)
    every = [(r, i) for r, row in enumerate(rows) for i, x in enumerate(row["response_mask"]) if x and i]
    values = torch.tensor([rows[r]["token_values"][i] for r, i in every])
    kept = [place for place, value in zip(every, values, strict=True) if value >= values.quantile(0.8)]
    assert [(r, i) for r, row in enumerate(rows) for i, x in enumerate(row["labels"]) if x != -100] == kept
    train, meta = load_from_disk(again)["train"], json.loads((again / "meta.json").read_text())
    labels = [row["labels"] for row in rows if any(label != -100 for label in row["labels"])]
    assert train["labels"][:] == labels and meta["rows_without_labels"] == 11 - len(labels) > 0
    assert meta["selection"] == {"rho": 0.2, "threshold_scope": "dataset", "smoothing": 0}
    capsys.readouterr()
    assert main(["score", "--reselect", str(output), "--output", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["reselect", str(files)]) == 2 and "is no output" in capsys.readouterr().err
    assert main(["reselect", str(folder), "--rho", "2"]) == 2 and "--rho is 2.0" in capsys.readouterr().err


def test_labels_do_not_change_in_place(files, output, capsys):
    """Neither by `reselect` nor by the command that scored: a tool that has prepared them would not notice."""
    before = content(output)
    for argv in (
        ["reselect", str(output), "--rho", "0.2", "--output", str(output)],
        arguments(files, output, rho=0.2),
        arguments(files, output, threshold_scope="dataset"),
    ):
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert "has labels for rho 0.5 by sequence and smoothing 0 already" in err
        assert f"alphatoken reselect {output}" in err
    assert reselect(output, rho=0.5, output=output) == output
    assert content(output) == before


def test_the_same_selection_again_is_the_one_there(output, tmp_path, monkeypatch, capsys):
    shutil.copytree(output, tmp_path / "scored")
    monkeypatch.chdir(tmp_path / "scored")
    assert main(["reselect", ".", "--rho", "0.3"]) == 0
    made = tmp_path / "scored-rho0.3"
    before, said = content(made), capsys.readouterr().out
    assert main(["reselect", ".", "--rho", "0.3"]) == 0
    assert content(made) == before and capsys.readouterr().out == said
    assert main(["reselect", ".", "--rho", "0.4", "--output", str(made)]) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "scored" / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "scored" / "deeper")
    assert reselect("..", rho=0.6) == tmp_path / "scored-rho0.6"


def test_an_interrupted_selection_does_not_load_and_is_made_again(files, output, tmp_path, monkeypatch):
    folder = reselect(output, rho=0.5, output=tmp_path / "out")
    assert content(folder) == (*content(output)[:3], [n for n in content(output)[3] if n != "fisher.safetensors"])

    def stop(*args):
        raise KeyboardInterrupt

    later = tmp_path / "out-rho0.2"
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_arrow", stop)
        assert main(["reselect", str(folder), "--rho", "0.2"]) == 130
    with pytest.raises(FileNotFoundError):
        load_from_disk(later)
    assert reselect(folder, rho=0.2) == later and len(load_from_disk(later)["train"])
    assert content(folder)[:3] == content(output)[:3]
    (folder / "scored" / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match="parts are missing"):
        reselect(folder, rho=0.3)


def test_too_little_memory_says_what_to_lower(files, tmp_path, monkeypatch, capsys):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(scoring, "alphatoken_weights", too_large)
    assert main(arguments(files, tmp_path / "out")) == 1
    assert "CUDA out of memory. Lower --tokens-per-batch" in capsys.readouterr().err


def test_values_that_are_not_finite_name_their_rows(files, tmp_path, monkeypatch, capsys):
    def overflow(*args, **kwargs):
        raise FloatingPointError("values are not finite")

    monkeypatch.setattr(scoring, "alphatoken_weights", overflow)
    assert main(arguments(files, tmp_path / "out", tokens_per_batch=1)) == 1
    assert "rows [1], counted from 1: values are not finite" in capsys.readouterr().err
    monkeypatch.setenv("ALPHATOKEN_DEBUG", "1")
    with pytest.raises(FloatingPointError):
        main(arguments(files, tmp_path / "again", tokens_per_batch=1))


# ------------------------------------------------------------------------------------ formats


def tokens_of(folder):
    return [(row["input_ids"], row["response_mask"]) for row in scored(folder)]


@pytest.mark.slow
def test_every_form_of_data(files, output, tmp_path):
    """Files, folders and splits hold the same rows; messages, text and token ids are read as TRL reads them."""
    plain = tuning.sft_data(count=11)
    plain.to_parquet(tmp_path / "rows.parquet")
    plain.save_to_disk(tmp_path / "folder")
    DatasetDict({"test": plain}).save_to_disk(tmp_path / "splits")
    for name, more in (("rows.parquet", {}), ("folder", {}), ("splits", {"split": "test"})):
        assert main(arguments(files, tmp_path / f"out-{name}", dataset=tmp_path / name, **more)) == 0
        assert scored(tmp_path / f"out-{name}") == scored(output), name

    def tokens(name, data, **more):
        data.to_json(tmp_path / f"{name}.jsonl")
        assert main(arguments(files, tmp_path / name, dataset=tmp_path / f"{name}.jsonl", **more)) == 0
        return tokens_of(tmp_path / name)

    rows = tuning.rows(3)
    chats = [encode(f"user: {row['prompt']}\nassistant: ", row["completion"]) for row in rows]
    masks = [(ids, [int(label != -100) for label in labels]) for ids, labels in chats]
    assert tokens("chat", tuning.sft_data("chat", 3)) == masks
    assert tokens("turns", tuning.sft_data("messages", 3), assistant_only_loss=True) == masks
    assert tokens("messages", tuning.sft_data("messages", 3)) == [(ids, [1] * len(ids)) for ids, _ in chats]
    texts = [encode("", row["prompt"] + row["completion"])[0] for row in rows]
    assert tokens("text", tuning.sft_data("text", 3)) == [(ids, [1] * len(ids)) for ids in texts]
    ready = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in chats])
    assert tokens("ready", ready) == masks
    ready = Dataset.from_list([{"input_ids": ids, "completion_mask": mask} for ids, mask in masks])
    assert tokens("masked", ready) == masks
    ready.with_format("torch").save_to_disk(tmp_path / "torch")
    assert main(arguments(files, tmp_path / "out-torch", dataset=tmp_path / "torch")) == 0
    assert tokens_of(tmp_path / "out-torch") == masks
    pairs = tuning.dpo_data("chat", 3)
    pairs.to_json(tmp_path / "pairs.jsonl")
    assert main(arguments(files, tmp_path / "out-pairs", dataset=tmp_path / "pairs.jsonl")) == 0
    assert [row["chosen_input_ids"] for row in scored(tmp_path / "out-pairs")] == [ids for ids, _ in chats]


def test_rows_that_are_cut_stay_in_their_place(files, tmp_path, capsys):
    """A part of which no row has a label left, and then all parts."""
    rows = [{"prompt": "a" * (30 if i < 4 else 3), "completion": "b" * 9} for i in range(6)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    tuning.sft_data("text", 3, 50).to_json(tmp_path / "texts.jsonl")
    options = {"dataset": tmp_path / "rows.jsonl", "target": tmp_path / "texts.jsonl"}
    assert main(arguments(files, tmp_path / "out", max_length=12, **options)) == 0
    told = capsys.readouterr().out
    assert "6 sequences were cut by --max-length, 114 tokens in all" in told and "4 rows have no label left" in told
    found = scored(tmp_path / "out")
    assert [len(row["input_ids"]) for row in found] == [12] * 6
    assert [sum(row["response_mask"]) for row in found] == [0, 0, 0, 0, 9, 9]
    assert len(load_from_disk(tmp_path / "out")["train"]) == 2
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["rows_without_labels"] == 4
    assert main(arguments(files, tmp_path / "none", max_length=3, **options)) == 2
    assert "nothing to train on" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["new_adapter", "own_fisher", "4bit"])
def test_other_models(files, tmp_path, how):
    """A new adapter has no drift, so no Fisher; one is estimated where none is given; a base in 4 bits."""
    changes = {"new_adapter": {"adapter": None, "fisher": None}, "4bit": {"load_in_4bit": True, "fisher": None},
               "own_fisher": {"fisher": None}}[how]  # fmt: skip
    argv = [*arguments(files, tmp_path / "out", **changes), "--fisher-prompts", "3", "--fisher-new-tokens", "3"]
    assert main(argv) == 0
    rows = scored(tmp_path / "out")
    assert len(rows) == 11 and all(torch.tensor(row["token_values"]).any() for row in rows)
    assert (tmp_path / "out" / "fisher.safetensors").is_file() == (how != "new_adapter")
    if how == "new_adapter":
        assert main(arguments(files, tmp_path / "again", **changes)) == 0
        assert scored(tmp_path / "again") == rows


# ------------------------------------------------------------------------------------ along the path


def single_logps(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize(("dataset", "target"), [("rows.jsonl", "target.jsonl"), ("pairs.parquet", "target.jsonl"),
                                                 ("pairs.parquet", "pairs.parquet")])  # fmt: skip
@pytest.mark.slow
def test_values_along_the_path_are_those_of_two_models(files, tmp_path, dataset, target):
    """Of each row by itself, the adapter's log-probabilities and those with what `path.safetensors` holds in it."""
    changes = {"num_layers": None, "estimator": "path", "target": files / target, "stability_weight": 0.0}
    changes["fisher"] = None
    assert main(arguments(files, tmp_path / "out", dataset=dataset, **changes)) == 0
    here, there = model_of(files).eval(), model_of(files).eval()
    path = ThetaStar.load(tmp_path / "out" / "path.safetensors")
    path.apply(there)
    rows = scored(tmp_path / "out")
    assert len(rows) == (11 if dataset == "rows.jsonl" else 7)
    for row in rows:
        for prefix, sign in (("", 1),) if dataset == "rows.jsonl" else (("chosen_", 1), ("rejected_", -1)):
            ids, inside = row[f"{prefix}input_ids"], torch.tensor(row[f"{prefix}response_mask"])
            gained = sign * (single_logps(there, ids) - single_logps(here, ids))
            wanted = torch.nn.functional.pad(gained, (1, 0)) * inside
            found = torch.tensor(row[f"{prefix}token_values"])
            assert error(found, wanted) < 1e-4
            assert error(found.roll(1), wanted) > 0.1


@pytest.mark.slow
def test_the_drift_along_the_path_counts_without_an_adapter_too(files, tmp_path):
    """The new adapter has not drifted where it is, but does on its way to theta*."""
    options = {"num_layers": None, "estimator": "path", "fisher": None, "adapter": None, "fisher_prompts": 2}
    options["fisher_new_tokens"] = 2
    paths = []
    for weight in (0.0, 1e6):
        folder = tmp_path / str(weight)
        assert main(arguments(files, folder, **options, stability_weight=weight)) == 0
        paths.append(ThetaStar.load(folder / "path.safetensors").parameters)
    assert (tmp_path / "1000000.0" / "fisher.safetensors").is_file()
    assert max(error(there, paths[0][name]) for name, there in paths[1].items() if "lora_B" in name) > 0.1


def test_rows_are_held_out_of_the_path_whatever_their_length(files):
    """Batches are of like length; those of a path are in no order, since the last rows of each are held out."""
    rows = [(Tokens(list(range(n)), [False] + [True] * (n - 1)),) for n in range(2, 14)]
    scorer = SimpleNamespace(args=SimpleNamespace(tokens_per_batch=10**4), pad=0, device="cpu")
    lengths = [
        [int(n) for batch in scoring.Scorer._batches(scorer, rows, rng) for n in batch["attention_mask"].sum(1)]
        for rng in (None, random.Random(0))
    ]
    assert lengths[0] == list(range(2, 14)) and lengths[1] != lengths[0] and sorted(lengths[1]) == lengths[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The target is one row")  # of groups of one row each
def test_an_interrupted_run_along_the_path_keeps_its_theta_star(files, tmp_path, monkeypatch, capsys):
    """In smaller batches too, which a run that was out of memory goes on with: there theta* would be another one."""
    monkeypatch.setattr("alphatoken_loss.directions.walk.STEP_ROWS", 1)  # of so few rows
    options = {"num_layers": None, "estimator": "path", "fisher": None, "stability_weight": 0.0}
    assert main(arguments(files, tmp_path / "whole", **options)) == 0
    values = scoring.Scorer._values

    def short(self, rows):
        if len(list((tmp_path / "out" / "scored").iterdir())):
            raise torch.OutOfMemoryError("none left")
        return values(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(scoring.Scorer, "_values", short)
        assert main(arguments(files, tmp_path / "out", **options)) == 1
    assert main(arguments(files, tmp_path / "out", **options, tokens_per_batch=30)) == 0
    assert main(arguments(files, tmp_path / "other", **options, tokens_per_batch=30)) == 0
    rows, whole, other = (scored(tmp_path / name) for name in ("out", "whole", "other"))
    for row, wanted in zip(rows, whole, strict=True):
        assert error(torch.tensor(row["token_values"]), torch.tensor(wanted["token_values"])) < 1e-4
    assert any(error(torch.tensor(a["token_values"]), torch.tensor(b["token_values"])) > 1e-2
               for a, b in zip(other, whole, strict=True))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"adapter": None}, {"load_in_4bit": True}])
def test_the_path_of_other_models(files, tmp_path, changes):
    """With a Fisher of its own; from a new adapter, which drifts on its way only; in 4 bits."""
    options = {"num_layers": None, "estimator": "path", "fisher": None, **changes}
    options |= {"fisher_prompts": 3, "fisher_new_tokens": 3}
    assert main(arguments(files, tmp_path / "out", **options)) == 0
    rows = scored(tmp_path / "out")
    assert len(rows) == 11 and all(torch.tensor(row["token_values"]).any() for row in rows)
    assert (tmp_path / "out" / "fisher.safetensors").is_file()
    assert main(arguments(files, tmp_path / "again", **options)) == 0
    assert scored(tmp_path / "again") == rows


# ------------------------------------------------------------------------------------ what trainers make of it


@pytest.mark.filterwarnings("ignore")
def test_stock_trl_trains_on_it_with_the_masked_loss(files, output, tmp_path):
    """The mean over kept tokens of the row, step by step, and no column that a collator would trip over."""
    train = load_from_disk(output)["train"]
    assert train.column_names == ["input_ids", "attention_mask", "labels"] and len(train) == 11
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=3, logging_steps=1, report_to="none",
        save_strategy="no", per_device_train_batch_size=3, learning_rate=0.0, disable_tqdm=True, max_length=None,
    )  # fmt: skip
    seen = []

    class Keeping(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Keeping(model_of(files), args=args, train_dataset=train, processing_class=tuning.tokenizer())
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    model = model_of(files)
    rows = {tuple(row["input_ids"]): row for row in scored(output)}
    for batch, loss in zip(seen, losses, strict=True):
        total, count = 0.0, 0
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            row = rows[tuple(ids.tolist())]
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            kept = [i for i, label in enumerate(row["labels"]) if label != -100]
            total += float(-sum(logps[i - 1, ids[i]] for i in kept))
            count += len(kept)
        assert loss == pytest.approx(total / count, rel=1e-4)
        assert count < sum(int(x) for ids in batch["input_ids"] for x in ids != 0)


@pytest.mark.parametrize("data", ["rows.jsonl", "pairs.parquet"])
def test_the_folder_loads_in_either_way_and_in_old_releases(files, tmp_path, data):
    """As Axolotl and LLaMA-Factory load it, and as TRL's command line does; `datasets` below 4 knows no "List"."""
    folder = tmp_path / "out"
    assert main(arguments(files, folder, dataset=data)) == 0
    whole, alone = load_from_disk(folder), load_from_disk(folder / "train")
    assert isinstance(whole, DatasetDict) and isinstance(alone, Dataset)
    loaded = load_dataset(str(folder), split="train")
    assert loaded.to_list() == alone.to_list() == whole["train"].to_list()
    assert loaded.features == alone.features
    metadata = json.loads(_schema_of(folder / "train").metadata[b"huggingface"])["info"]["features"]
    on_disk = json.loads((folder / "train" / "dataset_info.json").read_text())["features"]
    assert metadata == on_disk and {feature["_type"] for feature in on_disk.values()} == {"Sequence"}
    # A second use finds the files that the first has cached beside the data.
    alone.map(lambda row: {"length": len(row[alone.column_names[0]])})
    assert list((folder / "train").glob("cache-*"))
    assert load_dataset(str(folder), split="train").to_list() == load_from_disk(folder)["train"].to_list()
    assert loaded.column_names == load_from_disk(folder)["train"].column_names
    # Other labels have another fingerprint, under which `datasets` keeps what it prepares.
    other = load_from_disk(reselect(folder, rho=0.2))["train"]
    assert other._fingerprint != alone._fingerprint == load_from_disk(folder / "train")._fingerprint


def _schema_of(folder):
    with pa.OSFile(str(sorted(folder.glob("data-*"))[0])) as file, pa.ipc.open_stream(file) as reader:
        return reader.schema


def test_collators_of_other_tools_pad_it(output):
    alone = load_from_disk(output / "train")
    batch = DataCollatorForSeq2Seq(tuning.tokenizer(), label_pad_token_id=-100)([alone[i] for i in (0, 5, 10)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for i, place in enumerate((0, 5, 10)):
        assert batch["labels"][i][: len(alone[place]["labels"])].tolist() == alone[place]["labels"]


def test_models_and_data_are_known_by_content(files, tmp_path, capsys):
    """The same files elsewhere are the same; other weights under the same name are not; caches do not count."""
    moved = tmp_path / "moved"
    for name in ("model", "adapter"):
        shutil.copytree(files / name, moved / name)
    tuning.sft_data(count=11).save_to_disk(moved / "rows")
    given = {"model": moved / "model", "adapter": moved / "adapter", "dataset": moved / "rows"}
    assert main(arguments(files, tmp_path / "out", **given)) == 0
    load_from_disk(moved / "rows").map(lambda row: {"length": len(row["prompt"])})
    shutil.move(moved, tmp_path / "again")
    given = {name: tmp_path / "again" / Path(path).name for name, path in given.items()}
    before = content(tmp_path / "out")
    assert main(arguments(files, tmp_path / "out", **given)) == 0 and content(tmp_path / "out") == before
    weights = given["model"] / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(arguments(files, tmp_path / "out", **given)) == 2
    assert "begun with other arguments or files (--model)" in capsys.readouterr().err


def test_the_output_may_lie_in_a_folder_that_is_read(files, tmp_path):
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    argv = arguments(files, tmp_path / "adapter" / "scored", adapter=tmp_path / "adapter")
    assert main(argv) == 0
    before = content(tmp_path / "adapter" / "scored")
    assert main(argv) == 0 and content(tmp_path / "adapter" / "scored") == before


def test_a_row_without_tokens_has_no_label(files, tmp_path):
    ids, labels = encode("a", "b")
    rows = [{"input_ids": ids, "labels": labels}, {"input_ids": [], "labels": []}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(files, tmp_path / "out", dataset=tmp_path / "rows.jsonl")) == 0
    assert [len(row["input_ids"]) for row in scored(tmp_path / "out")] == [len(ids), 0]
    assert len(load_from_disk(tmp_path / "out")["train"]) == 1


def test_an_output_that_was_killed_before_its_first_file(files, tmp_path):
    (tmp_path / "out" / "scored").mkdir(parents=True)
    (tmp_path / "out" / ".meta.json-0a1b2c3d.unfinished").touch()
    assert main(arguments(files, tmp_path / "out")) == 0
    assert main(arguments(files, tmp_path / "out")) == 0  # and what it left is gone
    assert not list((tmp_path / "out").rglob("*.unfinished"))


def test_a_folder_of_others_is_left_alone(files, tmp_path, capsys):
    theirs = tmp_path / "taken" / ".thesis.txt.unfinished"
    theirs.parent.mkdir()
    theirs.touch()
    assert main(arguments(files, tmp_path / "taken")) == 2 and theirs.is_file()
    assert "is no output of this command" in capsys.readouterr().err


def test_columns_that_are_not_read_may_hold_anything(files, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "input_ids": [5], "labels": None}] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(files, tmp_path / "pairs", dataset=tmp_path / "pairs.jsonl")) == 0
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "completion_mask": None}] * 3
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(files, tmp_path / "ids", dataset=tmp_path / "ids.jsonl")) == 0


def test_the_tokenizer_is_the_named_one_then_the_adapters_then_the_models(files, tmp_path):
    """They differ by their chat templates."""
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    template = tuning.tokenizer(chat=True).chat_template
    for place, word in ((tmp_path / "adapter", "beside"), (tmp_path / "named", "named")):
        tokenizer = tuning.tokenizer(chat=True)
        tokenizer.chat_template = word + template
        tokenizer.save_pretrained(place)
    tuning.sft_data("chat", 3).to_json(tmp_path / "rows.jsonl")
    heads = []
    for number, given in enumerate(({}, {"adapter": tmp_path / "adapter"},
                                    {"adapter": tmp_path / "adapter", "tokenizer": tmp_path / "named"})):  # fmt: skip
        assert main(arguments(files, tmp_path / f"out{number}", dataset=tmp_path / "rows.jsonl", **given)) == 0
        heads.append(tuning.tokenizer().decode(scored(tmp_path / f"out{number}")[0]["input_ids"])[:6])
    assert heads == ["user: ", "beside", "nameduser"[:6]]


# ------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_told_without_a_traceback(files, tmp_path, capsys):
    empty, odd, broken = tmp_path / "empty.jsonl", tmp_path / "odd.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    odd.write_text('{"question": "a", "answer": "b"}\n')
    latin, nothing, uneven = tmp_path / "latin.jsonl", tmp_path / "nothing.jsonl", tmp_path / "uneven.jsonl"
    latin.write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    nothing.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    uneven.write_text('{"input_ids": [5, 6], "labels": [6]}\n')
    images = tmp_path / "images.jsonl"
    images.write_text('{"prompt": "a", "completion": "b", "images": ["c.png"]}\n')
    broken.write_text('{"prompt": "a", "compl')
    odd_kinds, blank, wide, mixed = (tmp_path / f"{name}.jsonl" for name in ("kinds", "blank", "wide", "mixed"))
    odd_kinds.write_text('{"prompt": 1, "completion": 2}\n')
    blank.write_text("\n\n")
    wide.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-16")
    mixed.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": []}\n')
    tuning.sft_data().save_to_disk(tmp_path / "folder")
    DatasetDict({"test": tuning.sft_data()}).save_to_disk(tmp_path / "splits")
    other = tuning.get_peft_model(tuning.base(hidden_size=48), tuning.lora())
    other.save_pretrained(tmp_path / "adapter")
    shutil.copytree(files / "adapter", tmp_path / "short")
    weights = tmp_path / "short" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "layers.2" not in name}, weights)
    cases = [
        ({"model": None, "target": None}, "--model, --target: needed"),
        ({"dataset": tmp_path / "none.jsonl"}, "there is no such file"),
        ({"dataset": empty}, "empty.jsonl: the file is empty"),
        ({"dataset": images}, "there is a column images, and only text is valued"),
        ({"dataset": odd}, "the columns are answer, question"),
        ({"dataset": latin}, "could not be read or tokenised ('utf-8'|could not be read ("),
        ({"dataset": nothing}, "row 2 has nothing in its column completion"),
        ({"dataset": odd_kinds}, "row 1 has a int in its column completion. It must be a text or a list of messages"),
        ({"dataset": blank}, "blank.jsonl: there are no rows."),
        ({"dataset": wide}, "It is not in UTF-8: save it so."),
        ({"dataset": mixed}, "row 1 has nothing in its column chosen. Put rows of other forms in files of their own"),
        ({"dataset": uneven}, "row 1 has 2 input_ids and 1 labels"),
        ({"dataset": silent}, "rows 1 to 1 could not be read or tokenised"),
        ({"dataset": broken}, "could not be read (JSON parse error|could not be read (Failed to load JSON"),
        ({"dataset": files / "fisher.safetensors"}, "name must end in"),
        ({"dataset": tmp_path / "splits"}, "there is no split 'train'"),
        ({"target": files / "pairs.parquet"}, "must be in SFT form"),
        ({"target": tmp_path / "none.jsonl"}, "--target"),
        ({"fisher": tmp_path / "none"}, "--fisher"),
        ({"model": tmp_path / "none"}, "--model"),
        ({"adapter": tmp_path / "none"}, "--adapter"),
        ({"adapter": tmp_path / "adapter"}, "does not fit --model"),
        ({"adapter": tmp_path / "short"}, "missing adapter keys"),
        ({"device": "abacus"}, "--device abacus: cannot be used"),
        ({"tokenizer": tmp_path / "none"}, "--tokenizer"),
        ({"rho": 1.5}, "--rho is 1.5"),
        ({"num_layers": 9}, "--num-layers is 9"),
    ]
    for number, (changes, message) in enumerate(cases):
        assert main(arguments(files, tmp_path / f"out{number}", **changes)) == 2, changes
        err = capsys.readouterr().err
        assert any(part in err for part in message.split("|")) and "Traceback" not in err, (changes, err)
        assert not list((tmp_path / f"out{number}").rglob("part-*")), changes
    # A mistake leaves nothing behind that would keep the right command from using the folder.
    assert main(arguments(files, tmp_path / f"out{len(cases) - 1}")) == 0
    hub = arguments(files, tmp_path / "out", dataset="rows.jsonl")
    hub[hub.index("--dataset") + 1] = "nobody/nothing"
    assert main(hub) == 2 and "--dataset nobody/nothing: could not be read" in capsys.readouterr().err
    for argv in (["score", "--rho", "much"], ["score", "--tokens-per-batch", "0"], ["scores"], []):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_names_defaults_and_units(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["score", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "tokens run together, padding included (default: 8192)" in text and "in (0, 1] (default: 0.5)" in text
