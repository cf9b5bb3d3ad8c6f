"""The trade-off benchmark through its real entry point, on a base trained in seconds; and its arithmetic."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tradeoff
from page_tables import path as page_path
from scipy import stats
from worlds import runner, settings, tables, toy, training


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base of three blocks that has taken two steps, the world of it, and the cache folder that it lies in; of a
    tenth of the text."""
    cache, texts = tmp_path_factory.mktemp("cache"), toy.read_texts()
    some = toy.Texts(**{part: documents[::10] for part, documents in vars(texts).items()})
    base = toy.Pretraining(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=3, steps=2, batch_size=4, code_sequences=1,
        seq_len=32,
    )  # fmt: skip
    plan = replace(tradeoff.PLAN, steps=3, batch=4, pair_steps=2, measured_at=(0.5, 1.0), validation=8, test=4,
                   reference_steps=2, fisher_prompts=4, fisher_tokens=3,
                   last_pairs=8, heldout=6)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(toy, "read_texts", lambda: some)
        patch.setattr(tradeoff, "read_texts", lambda: some)
        yield base, toy.Toy(toy.make_base(some, base), plan), cache


@pytest.mark.slow
def test_every_kind_of_setting_runs(small):
    """One of each selection and task; the rows that a selection must treat alike are the same."""
    _, world, _ = small
    plan = world.plan
    groups = [*settings.supervised(), *settings.without_noise(), *settings.exchanged_answers(), *settings.preferences(),
              *settings.real_supervised(), *settings.real_preferences()]  # fmt: skip
    kinds = {(s.selection, s.task, s.noise, s.kl > 0, s.kl_to_base, s.l2 > 0, s.precondition, s.loss_type,
              s.smoothing > 0, s.likelihood > 0, s.rho_of, s.exchanged > 0): s for s in groups}  # fmt: skip
    kinds["nf4"] = next(settings.in_nf4())
    before = {}
    for setting in kinds.values():
        found = training.run(world, setting, 3e-3, 0)
        first, *_, last = found["curve"]
        assert [first["step"], last["step"]] == [0, plan.pair_steps if setting.task == "dpo" else plan.steps]
        assert last["pace"] > 0 and all(torch.tensor(float(v)).isfinite() for v in last.values())
        # No token's perplexity is below STM's threshold after two steps of pretraining: none is trained on.
        assert (first["target"] == last["target"]) == (setting.selection == "stm")
        shared = before.setdefault((setting.task, setting.nf4), first)
        assert first == shared, "every run starts from the base"
        if setting.task == "dpo":
            assert abs(first["margin"]) < 1e-5
        elif setting.selection == "all" and setting.noise:
            assert set(found["kept"].values()) == {1.0}
        elif setting.selection == "oracle":
            assert list(found["kept"].values()) == [1.0, 0.0, 0.0, 0.0][: len(found["kept"])]
        elif setting.rho_of:
            assert 0.4 < found["kept"]["code"] <= 1, "half of all tokens at least"
        elif setting.selection == "random":
            assert 0.3 < found["kept"]["code"] < 0.7


