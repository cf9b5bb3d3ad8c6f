"""The command line as a whole: what it lists, `env`, `doctor`, `show`, and `sft` and `dpo` through TRL's arguments."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import tuning
from datasets import Dataset, DatasetDict

import alphatoken_loss
from alphatoken_loss.__main__ import main
from alphatoken_loss.estimators import ESTIMATORS
from alphatoken_loss.tools import cli, doctor
from alphatoken_loss.tools.cli import UserError
from alphatoken_loss.tools.show.command import show_scored
from alphatoken_loss.trl import command
from alphatoken_loss.trl.command import build

COMMANDS = ("score", "reselect", "show", "sft", "dpo", "report", "doctor", "env")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tuning.base().save_pretrained(folder / "model")
    tuning.tokenizer(chat=True).save_pretrained(folder / "model")
    tuning.sft_data(count=6).to_json(folder / "rows.jsonl")
    tuning.dpo_data(count=6).to_json(folder / "pairs.jsonl")
    tuning.sft_data("chat", 3, 50).to_json(folder / "target.jsonl")
    return folder


def test_help_lists_the_commands_and_version_is_the_packages(capsys):
    for argv, printed in ((["--help"], COMMANDS), (["--version"], [f"alphatoken {alphatoken_loss.__version__}"])):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        out = capsys.readouterr().out
        assert stopped.value.code == 0 and all(re.search(rf"^ *{re.escape(each)}\b", out, re.M) for each in printed)


WITHOUT = """
import sys
from alphatoken_loss.__main__ import main
for words in ("--version", "--help", "score --help", "doctor --help", "reselect", "score --rho much"):
    try:
        main(words.split())
    except SystemExit:
        pass
    else:
        sys.exit(f"{words} ran")
