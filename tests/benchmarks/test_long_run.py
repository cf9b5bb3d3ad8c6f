"""benchmarks/long_run.py: the figures that it writes, on a few steps, and that it would see what grows."""

from __future__ import annotations

import json
import statistics

import long_run as script
import pytest
import torch

from alphatoken_loss.models.changes import Changes


def test_a_short_run_is_written(tmp_path):
    output = tmp_path / "long_run.json"
    assert script.main(["--steps", "8", "--estimators", "difference", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["settings"] == {"steps": 8, "estimators": ["difference"]}
    found = written["results"]["difference"]
    series = found["series"]
    assert [row["step"] for row in series] == list(range(1, 9))
    for row in series:
        assert row["hooks"] == row["journal"] == 0
        assert row["step ms"] > 0 and row["resident MiB"] > 50 and row["objects"] > row["tensors"] > 0
    assert found["change"] == pytest.approx(script.change(series))
    assert found["change"]["tensors"] == 0  # the second quarter on: nothing is added to what a step holds


def test_figures_are_taken_as_often_as_said(monkeypatch):
    monkeypatch.setattr(script, "PARTS", 5)
    assert [row["step"] for row in script.run("ghost", 11)["series"]] == list(range(2, 11, 2))


def test_changes_are_those_of_medians():
    series = [{"step": i, "step ms": float(i * i), "tensors": 10.0 * i} for i in range(1, 9)]
    times, tensors = [float(i * i) for i in range(1, 9)], [10.0 * i for i in range(1, 9)]
    expected = {
        "step ms": statistics.median(times[6:8]) / statistics.median(times[2:4]),
        "tensors": statistics.median(tensors[6:8]) - statistics.median(tensors[2:4]),
    }
    assert script.change(series) == expected == {"step ms": 56.5 / 12.5, "tensors": 40.0}


def test_what_grows_is_seen():
    model = script.small_model()
    before = script.taken(model, [3.0, 1.0, 2.0])
    assert before["step ms"] == 2.0
    held = [torch.zeros(3) for _ in range(7)]
    handles = [model.register_forward_hook(print), model.base_model.register_forward_pre_hook(print)]
    with Changes() as changes:
        changes.put({}, "key", 1)
        after = script.taken(model, [1.0])
    assert after["tensors"] - before["tensors"] == len(held)
    assert after["hooks"] - before["hooks"] == len(handles)
    assert after["journal"] - before["journal"] == 2  # the context's mark and the entry


def test_memory_is_this_process_s():
    before = script.resident()
    held = torch.ones(64 * 2**20 // 4)
    assert script.resident() - before == pytest.approx(held.nbytes / 2**20, rel=0.25)


def test_batches_are_those_of_their_step():
    assert all(torch.equal(a, b) for a, b in zip(script.batch_of(3).values(), script.batch_of(3).values(), strict=True))
    assert [script.batch_of(step)["labels"].shape for step in (0, 1)] == [(4, 24), (4, 40)]
    assert not torch.equal(script.batch_of(0)["input_ids"], script.batch_of(2)["input_ids"])
