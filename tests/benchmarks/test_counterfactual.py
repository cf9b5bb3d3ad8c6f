"""The counterfactual check: its parts, and values of exact kind against one small step of plain gradient descent."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import counterfactual
import numpy as np
import pytest
import torch
from worlds.real import Real
from worlds.real_data import RealPlan

from alphatoken_loss import AlphaTokenConfig

PLAN = replace(RealPlan(), steps=6, batch=4, validation=16, test=12, dev=4, pool=24, fisher_prompts=4, fisher_tokens=4,
               reference_steps=2)  # fmt: skip


@pytest.fixture
def world(tiny):
    return Real(tiny[0], PLAN, data=str(tiny[1]))


def test_half_of_the_tokens_is_kept():
    rows = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    masks = [counterfactual.half_of(rows, torch.Generator().manual_seed(seed)) for seed in range(200)]
    for mask in masks:
        assert mask.sum() == rows.sum() // 2 and mask[~rows].sum() == 0
    shares = torch.stack(masks).mean(0)[rows]
    assert (shares - 0.5).abs().max() < 0.15, "each token as often as another"


def test_drift_is_the_fishers_quadratic_form(world):
    model = world.model(seed=0)
    fisher = world.fisher(AlphaTokenConfig(estimator="difference"))
    assert counterfactual.drift_of(model, fisher) == 0
    expected = 0.0
    for name, module in model.named_modules():
        if name in fisher.names:
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
            delta = module.get_delta_weight("default").double()
            expected += 0.5 * (fisher.diagonal(name).double() * delta**2).sum().item()
    assert expected > 0
    assert counterfactual.drift_of(model, fisher) == pytest.approx(expected, rel=1e-5)


def test_a_state_is_put_back_to_the_bit(world):
    check = counterfactual.Check(world, counterfactual.CounterPlan(warm=2, steps=(1, 2), test=8))
    one = check.changes(0, 0)
    check.changes(1, 5)
    assert check.changes(0, 0) == one
    assert check.figures() == check.before
    assert sum(one["kept"]) == len(one["kept"]) // 2
    assert set(one["lower by"]) == {"1", "2"}


def test_exact_values_foretell_a_small_step(world, monkeypatch):
    """With plain gradient descent, a small rate and no rounding, the sum of exact values is what a step brings."""
    monkeypatch.setattr(Real, "autocast", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(Real, "load", lambda self, nf4=False, load=Real.load: load(self).double())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)

    def sgd(model, lr):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)

    monkeypatch.setattr(counterfactual, "make_optimizer", sgd)
    plan = counterfactual.CounterPlan(warm=3, steps=(1,), test=8, lr=1e-2)
    check = counterfactual.Check(world, plan)
    check.plan = replace(plan, lr=1e-3)
    for group in check.state.moments["param_groups"]:
        group["lr"] = 1e-3
    changes = {0: [check.changes(0, mask) for mask in range(12)]}
    scores = {name: {0: check.scores(0, name)} for name in ("exact", "difference", "random")}
    found = counterfactual.correlations(scores, changes, boots=50)
    for figure in ("validation", "drift", "objective"):
        assert found["exact"]["1"][figure]["spearman"] > 0.97, figure
    assert found["difference"]["1"]["validation"]["spearman"] > 0.9
    assert abs(found["random"]["1"]["validation"]["spearman"]) < 0.9
    # And it is that number: lr times the sum over kept tokens, by their count.
    for mask in changes[0]:
        kept = np.array(mask["kept"])
        sums = np.array(scores["exact"][0]["adaptation"]) @ kept
        assert mask["lower by"]["1"]["validation"] == pytest.approx(1e-3 * sums / kept.sum(), rel=1e-2, abs=1e-8)


def test_correlations_of_planted_values():
    rng = np.random.default_rng(0)
    gain = rng.normal(size=40)
    masks = []
    for _ in range(25):
        kept = (rng.random(40) < 0.5).astype(int)
        lower = {"validation": kept @ gain, "test": -kept @ gain, "drift": 1.0, "objective": float(rng.normal())}
        masks.append({"kept": kept.tolist(), "lower by": {"1": lower}})
    found = counterfactual.correlations({"planted": {0: {"total": gain.tolist()}}}, {0: masks}, boots=100)
    at = found["planted"]["1"]
    assert at["validation"] == {"spearman": 1.0, "interval": [1.0, 1.0]}
    assert at["test"]["spearman"] == -1.0
    assert np.isnan(at["drift"]["spearman"])
    assert abs(at["objective"]["spearman"]) < 0.6


@pytest.mark.slow
def test_the_script_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    model, data = tiny
    monkeypatch.setattr(counterfactual, "RealPlan", lambda: PLAN)
    folders = ["--data", str(data), "--model", str(model), "--output", str(tmp_path), "--cache", str(tmp_path)]
    sizes = ["--rows", "4", "--warm", "1", "--steps", "1", "2", "--test", "4", "--batches", "2"]
    scores = ["--scores", "difference", "ghost K=3", "excess loss (RHO-1)", "difference, Adam's step", "path"]
    arguments = ["--world", "real", *folders, *sizes, *scores]
    counterfactual.main([*arguments, "--masks", "2"])
    assert "Fewer than four masks" in capsys.readouterr().out
    file = tmp_path / "counterfactual-real.jsonl"
    before = file.read_text()
    counterfactual.main([*arguments, "--masks", "5"])
    assert file.read_text().startswith(before), "nothing is measured twice"
    written = json.loads((tmp_path / "counterfactual-real.json").read_text())
    assert written["masks"] == {"0:0": 5, "0:1": 5}
    assert set(written["spearman"]["difference"]) == {"1", "2"}
    assert "| difference |" in capsys.readouterr().out
