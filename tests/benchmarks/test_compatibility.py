"""benchmarks/compatibility.py: what passes, what is refused, and that a wrong number is not called right."""

from __future__ import annotations

import json
from dataclasses import replace

import compatibility as script
import pytest
import torch

CASES = {**script.ARCHITECTURES, **script.ADAPTERS}


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_every_check_passes(name):
    cells = script.run(name, CASES[name])["cells"]
    assert set(cells) == set(script.ESTIMATORS)
    for estimator, checks in cells.items():
        assert tuple(checks) == script.CHECKS
        for check, cell in checks.items():
            assert cell["verdict"] == "passed" and 0 <= cell["error"] < 0.05, (estimator, check, cell)


def test_a_refusal_has_its_message():
    for check in script.CHECKS:
        cell = script.tried(CASES["DoRA"], "ghost", check, torch.float64)
        assert cell["verdict"] == "refused" and 'set estimator="difference"' in cell["message"]


@pytest.mark.parametrize("wrong", ["mask", "values", "other error"])
def test_what_is_wrong_fails(wrong, monkeypatch):
    """Masks that are not those of the step, values of the next token, and errors that only pass through the library."""
    if wrong == "mask":
        step = script.Trial.step

        def other_mask(trial):
            gate, gradient = step(trial)
            gate.weights = gate.weights.roll(1, 1)
            return gate, gradient

        monkeypatch.setattr(script.Trial, "step", other_mask)
    elif wrong == "values":
        original = script.alphatoken_weights

        def shifted(*args, **options):
            weights, values = original(*args, **options)
            return weights, replace(values, total=values.total.roll(1, 1))

        monkeypatch.setattr(script, "alphatoken_weights", shifted)
    else:
        monkeypatch.setattr(torch.Tensor, "backward", lambda *_: torch.zeros(2) @ torch.zeros(3))
    cell = script.tried(CASES["Llama"], "exact", "values" if wrong == "values" else "gradient", torch.float64)
    assert cell["verdict"] == "failed"
    assert ("size" in cell["message"]) if wrong == "other error" else cell["error"] > 0.1


def test_a_model_that_does_not_run_is_not_tried():
    def broken(_dtype):
        raise ValueError("no such model")

    cells = script.run("broken", script.Case(broken))["cells"]
    assert {cell["verdict"] for checks in cells.values() for cell in checks.values()} == {"not tried"}
    assert "ValueError: no such model" in cells["ghost"]["gradient"]["message"]


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(script, "run", lambda name, _: tried.append(name) or {"cells": {}, "note": ""})
    monkeypatch.setattr(script, "ARCHITECTURES", {"one": None, "two": None})
    monkeypatch.setattr(script, "ADAPTERS", {"three": None})
    output = tmp_path / "compatibility.json"
    script.main(["--output", str(output), "--only", "two"])
    script.main(["--output", str(output)])
    assert tried == ["two", "one", "three"]
    found = json.loads(output.read_text())["results"]
    assert [list(rows) for rows in found.values()] == [["one", "two"], ["three"]]
    script.main(["--output", str(output), "--only", "two", "--fresh"])
    assert tried[3:] == ["two"]
