"""The script of shared gains, on a stand-in for the real world; and its table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import shared_gain
from page_tables import gain
from worlds.real_data import RealPlan

from alphatoken_loss import AlphaTokenConfig

PLAN = replace(RealPlan(), batch=4, steps=3, validation=8, test=4, dev=4, pool=16)


@pytest.mark.slow
def test_every_kind_of_noise_has_a_line(tiny, tmp_path, monkeypatch, capsys):
    model, data = tiny
    monkeypatch.setattr(shared_gain, "RealPlan", lambda: PLAN)
    monkeypatch.setattr(shared_gain, "REAL", AlphaTokenConfig(estimator="path", path_steps=2, path_rate=1e-3))
    folders = ["--data", str(data), "--model", str(model), "--output", str(tmp_path)]
    shared_gain.main(["--world", "real", *folders, "--rows", "6", "--seeds", "2"])
    written = json.loads((tmp_path / "shared_gain_real.json").read_text())
    names = ["nl2bash, boilerplate", "nl2bash, exchanged", "nl2bash, clean"]
    assert [(row["rows"], row["seed"]) for row in written["results"]] == [(n, s) for s in range(2) for n in names]
    first = written["results"][:3]
    assert len({row["clean"] for row in first}) == 1, "the same clean rows for all"
    assert len({row["training"] for row in first}) == 3
    assert capsys.readouterr().out.count("nats a token") == 6
    assert str(data) not in json.dumps(written)
    monkeypatch.setattr(gain, "load", lambda _: written)
    monkeypatch.setattr(gain, "FILES", ("shared_gain_real",))
    monkeypatch.setattr(gain, "markdown", lambda header, rows, *files: rows)
    lines = gain.gains()
    assert [line[0] for line in lines] == names and all(line[3].count(" to ") == 2 for line in lines)
    for line in lines:
        runs = [row for row in written["results"] if row["rows"] == line[0]]
        wanted = [
            1.0 if row["interval"][1] >= 1 or row["clean"] <= 0 else max((1 + row["share"]) / 2, 0.5) for row in runs
        ]
        assert line[4] == ", ".join(f"{rho:.2f}" for rho in wanted)
