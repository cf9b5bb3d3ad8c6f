"""The recipes, through their real entry points, on a model that is trained in a second."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tuning
from datasets import Dataset
from safetensors.torch import load_file

from alphatoken_loss import shared_gain

RECIPES = Path(__file__).parents[2] / "recipes"
TABLE = {"dpo_qlora": 7, "sft_qlora": 5}
KEPT = {"dpo_qlora": (0.01, 1.0), "sft_qlora": (0.4, 0.9)}  # along the path: pairs; all at theta*, then half
HALF = (0.4, 0.65)
SMALL = ["--max_steps", "3", "--per_device_train_batch_size", "2", "--fisher_prompts", "2", "--fisher_new_tokens", "2",
         "--logging_steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def recipes():
    """The recipes as modules, as a script of their folder sees them."""
    import dpo_qlora
    import sft_qlora
    import tiny_lm

    yield {"dpo_qlora": dpo_qlora, "sft_qlora": sft_qlora, "tiny_lm": tiny_lm}


@pytest.fixture(scope="module")
def small_model(recipes, tmp_path_factory):
    """The recipes' own language model, pretrained for a moment."""
    tiny = recipes["tiny_lm"]
    settings = tiny.Pretraining(vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=3, steps=2, seq_len=32)
    return tiny.tiny_lm(tiny.read_corpus(), cache_dir=tmp_path_factory.mktemp("cache"), settings=settings)


def table(printed: str) -> dict[str, list[str]]:
    """Title -> its figures, of the table that is printed last."""
    lines = printed[printed.index(" before ") :].splitlines()[1:]
    rows = itertools.takewhile(bool, lines)  # behind an empty line it says how to read it
    return {line[:48].strip(): line[48:].split() for line in rows}