def test_kinds_are_those_of_the_tokens(small):
    _, world, _ = small
    plan, tasks = world.plan, world.tasks
    rows, clean = tasks.training(40, 3, noise=True), tasks.training(40, 3, noise=False)
    assert rows == tasks.training(40, 3, noise=True)
    corrupted = 0
    for row, same in zip(rows, clean, strict=True):
        assert row.prompt == same.prompt and len(row.answer) == len(row.kinds) and not same.kinds
        code = [(token, kind) for token, kind in zip(row.answer, row.kinds, strict=True) if kind < 2]
        order = {2: 0, 0: 1, 1: 1, 3: 2}  # before, code, behind
        assert list(row.kinds) == sorted(row.kinds, key=order.__getitem__)
        right = [token == wanted for (token, _), wanted in zip(code, same.answer, strict=True)]
        assert right == [kind == 0 for _, kind in code]
        corrupted += sum(kind for _, kind in code)
    assert 0.2 < corrupted / (40 * plan.answer) < 0.3
    labels, table = world.batch(rows)["labels"], training.kinds_of(rows)
    assert torch.equal(labels != -100, table >= 0)


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(small, tmp_path, monkeypatch, capsys):
    base, world, cache = small
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setitem(toy.BASES, "small", base)
    monkeypatch.setattr(tradeoff, "PLAN", world.plan)
    # Processes of their own, which test_real.py has, would read all of the text.
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    arguments = ["--quick", "--only", "all tokens", "random", "--workers", "1", "--output", str(tmp_path)]
    tradeoff.main(arguments)
    file = tmp_path / "results.jsonl"
    first = file.read_text()
    assert [json.loads(line)["name"] for line in first.splitlines()] == ["all tokens", "random half"]
    lines = first.splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:40])  # killed while writing
    tradeoff.main(arguments)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["all tokens", "random half"]
    assert rows[0] == json.loads(lines[0])
    assert set(rows[0]["about"]) == {"date", "machine", "versions", "command"}
    again = json.loads(lines[1])
    for one, other in zip(rows[1]["curve"], again["curve"], strict=True):  # the same seed, the same run
        timed = {"pace", "once"}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert "| random half |" in (tmp_path / "report.md").read_text()
    published = tmp_path / "published.json"
    published.write_text((tmp_path / "runs.json").read_text().replace("random half", "another"))
    tradeoff.main([*arguments, "--report", "--join", str(published)])
    assert {run["name"] for run in json.loads((tmp_path / "runs.json").read_text())["results"]} == {
        "all tokens", "random half", "another",
    }  # fmt: skip
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    assert "| random half |" in capsys.readouterr().out
    tradeoff.main([*arguments, "--pace"])
    paces = json.loads((tmp_path / "paces.json").read_text())["results"]
    assert set(paces) == {"all tokens", "random half"} and all(pace["step"] > 0 for pace in paces.values())


def test_what_is_spent_once_is_told_apart_from_steps(small, monkeypatch):
    """By a clock of its own: a reference of 7 seconds, and steps of 2, the first of 5."""
    _, world, _ = small
    now, loss = [0.0], training._Supervised.loss

    def slow(run, number):
        now[0] += 2 if number else 5
        return loss(run, number)

    def tune(*_):
        now[0] += 7

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(training, "tune_reference", tune)
    monkeypatch.setitem(training.SELECTIONS, "rho1", training.SELECTIONS["oracle"])
    monkeypatch.setattr(training._Supervised, "loss", slow)
    (setting,) = (s for s in settings.supervised() if s.name == "RHO-1, clean reference")
    last = training.run(world, setting, 1e-4, 0)["curve"][-1]
    assert (last["pace"], last["once"]) == (2, 7 + 5 - 2)


@pytest.mark.slow
def test_theta_star_is_made_once_and_is_that_of_the_first_step(small, monkeypatch):
    _, world, _ = small
    (setting,) = (s for s in settings.supervised() if s.name == "path, best()")
    there = set(world.folder.glob("path-*.json"))
    first = training.run(world, setting, 3e-3, 5)
    with monkeypatch.context() as patch:
        patch.setattr(training, "make_path", lambda *_, **__: pytest.fail("it is there"))
        again = training.run(world, setting, 3e-3, 5)
        training.run(world, settings.UNMASKED, 1e-3, 5)  # another setting and rate, with the same theta*
    made = training.run(world, setting, 3e-3, 6)
    monkeypatch.setattr(training._Run, "theta_star", lambda *_: None)  # then the first step makes it
    expected = training.run(world, setting, 3e-3, 5)

    def figures(run):
        return [{name: v for name, v in point.items() if name not in ("pace", "once")} for point in run["curve"]]

    assert figures(first) == figures(again) == figures(expected) != figures(made)
    times = [json.loads(file.read_text()) for file in {*world.folder.glob("path-*.json")} - there]
    assert len(times) == 2 and min(times) > 0
    assert again["curve"][-1]["once"] > min(times), "the time that it took counts in each run"


