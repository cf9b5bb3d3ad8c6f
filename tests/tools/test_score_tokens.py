"""`score` on what a tokenizer brings: tokens added beside an adapter, templates, turns; and what a console can show."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import tuning
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl.chat_template_utils import get_training_chat_template, llama3_chat_template, qwen3_chat_template

from alphatoken_loss.__main__ import main


@pytest.fixture
def files(tmp_path):
    tuning.base().save_pretrained(tmp_path / "model")
    tuning.tokenizer(chat=True).save_pretrained(tmp_path / "model")
    tuning.sft_data(count=3).to_json(tmp_path / "rows.jsonl")
    tuning.sft_data("messages", 3).to_json(tmp_path / "messages.jsonl")
    tuning.sft_data(count=3, first=50).to_json(tmp_path / "target.jsonl")
    return tmp_path


def command(files, **changes):
    options = {"model": files / "model", "dataset": files / "rows.jsonl", "target": files / "target.jsonl",
               "output": files / "out", "num_layers": 1, "device": "cpu"}  # fmt: skip
    argv = ["score"]
    for name, value in (options | changes).items():
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


def rows_of(files):
    return pq.read_table(files / "out" / "scored" / "part-00000.parquet").to_pylist()


def with_added_token(files):
    """A tokenizer of one token more, and an adapter whose embeddings were resized and trained with it."""
    tokenizer = tuning.tokenizer(chat=True)
    tokenizer.add_tokens(["times"])
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, tuning.lora(modules_to_save=["embed_tokens"]))
    return tokenizer, model


@pytest.mark.filterwarnings("ignore")
def test_tokens_added_beside_the_adapter(files, capsys):
    tokenizer, model = with_added_token(files)
    model.save_pretrained(files / "adapter")
    tokenizer.save_pretrained(files / "adapter")
    assert main(command(files, adapter=files / "adapter", stability_weight=0)) == 0, capsys.readouterr().err
    assert [row["input_ids"].count(259) for row in rows_of(files)] == [1, 1, 1]


def test_tokens_beyond_the_models(files, capsys):
    """Of a tokenizer that is not the model's, and of rows that were tokenised with another: a line, no traceback."""
    tokenizer, _ = with_added_token(files)
    tokenizer.save_pretrained(files / "larger")
    wanted = r"has the token 259, and the model knows 0 to 258. The tokenizer belongs to another model"
    assert main(command(files, tokenizer=files / "larger")) == 2
    assert f"--target: row 1 {wanted}" in capsys.readouterr().err
    (files / "ids.jsonl").write_text(
        '{"input_ids": [5, 6], "labels": [5, 6]}\n{"input_ids": [5, 259], "labels": [5, 259]}\n'
    )
    assert main(command(files, dataset=files / "ids.jsonl")) == 2
    assert f"--dataset: row 2 {wanted}" in capsys.readouterr().err
    (files / "ids.jsonl").write_text('{"input_ids": [5, -7], "labels": [5, 6]}\n')
    assert main(command(files, output=files / "negative", dataset=files / "ids.jsonl")) == 2
    assert "row 1 has the token -7" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_sizes_that_differ_are_told(files, capsys):
    other = get_peft_model(tuning.base(hidden_size=48), tuning.lora())
    other.save_pretrained(files / "adapter")
    assert main(command(files, adapter=files / "adapter")) == 2
    err = capsys.readouterr().err
    assert "size mismatch for" in err and "[2, 48]" in err and "[2, 32]" in err and "more of this kind" in err


def test_which_turns_are_valued(files, capsys):
    word = "holds messages: tokens of all turns are valued"
    assert main(command(files, dataset=files / "messages.jsonl")) == 0
    err = capsys.readouterr().err
    assert f"--dataset {word}" in err and "--target" not in err
    assert all(all(row["response_mask"]) for row in rows_of(files))
    only = command(files, dataset=files / "messages.jsonl", output=files / "only", assistant_only_loss=True)
    assert main(only) == 0 and word not in capsys.readouterr().err


@pytest.mark.parametrize("template", [qwen3_chat_template, llama3_chat_template], ids=["Qwen 3", "Llama 3"])
def test_assistant_turns_of_templates_that_trl_patches(files, template, capsys):
    """Templates without generation marks: what TRL's trainer would learn of them."""
    tokenizer = tuning.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(files / "model")
    given = {"dataset": files / "messages.jsonl", "assistant_only_loss": True, "max_length": 4096}
    assert main(command(files, **given)) == 0, capsys.readouterr().err
    training = get_training_chat_template(tokenizer)
    assert training is not None
    for row, source in zip(rows_of(files), tuning.sft_data("messages", 3), strict=True):
        wanted = tokenizer.apply_chat_template(
            source["messages"], chat_template=training, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["input_ids"] == wanted["input_ids"] and row["response_mask"] == wanted["assistant_masks"]
        assert 0 < sum(row["response_mask"]) < len(row["response_mask"])


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_without_the_letters(encoding, tmp_path):
    argv = ["score", "--model", "模型→", "--dataset", "данные.jsonl", "--target", "x.jsonl", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "alphatoken_loss", *argv], capture_output=True, env=environment)
    assert done.returncode == 2 and b"there is no such file" in done.stderr and b"Traceback" not in done.stderr