found = {"torch", "transformers", "peft", "trl", "datasets", "accelerate"} & sys.modules.keys()
sys.exit(f"imported {sorted(found)}" if found else 0)
"""


def test_help_version_and_mistyped_arguments_wait_for_no_library():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "alphatoken 0." in done.stdout and "reselect: error:" in done.stderr and "'much'" in done.stderr


def test_env_says_what_a_report_of_a_fault_needs(capsys):
    assert main(["env"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert found["torch"] == torch.__version__ and found["alphatoken-loss"] == alphatoken_loss.__version__
    assert {"python", "platform", "transformers", "trl", "peft", "datasets", "bitsandbytes", "cpu"} <= set(found)


def test_doctor_says_what_fits_and_what_it_costs(files, capsys):
    assert main(["doctor", str(files / "model"), "--length", "16", "--steps", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, 3 layers" in out
    for name in ESTIMATORS:
        assert re.search(rf"{name} +[\d.]+ s +[\d.]+ x +\d+ MiB", out), name
    assert out.count("scores the last 3 of 3 blocks: q_proj (3)") == len(ESTIMATORS)


def test_too_little_memory_is_no_refusal(files, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(doctor, "AlphaToken", full)
    assert main(["doctor", str(files / "model"), "--length", "16", "--steps", "1", "--device", "cpu"]) == 1
    assert "error: CUDA out of memory. " in capsys.readouterr().err


def test_doctor_on_a_device_that_is_not_there(files, capsys):
    assert main(["doctor", str(files / "model"), "--device", "abacus"]) == 2
    assert "error: --device abacus: cannot be used" in capsys.readouterr().err


def test_show_of_what_is_not_finished(tmp_path, capsys):
    (tmp_path / "scored").mkdir()
    meta = {"state": "scoring", "inputs": {}, "form": "sft", "rows": 3, "names": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert main(["show", str(tmp_path)]) == 2
    assert "is not finished. Run the command that made it again" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_says_why_an_estimator_refuses(files, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    dora = LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(tuning.base(), dora).save_pretrained(tmp_path / "adapter")
    argv = ["doctor", str(files / "model"), "--adapter", str(tmp_path / "adapter"), "--length", "16", "--steps", "1"]
    assert main([*argv, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"ghost +refused: .*DoraLinearVariant.*set estimator", out)
    assert re.search(r"difference +[\d.]+ s", out)
    assert main(["doctor", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "error: --model" in capsys.readouterr().err


def test_peak_bytes_are_those_of_live_tensors():
    """Two buffers at once, then one: the peak is both."""

    def step():
        first = torch.ones(1 << 20)
        second = first + 1
        del first
        return second * 2

    assert doctor.peak_bytes(step, torch.device("cpu")) / (4 << 20) == pytest.approx(2, abs=0.1)


def test_peak_bytes_on_cuda_leave_out_what_was_there_and_what_an_earlier_step_took(monkeypatch):
    """By an allocator's two counters, kept here: no GPU is needed to see in which order they are read."""
    held, peak = 100, 500

    def reset(device):
        nonlocal peak
        peak = held

    def step():
        nonlocal held, peak
        for change in (30, 10, -25, 5, -20):
            held += change
            peak = max(peak, held)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    assert doctor.peak_bytes(step, torch.device("cuda")) == 40


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_takes_trls_arguments_and_yaml(files, tmp_path, kind):
    data = files / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl")
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {files / 'model'}\nuse_peft: true\nlora_target_modules: all-linear\nlora_r: 2\n"
        f"dataset_name: {data}\ntarget: {files / 'target.jsonl'}\nnum_layers: 2\nfisher_prompts: 2\n"
        "fisher_new_tokens: 2\nuse_cpu: true\nbf16: false\nreport_to: none\nmax_steps: 1\nrho: 0.5\n"
    )
    argv = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--rho", "0.25"]
    trainer = build(kind, argv)
    assert trainer.alphatoken.config.rho == 0.25 and trainer.alphatoken.config.num_layers == 2
    assert len(trainer.train_dataset) == 6 and trainer.args.max_steps == 1
    assert main([kind, *argv]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluation_takes_the_test_split(files, tmp_path, kind, capsys):
    whole = tuning.dpo_data(count=6) if kind == "dpo" else tuning.sft_data(count=6)
    DatasetDict({"train": whole, "test": whole.select(range(2))}).save_to_disk(tmp_path / "data")
    argv = ["--model_name_or_path", str(files / "model"), "--use_peft", "--dataset_name", str(tmp_path / "data"),
            "--target", str(files / "target.jsonl"), "--stability_weight", "0", "--use_cpu", "--bf16", "false",
            "--max_steps", "1", "--report_to", "none", "--output_dir", str(tmp_path / "out"), "--save_strategy", "no",
            "--eval_strategy", "steps", "--eval_steps", "1"]  # fmt: skip
    trainer = build(kind, argv)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (6, 2)
    trainer.train()
    assert any("eval_loss" in figures for figures in trainer.state.log_history)
    assert build(kind, argv[:-4]).eval_dataset is None
    assert main([kind, *argv, "--dataset_test_split", "judged"]) == 2
    assert "there is no split 'judged'; there are train, test" in capsys.readouterr().err
    data = files / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl")
    (tmp_path / "mixed.yaml").write_text(f"datasets:\n- path: json\n  data_files: {data}\n")
    assert main([kind, *argv, "--config", str(tmp_path / "mixed.yaml")]) == 2
    assert "datasets: there is no split 'test'; there are train" in capsys.readouterr().err
    trainer = build(kind, [*argv, "--config", str(tmp_path / "mixed.yaml"), "--test_split_size", "0.4"])
    assert len(trainer.train_dataset) + len(trainer.eval_dataset) == 6 and len(trainer.eval_dataset)
    whole.save_to_disk(tmp_path / "one")
    for one in (files / ("pairs.jsonl" if kind == "dpo" else "rows.jsonl"), tmp_path / "one"):
        assert main([kind, *argv, "--dataset_name", str(one)]) == 2
    assert "is one data set, which has no split 'test'" in capsys.readouterr().err


def test_mistakes_in_training_arguments(files, capsys):
    cpu = ["--use_cpu", "--bf16", "false"]
    assert main(["sft", *cpu]) == 2 and "--model_name_or_path: needed" in capsys.readouterr().err
    assert main(["dpo", *cpu, "--model_name_or_path", "x"]) == 2 and "--dataset_name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sft", "--help"])
    out = capsys.readouterr().out
    titles = [out.index(f"\n{title}:\n") for title in ("token values", "data", "model and adapter", "training")]
    assert titles == sorted(titles) and titles[0] < out.index("\n  --rho") < titles[1] < out.index("\n  --dataset_name")