def check(printed: str, name: str, folder: Path, kept: tuple[float, float]) -> None:
    figures = table(printed)
    assert len(figures) == TABLE[name], figures
    assert figures["share of answer tokens kept"][1] == "1.000"
    least, most = kept
    assert least < float(figures["share of answer tokens kept"][2]) <= most
    prose = [float(figure) for figure in figures["loss on held-out prose, nats/token"]]
    assert len(set(prose)) == 3 and all(1 < loss < 8 for loss in prose)
    assert all(0 < float(seconds) < 20 for seconds in figures["seconds per step"][1:])
    assert "loaded again with PEFT, gives the same metrics" in printed
    ours = name.split("_")[0]
    adapter = load_file(folder / f"alphatoken-{ours}" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert (folder / f"alphatoken-{ours}" / "adapter_model.safetensors").is_file()
    assert (folder / f"alphatoken-{ours}" / "fisher.safetensors").is_file()
    assert not (folder / ours / "fisher.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore")
def test_without_a_model_and_data(name, recipes, small_model, tmp_path, monkeypatch, capsys, caplog):
    module = recipes[name]
    monkeypatch.setattr(module, "tiny_lm", lambda corpus: small_model)
    monkeypatch.setattr("qlora.VALIDATION_ROWS", 8)
    monkeypatch.setattr("qlora.TEST_ROWS", 6)
    monkeypatch.setattr("qlora.LEARNING_RATE", 2e-2)
    monkeypatch.setattr(module, "RETENTION_PIECES", 4)
    module.main([*SMALL, "--path_steps", "8", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "A training" in printed and "forum" not in printed
    kept = KEPT[name]
    if name == "sft_qlora":  # what it was told to keep, but at theta*, where all values tie
        told = float(caplog.text.split("rho is ")[1].split(". ")[0])
        kept = (told - 0.01, min(told + 0.4, 1.0))
    check(printed, name, tmp_path, kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_as_a_script_with_a_model_a_data_file_and_yaml(name, small_model, tmp_path):
    rows = tuning.rows(110)
    if name == "dpo_qlora":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    config.write_text("load_in_4bit: false\nlearning_rate: 5e-2\nestimator: ghost\nnum_layers: 1\nlora_r: 4\n")
    command = [
        sys.executable,
        str(RECIPES / f"{name}.py"),
        "--config",
        str(config),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    command += ["--model_name_or_path", str(small_model), "--dataset_name", str(data), *SMALL]
    environment = {
        **os.environ,
        "PYTHONPATH": str(RECIPES.parent),
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check(done.stdout, name, tmp_path / "out", HALF)
    saved = json.loads((tmp_path / "out" / f"alphatoken-{name[:3]}" / "adapter_config.json").read_text())
    assert saved["r"] == 4


@pytest.mark.filterwarnings("ignore")
def test_settings_are_the_best_of_the_estimator(recipes, tmp_path):
    """And a plain run has those of keeping every token, from where the adapter starts."""
    import qlora

    from alphatoken_loss import AlphaTokenConfig, AlphaTokenDPOConfig

    names = [setting.name for setting in dataclasses.fields(AlphaTokenConfig)]

    def settings(args):
        return {name: getattr(args, name) for name in names}

    for argv, estimator in (([], "path"), (["--estimator", "difference"], "difference")):
        argv += ["--rho", "0.3", "--output_dir", str(tmp_path)]
        _, args, _ = qlora.parse(AlphaTokenDPOConfig, argv)
        best = AlphaTokenConfig.best(pairs=True, estimator=estimator, rho=0.3)
        assert settings(args) == dataclasses.asdict(best)
        assert settings(qlora.run_arguments(args, "DPO", plain=True)) == dataclasses.asdict(AlphaTokenConfig(rho=1.0))
        assert settings(args)["rho"] == 0.3  # the runs' arguments are copies


def test_the_adapter_of_a_4_bit_model_trains_in_float32(recipes, small_model, tmp_path):
    """TRL would have it in bf16."""
    import qlora
    from trl import DPOTrainer, get_peft_config

    from alphatoken_loss import AlphaTokenDPOConfig

    _, args, model_args = qlora.parse(AlphaTokenDPOConfig, ["--output_dir", str(tmp_path)])
    rows = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    model = qlora.load_base(small_model, model_args)
    tokenizer = qlora.load_tokenizer(small_model)
    more = {"processing_class": tokenizer, "peft_config": get_peft_config(model_args)}
    trained = DPOTrainer(model, args=args, train_dataset=rows, **more).model
    parameters = [p for p in trained.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    kept = [p.dtype for p in trained.parameters() if not p.requires_grad]
    qlora.adapters_in_float32(trained)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert [p.dtype for p in trained.parameters() if not p.requires_grad] == kept


@pytest.mark.slow
@pytest.mark.parametrize("given", ["nothing", "files"])
@pytest.mark.filterwarnings("ignore")
def test_the_custom_loop(given, small_model, tmp_path, monkeypatch, capsys):
    """It asks what there is to mask, and trains with that; --plain without."""
    import custom_loop

    monkeypatch.setattr(custom_loop, "tiny_lm", lambda corpus: small_model)
    monkeypatch.setattr(custom_loop, "HELD_OUT", (8, 6))
    monkeypatch.setattr(custom_loop, "FISHER_PROMPTS", 2)
    asked = []
    monkeypatch.setattr(custom_loop, "shared_gain", lambda *args: asked.append(args) or shared_gain(*args))
    argv = ["--steps", "4", "--batch-size", "4", "--learning-rate", "2e-2", "--output-dir", str(tmp_path / "out")]
    if given == "files":
        for name, count in (("rows", 30), ("clean", 10)):
            rows = "".join(json.dumps(row) + "\n" for row in tuning.rows(count))
            (tmp_path / f"{name}.jsonl").write_text(rows)
        argv += ["--model", str(small_model), "--dataset", str(tmp_path / "rows.jsonl")]
        argv += ["--clean", str(tmp_path / "clean.jsonl"), "--rho", "0.6"]
    custom_loop.main(argv)
    printed = capsys.readouterr().out
    (_, target, training), kept = asked[0], float(table(printed)["share of answer tokens kept"][1])
    assert sum(len(batch["labels"]) for batch in target) == (5 if given == "files" else 8)
    assert sum(len(batch["labels"]) for batch in training) == 16
    told = 0.6 if given == "files" else float(printed.split("Keep ")[1].split()[0].rstrip("."))
    assert kept == pytest.approx((1 + 3 * told) / 4, abs=0.05)  # at theta* all values tie, and all are kept
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    custom_loop.main([*argv, "--plain"])
    plain = table(capsys.readouterr().out)
    assert plain["share of answer tokens kept"][1] == "1.000" and len(asked) == 1
    assert plain["loss on held-out answers, nats/token"][0] == table(printed)["loss on held-out answers, nats/token"][0]


def test_too_few_rows_are_told_of(recipes, tmp_path):
    import custom_loop
    import qlora

    from alphatoken_loss import AlphaTokenDPOConfig

    for count, few in ((96, True), (97, False)):
        rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * count
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(tmp_path / "pairs.jsonl")]
        data, args, _ = qlora.parse(AlphaTokenDPOConfig, argv)
        with pytest.raises(SystemExit, match="has 96 rows, and 32 clean") if few else contextlib.nullcontext():
            assert [len(part) for part in qlora.load_rows(data, args, None)] == [1, 32, 64]
    with pytest.raises(SystemExit, match="does not resume"):
        qlora.parse(AlphaTokenDPOConfig, [*argv, "--resume_from_checkpoint", "last"])
    for count, parts in ((150, [75, 32, 43]), (1, None)):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tuning.rows(count)))
        given = argparse.Namespace(dataset=str(tmp_path / "rows.jsonl"), clean=None, seed=0, steps=1, batch_size=1)
        with pytest.raises(SystemExit, match="are too few") if parts is None else contextlib.nullcontext():
            assert [len(part) for part in custom_loop.load_rows(given, None)] == parts


def test_muon_in_float32(recipes):
    """The same step as in bf16 but for rounding, and the gradient is left alone."""
    tiny, gradient, moved = recipes["tiny_lm"], torch.randn(8, 12), []
    for context in (contextlib.nullcontext(), tiny.Float32()):
        parameter = torch.nn.Parameter(torch.zeros(8, 12))
        parameter.grad = gradient.clone()
        with context:
            torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0).step()
        assert torch.equal(parameter.grad, gradient)
        moved.append(parameter.detach())
    half, whole = moved
    assert torch.equal(half, half.bfloat16().float()) and not torch.equal(whole, whole.bfloat16().float())
    assert float((half - whole).norm() / whole.norm()) < 0.05


def test_a_torch_without_muon_is_named(recipes, monkeypatch):
    tiny = recipes["tiny_lm"]
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SystemExit, match=r"This is torch .*; the small model is trained by Muon, which is in 2\.9"):
        tiny.pretrain(None, [], tiny.Pretraining())
