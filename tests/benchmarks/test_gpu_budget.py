"""benchmarks/gpu_budget.py on a CPU, as a machine without TRL and datasets runs it; its models and its arithmetic."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from checks import assert_close
from peft.tuners import lora
from transformers import LlamaForCausalLM

from alphatoken_loss.losses import logps

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BARE = """
import runpy, sys
sys.modules["trl"] = sys.modules["datasets"] = None
sys.path.insert(0, {folder!r})
sys.argv = ["gpu_budget.py", *{arguments!r}]
runpy.run_path({folder!r} + "/gpu_budget.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def scripts():
    import arithmetic
    import gpu_budget
    import llamas

    yield gpu_budget, llamas, arithmetic


@pytest.mark.slow
def test_all_rows_without_trl_and_datasets(tmp_path):
    """A machine that has torch, transformers, peft, accelerate and bitsandbytes."""
    figures, table = tmp_path / "figures.json", tmp_path / "table.md"
    arguments = ["--device", "cpu", "--size", "tiny", "--rounds", "1"]
    arguments += ["--json", str(figures), "--markdown", str(table)]
    code = BARE.format(folder=str(BENCHMARKS), arguments=arguments)
    paths = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(figures.read_text())
    assert "no TRL" in found["about"]
    assert list(found["results"]) == ["tiny sft", "tiny dpo"]
    rows = ["plain", "ghost, K=3", "difference, all", "target of ghost, K=3", "target of difference, all"]
    for task in found["results"].values():
        assert list(task) == rows
        for name, row in task.items():
            wanted = {"seconds", "time ratio", "resident GiB", "peak GiB", "reserved GiB", "memory ratio"}
            wanted |= {"beyond ratio", "operations"} | ({"with refresh"} if name in rows[1:3] else set())
            assert set(row) == wanted
            assert all(math.isfinite(figure) and figure > 0 for figure in row.values()), row
        assert task["plain"]["time ratio"] == 1
    for task in ("sft", "dpo"):
        assert f"| tiny {task} | s/step |" in table.read_text()


@pytest.mark.slow
def test_out_of_memory_is_a_row(scripts, monkeypatch):
    """Of one kind of step, early and late, and of the plain one; the others go on."""
    gpu_budget, llamas, _ = scripts
    model = llamas.build("tiny", torch.device("cpu"))
    monkeypatch.setattr(gpu_budget, "peak_bytes", lambda step: (step(), 1)[1])
    for failing, after in (("ghost", 0), ("ghost", 3), ("plain", 0)):
        calls = []

        def step(self, gate=None, failing=failing, after=after, calls=calls):
            if (gate.config.estimator if gate else "plain") == failing:
                calls.append(0)
                if len(calls) > after:
                    raise torch.OutOfMemoryError

        monkeypatch.setattr(gpu_budget.Bench, "step", step)
        bench = gpu_budget.Bench(model, "tiny", "dpo", "adapters", torch.device("cpu"))
        table = bench.run(1)
        failed = [name for name, row in table.items() if "error" in row]
        assert failed == ["plain" if failing == "plain" else "ghost, K=3"]
        assert ("time ratio" in table["difference, all"]) == (failing != "plain")
        assert "out of memory" in gpu_budget.markdown("tiny dpo", table)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no CUDA device: use --device cpu --size tiny"),
        (["--device", "cpu"], "use --device cpu --size tiny"),
        (["--device", "cpu", "--size", "tiny", "--cap-gib", "12"], "on a CUDA device"),
        (["--device", "cpu", "--size", "tiny", "--rounds", "0"], "--rounds is 0"),
    ],
)
def test_clear_errors(arguments, message, scripts, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        scripts[0].main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size, parameters", [("1b", 1235814400), ("3b", 3212749824), ("8b", 8030261248)])
def test_shapes_are_llamas(size, parameters, scripts):
    with torch.device("meta"):
        assert LlamaForCausalLM(scripts[1].config_of(size)).num_parameters() == parameters


def test_the_model_is_what_its_weights_make(scripts):
    """Rotary frequencies, quantisation, dtypes, ties: beside a float32 model of the dequantised weights."""
    _, llamas, _ = scripts
    llamas.SIZES["tied"] = (*llamas.SIZES["tiny"][:6], True, 32.0)
    for size in ("tiny", "tied"):
        model = llamas.build(size, torch.device("cpu"))
        base = model.get_base_model()
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert (base.lm_head.weight is base.model.embed_tokens.weight) == (size == "tied")
        linears = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit) and "lora" not in n}
        assert len(linears) == 7 * len(base.model.layers)
        assert sum(isinstance(module, lora.bnb.Linear4bit) for module in model.modules()) == len(linears)
        plain = LlamaForCausalLM(llamas.config_of(size)).float()
        weights = {}
        for name, linear in linears.items():
            state = linear.weight.quant_state
            assert (state.quant_type, state.nested, linear.compute_dtype) == ("nf4", True, torch.bfloat16)
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            weights[name + ".weight"] = bnb.functional.dequantize_4bit(linear.weight, state).float()
        assert 0.015 < torch.cat([w.flatten() for w in weights.values()]).std() < 0.025
        weights |= {n: p.float() for n, p in base.named_parameters() if n not in weights and "layers" not in n}
        weights |= {n: p.float() for n, p in base.named_parameters() if n.endswith("norm.weight")}
        if size == "tied":
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        plain.load_state_dict(weights)
        ids = torch.randint(0, 512, (2, 700))  # far enough for the rotary scaling to count
        with torch.no_grad(), model.disable_adapter():
            assert_close(model(ids).logits.float(), plain(ids).logits, 0.05, size)


