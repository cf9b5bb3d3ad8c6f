"""Marks of people: spans -> tokens, areas, and the script on a stand-in."""

from __future__ import annotations

import json

import marks
import numpy as np
import pytest
from worlds.real_data import Encoder, read_rows
from worlds.rows import Row


def test_a_token_is_marked_where_it_shares_a_letter_with_a_mark():
    text = "ab  cd ef"
    errors = [{"start": 3, "end": 6, "type": "x"}, {"start": 5, "end": 9, "type": "y"}]
    #          ab      "  "    " cd"   c       d       " ef"
    offsets = [(0, 2), (2, 4), (3, 6), (4, 5), (5, 6), (6, 9)]
    found = marks.types_of_tokens(text, offsets, errors)
    assert found == (frozenset(), {"x"}, {"x", "y"}, {"x"}, {"x", "y"}, {"y"})


def test_tokens_of_the_marked_text_are_marked(tiny):
    """Through a real tokenizer: the marked tokens spell the marked words, and no other does."""
    encoder = Encoder(tiny[0])
    text = {"question": "where?", "prediction": "The folder is here. It was made. Files lie in it.", "errors": []}
    start = text["prediction"].index("It was")
    text["errors"] = [{"start": start, "end": start + len("It was made."), "type": "Irrelevant"}]
    found = marks.marked_answer(3, text, encoder, 100)
    spelled = [encoder.tokenizer.decode([token]) for token in found.row.answer]
    inside = "".join(token for token, types in zip(spelled, found.types, strict=True) if types)
    outside = "".join(token for token, types in zip(spelled, found.types, strict=True) if not types)
    assert "".join(inside.split()) == "Itwasmade."
    assert "".join(outside.split()) == "Thefolderishere.Fileslieinit."
    cut = marks.marked_answer(3, text, encoder, len(found.row.prompt) + 5)
    assert len(cut.row.answer) == len(cut.types) == 5


def test_halves_share_no_question():
    one, other = marks.halves(101, seed=0)
    assert not {*one} & {*other} and {*one, *other} == {*range(101)} and abs(len(one) - len(other)) == 1


def test_summary_by_type():
    """Tokens of one type are told from those in no mark alone; low values mean marked; the base is subtracted."""
    rng = np.random.default_rng(0)
    answers, values = {}, {"perfect": {}, marks.BASE: {}, "late": {}}
    for number in range(30):
        types = [frozenset(), frozenset(), {"a"}, {"b"}, frozenset(), {"a", "b"}]
        answers[number] = marks.Marked(number, Row((1,), (1,) * 6), tuple(map(frozenset, types)))
        values["perfect"][number] = [1.0, 1.1, 0.0, 2.0, 1.2, 0.5]  # finds a and takes b alone for the best
        values[marks.BASE][number] = rng.normal(size=6).tolist()
        values["late"][number] = [-0.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    found = marks.summary(answers, values, boots=200)
    assert (found["questions"], found["tokens"]) == (30, 180)
    kinds = {kind: part["scores"]["perfect"]["auc"] for kind, part in found["types"].items()}
    assert kinds == {"any": pytest.approx(2 / 3, abs=1e-4), "a": 1.0, "b": 0.5}
    assert found["types"]["a"]["marked tokens"] == 60
    told = found["types"]["a"]["scores"]
    gap = told["perfect"][f"minus {marks.BASE}"]
    assert gap == pytest.approx(1 - told[marks.BASE]["auc"], abs=2e-4) and 0.3 < gap < 0.7
    low, high = told[marks.BASE]["interval"]
    assert low < told[marks.BASE]["auc"] < high and high - low < 0.4
    assert found["within answers"]["scores"]["perfect"]["auc"] == pytest.approx(2 / 3, abs=1e-4)
    # Position alone orders 7 of 9 pairs; of tokens at one place it says nothing.
    assert found["types"]["any"]["scores"]["late"]["auc"] == pytest.approx(7 / 9, abs=1e-4)
    assert "| perfect |" in marks.report(found)


@pytest.mark.slow
def test_the_script_goes_on_where_it_stopped(tiny, tmp_path, capsys, monkeypatch):
    model, data = tiny
    arguments = ["--data", str(data), "--model", str(model), "--output", str(tmp_path), "--cache", str(tmp_path)]
    some = ["--scores", "difference", "ghost K=3", marks.BASE, "random"]
    marks.main([*arguments, *some])
    written = json.loads((tmp_path / "marks.json").read_text())
    texts = read_rows(str(data), "spans/qa-feedback")
    assert written["questions"] == sum(bool(text["errors"]) for text in texts)
    assert set(written["types"]) == {"any", "Irrelevant", "Redundant"}
    assert str(data) not in (tmp_path / "marks.json").read_text()
    before = (tmp_path / "marks.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    (tmp_path / "marks.jsonl").write_text("".join(lines[:-1]) + lines[-1][:30])  # killed while writing
    marks.main([*arguments, *some])
    again = [json.loads(line) for line in (tmp_path / "marks.jsonl").read_text().splitlines()]
    for one, line in zip(again, lines, strict=True):
        assert {**one, "seconds": 0} == {**json.loads(line), "seconds": 0}, "the same values"
    assert json.loads((tmp_path / "marks.json").read_text())["types"] == written["types"]
    assert "| difference |" in capsys.readouterr().out
    monkeypatch.delenv("ALPHATOKEN_REAL_DATA", raising=False)
    with pytest.raises(SystemExit):
        marks.main([])
    assert "--data (or ALPHATOKEN_REAL_DATA) must name a folder" in capsys.readouterr().err