def test_no_path_of_this_machine_is_written():
    script = Path(runner.__file__).parents[1] / "real.py"
    argv = [str(script), "--data", "/secret/place", "--quick", "--output=/secret", "--workers", "2"]
    assert runner.about(argv=argv)["command"] == "python benchmarks/real.py --quick --workers 2"


def _run(name, seed, *points):
    names = ("step", "pace", "target", "retention")
    return {"name": name, "seed": seed, "curve": [dict(zip(names, point, strict=True)) for point in points], "kept": {}}


def test_differences_are_paired_by_seed():
    base = {s: _run("all tokens", s, (0, 0, 5, 3), (10, 2.0, 4 + s, 4)) for s in range(4)}
    runs = {s: _run("half", s, (0, 0, 5, 3), (10, 8.0, 3.5 + s + 0.1 * s, 3)) for s in range(1, 4)}
    text = tables.paired(runs, base, lambda run: tables.final(run, "target"))
    gaps = [-0.4, -0.3, -0.2]
    low, high = stats.t.interval(0.95, 2, loc=-0.3, scale=stats.sem(gaps))
    assert text == f"-0.300 ±{(high - low) / 2:.3f}"
    assert tables.at_step(runs[1], 2.5, "target") == pytest.approx(5 + 0.25 * (4.6 - 5))
    assert tables.at_step(runs[1], 99, "target") == pytest.approx(4.6)
    assert tables.paired({1: runs[1]}, base, lambda run: tables.final(run, "target")) == ""
    # At equal time: four times slower, and one of its steps gone before the first, it is at step 1.5 of 10.
    paces = {"all tokens": {"step": 0.5, "once": 0.25}, "half": {"step": 2.0, "once": 2.25}}
    assert tables.steps_in_time("half", "all tokens", 10, paces) == pytest.approx(1.5)
    assert tables.steps_in_time("half", "all tokens", 1, paces) == 0.0
    text = tables.differences({"all tokens": base, "half": runs}, "all tokens", ("target", "retention"), paces)
    cells = text.splitlines()[-1].split(" | ")
    assert cells[:2] == ["| half", tables.paired(runs, base, lambda run: tables.final(run, "target"))]
    gaps = [5 + 0.15 * (3.5 + 1.1 * s - 5) - (4 + s) for s in range(1, 4)]
    assert cells[3].split(" ")[0] == f"{sum(gaps) / 3:+.3f}"
    assert tables.at_equal_time(runs, base, "target", {}) == ""
    assert tables.spread([1.0, 2.0]) == "1.500 ±0.707"


def test_the_end_of_a_run_on_the_curve_of_another(monkeypatch):
    """The other's retention where it first has the run's target loss, at the rate that retains more there."""
    way = [[0, 5.0, 3.0], [4, 4.0, 3.2], [8, 4.5, 3.9], [16, 3.0, 4.0]]
    assert page_path.at_target(way, 4.5) == pytest.approx(3.1)
    assert page_path.at_target(way, 3.75) == pytest.approx(3.95)
    assert page_path.at_target(way, 2.9) is None
    results = []
    for seed in range(2):
        hot = _run("no noise: all tokens", seed, (0, 0, 5, 3), (8, 1, 4, 3.2 + seed), (16, 1, 3, 4))
        mild = _run("no noise: all tokens", seed, (0, 0, 5, 3), (16, 1, 4, 3.1))
        ours = _run("no noise: path, best()", seed, (0, 0, 5, 3), (16, 1, 4.0 - seed, 3.3))
        runs = zip((hot, mild, ours), (3e-3, 6e-4, 3e-3), strict=True)
        results += tables.ends([{**run, "world": "toy", "lr": rate} for run, rate in runs])
    assert [run["way"][-1] for run in results[:2]] == [[16, 3, 4], [16, 4, 3.1]]
    monkeypatch.setattr(page_path, "load", lambda _: {"results": results})
    monkeypatch.setattr(page_path, "markdown", lambda header, rows, file: rows)
    (row,) = page_path.path_clean_curve()
    # Seed 0 is at 4.0, where the mild run has 3.1 and the hot 3.2; seed 1 at 3.0, which the hot run alone has, with 4.
    assert row[1:5] == ["0.003", "3.500", "3.300", "3.550"] and row[5].startswith("-0.250 ±") and row[6] == "2"