def test_what_a_block_keeps(scripts):
    _, llamas, arithmetic = scripts
    llamas.SIZES["wide"] = (512, 1, 1792, 8, 2, 64, False, 8.0)
    model = llamas.build("wide", torch.device("cpu"))
    base, tokens = model.get_base_model().model, 256
    block, hidden = base.layers[0], torch.randn(1, tokens, 512, dtype=torch.bfloat16, requires_grad=True)
    block.gradient_checkpointing = False
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    positions = base.rotary_emb(hidden, torch.arange(tokens)[None])
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden, position_embeddings=positions, attention_mask=None)
    assert output.requires_grad
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *positions)}
    copies = 2 * sum(p.numel() for p in block.parameters() if p.requires_grad)  # of adapters, counted apart
    found = sum(size for place, size in kept.items() if place not in own) - copies
    assert 0.98 < found / arithmetic.kept_of_block(llamas.config_of("wide"), tokens) < 1.05


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary, chunk", [(1024, 16), (2048, 192)])  # the peak is in the blocks; at the head
def test_the_arithmetic_beside_measured_peaks(vocabulary, chunk, scripts, monkeypatch):
    gpu_budget, llamas, arithmetic = scripts
    llamas.SIZES["small"] = (128, 4, 448, 8, 2, vocabulary, False, 8.0)
    tokens, make = 256, gpu_budget.batch_of

    def shorter(shape, rows, **options):
        shape.length = tokens
        return make(shape, rows, **options)

    monkeypatch.setattr(gpu_budget, "batch_of", shorter)
    monkeypatch.setattr(logps, "_trls_head", lambda: None)
    monkeypatch.setattr("alphatoken_loss.losses.head.LOGITS", chunk * vocabulary)
    model = llamas.build("small", torch.device("cpu"))
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert arithmetic.adapter_parameters(model.config) == lora
    bench = gpu_budget.Bench(model, "small", "sft", "precomputed", torch.device("cpu"))
    expected = arithmetic.within_steps(model.config, tokens, chunk)
    held = {"plain": 0, "ghost, K=3": 4 * lora / 2, "difference, all": 4 * lora * (1 + 1 / 16)}  # from before the step
    for (name, before), (whole, _) in zip(held.items(), expected.values(), strict=True):
        step = bench.named(name)
        step()
        assert gpu_budget.peak_bytes(step) == pytest.approx(whole - before, rel=0.08), name


def test_results_hold_the_arithmetic_of_the_script(scripts):
    assert scripts[2].budget("8b", "dpo") in (BENCHMARKS.parent / "docs" / "cost.md").read_text()