@pytest.mark.parametrize(
    ("kind", "rows", "told"),
    [
        ("dpo", [{"prompt": "a", "completion": "b"}], "the columns are completion, prompt. They must hold chosen and"),
        ("sft", [{"question": "a"}], "the columns are question. They must hold prompt and completion; messages; "),
        (
            "sft",
            [{"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "a"}]}],
            "row 2 has nothing in its column prompt. Leave the row out",
        ),
    ],
)
def test_rows_that_a_trainer_does_not_take(files, tmp_path, capsys, kind, rows, told):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model_name_or_path", str(files / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert main([kind, *argv, "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"error: --dataset_name, split 'train': {told}" in capsys.readouterr().err


def test_a_form_that_is_whole_is_enough():
    """A row without a text is none where other columns hold what is trained on, or where it was filtered out."""
    rows = Dataset.from_dict({"input_ids": [[1], [2], [3]], "labels": [[1], [2], [3]], "text": ["a", None, "c"]})
    command._check_columns("sft", rows, "rows", "text")
    texts = rows.select_columns(["text"])
    command._check_columns("sft", texts.select([0, 2]), "rows", "text")
    command._check_columns("sft", texts.to_iterable_dataset(), "rows", "text")
    with pytest.raises(UserError, match="rows: row 2 has nothing in its column text"):
        command._check_columns("sft", texts.select([2, 1]), "rows", "text")
    command._check_columns("sft", texts.rename_column("text", "words").select([0]), "rows", "words")
    with pytest.raises(UserError, match=r"the columns are text\. They must hold chosen and rejected"):
        command._check_columns("dpo", texts, "rows", "text")


@pytest.mark.parametrize("given", ["{bad", "[1]"])
def test_options_of_a_selection_are_a_json_object(files, tmp_path, capsys, given):
    argv = ["--model_name_or_path", str(files / "model"), "--dataset_name", str(files / "rows.jsonl"), "--bf16",
            "false", "--use_cpu", "--output_dir", str(tmp_path), "--selection_options", given]  # fmt: skip
    assert main(["sft", *argv]) == 2
    assert f"selection_options is '{given}'; it must be a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["rows.jsonl", "pairs.jsonl"])
def test_show_of_a_scored_folder(files, tmp_path, capsys, data):
    argv = ["score", "--model", files / "model", "--dataset", files / data, "--target", files / "target.jsonl",
            "--output", tmp_path / "out", "--num-layers", "2", "--rows-per-part", "2", "--device", "cpu"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    shown = show_scored(tmp_path / "out", start=2, rows=3)
    assert len(shown.groups) == 3 and len(shown.groups[0]) == (2 if data == "pairs.jsonl" else 1)
    text = str(shown).replace("[-", "").replace("-]", "")
    assert "1 times 1:" in text and "3 times 0:" in text and "4 times" not in text and "0 times 0" not in text
    assert main(["show", str(tmp_path / "out")]) == 0 and (tmp_path / "out" / "tokens.html").is_file()
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out"), "--start", "9"]) == 2
    assert "--start is 9, and" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2 and "is no output" in capsys.readouterr().err


def test_libraries_are_quiet_inside_and_as_they_were_behind():
    import datasets
    from transformers.utils import logging

    before = logging.get_verbosity(), datasets.utils.logging.get_verbosity()
    with cli.quiet_libraries():
        assert logging.get_verbosity() == logging.ERROR and datasets.are_progress_bars_disabled()
    assert (logging.get_verbosity(), datasets.utils.logging.get_verbosity()) == before