def test_runs_of_an_earlier_table_are_kept_beside_new_ones():
    def at(name, seed, first, *points, retained=3.0):
        run = _run(name, seed, (0, 0, first, retained), *points)
        run["curve"][-1]["tasks"] = 1.0
        return {**run, "world": "toy", "lr": 3e-3}

    old = [
        at("all tokens", 0, 5.0, (8, 1, 4, 3.2), (16, 1, 3, 4)),
        at("half", 0, 5.0, (8, 1, 4.2, 3.1), (16, 1, 3.5, 3.5)),
    ]
    earlier = list(map(tables.run_of, tables.ends(old)))
    assert tables.ends(earlier) == tables.ends(old)
    new = [
        at("all tokens", 0, 5.004, (8, 1, 4, 3.2), (16, 1, 2.5, 4)),
        at("all tokens", 1, 5.004, (4, 1, 4, 3.4), (8, 1, 4, 3.4), (16, 1, 2, 3)),
    ]
    found = tables.joined(new, earlier)
    last = {(run["name"], run["seed"]): tables.final(run, "target") for run in found}
    assert last == {("all tokens", 0): 2.5, ("all tokens", 1): 2, ("half", 0): 3.5}, "a new run replaces its like"
    # Curves are drawn of the moments that all runs have.
    assert tables.curves(found[:2], "retention", "target") == [(3.0, 3.3, 3.5), (5.004, 4.0, 2.25)]
    assert tables.curves([earlier[0]], "tasks") == [(1.0,)]
    text = tables.at_best({"all tokens": {run["seed"]: run for run in found[:2]}})
    assert text.splitlines()[-1] == "| all tokens | 2.250 ±0.354 | 3.500 ±0.707 | 1.000 ±0.000 | 16 |"
    for other in (at("half", 0, 5.02, (16, 1, 3, 4)), at("half", 0, 5.0, (16, 1, 3, 4), retained=2.98)):
        with pytest.raises(ValueError, match="scores otherwise in the table to join"):
            tables.joined(new, [other])
    elsewhere = {**at("half", 0, 7.0, (16, 1, 3, 4)), "world": "another"}
    assert tables.joined(new, [elsewhere])[-1] is elsewhere


def test_runs_are_selected_by_name_rate_and_seed(small):
    one, two = settings.Setting("all tokens"), settings.Setting("random half")
    wanted = [(small[1], setting, rate, seed) for setting in (one, two) for rate in (1e-3, 3e-4) for seed in range(3)]
    parser = argparse.ArgumentParser()
    runner.add_options(parser, Path("out"))

    def left(*argv):
        return [(s.name, rate, seed) for _, s, rate, seed in runner.selected(wanted, parser.parse_args(argv))]

    assert len(left()) == 12
    assert left("--only", "^all", "--rates", "3e-4", "--seeds", "2") == [("all tokens", 3e-4, s) for s in range(2)]
    assert {name for name, _, _ in left("--only", "half", "nothing")} == {"random half"}


def test_shares_kept_are_told_of_the_kinds_that_were_met():
    runs = {"all": {0: {"kept": {"code": 1.0, "junk": 0.5}}, 1: {"kept": {"code": 0.5, "junk": 0.0}}},
            "validation only": {0: {"kept": {"code": 1.0}}}, "DPO": {0: {"kept": {}}}}  # fmt: skip
    lines = tables.kept(runs).splitlines()
    assert lines[0] == "| share kept | code | junk |"
    assert lines[2:] == ["| all | 0.75 | 0.25 |", "| validation only | 1.00 |  |"]
