"""The harness's figures on local files against likelihoods and answers computed one by one. Needs lm_eval."""

from __future__ import annotations

import random

import pytest
import torch
from standin import write
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")
from worlds.harness import TASKS, harness_figures

WORDS = ["list", "files", "in", "the", "folder", "sort", "answer", "question"]


@pytest.fixture
def data(tmp_path):
    rng = random.Random(0)

    def some(count):
        return " ".join(rng.choice(WORDS) for _ in range(count))

    items = range(30)
    pairs = [{"query": f"Question: {some(5)}", "choices": [some(2), some(2), some(3)], "gold": i % 3} for i in items]
    write(tmp_path / "retention/arc_easy.jsonl", pairs)
    write(tmp_path / "retention/piqa.jsonl", [{**row, "query": row["query"] + "\n"} for row in pairs])
    write(tmp_path / "retention/lambada_openai.jsonl", [{"context": some(8), "continuation": some(1)} for _ in items])
    options = [{"context_options": [some(4), some(4)], "continuation": some(3), "gold": i % 2} for i in items]
    write(tmp_path / "retention/winogrande.jsonl", options)
    answers = [{"context": f"Question: {some(4)}\nAnswer:", "answer": "a", "aliases": [some(1), "LIST"]} for _ in items]
    write(tmp_path / "retention/triviaqa_sm_sub.jsonl", answers)
    return tmp_path


def test_figures_are_those_computed_one_by_one(tiny, data):
    from worlds.real_data import read_rows

    model = AutoModelForCausalLM.from_pretrained(tiny[0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # predictions that differ
    tokenizer = AutoTokenizer.from_pretrained(tiny[0])

    def scored(context, continuation):
        before = tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(before), len(ids))
        likelihood = sum(logps[i - 1, ids[i]].item() for i in places)
        return likelihood, all(logps[i - 1].argmax() == ids[i] for i in places)

    expected = {}
    for name in ("arc_easy", "piqa"):
        hits = []
        for row in read_rows(str(data), f"retention/{name}"):
            context = row["query"].rstrip() + "\nAnswer:"
            found = [scored(context, f" {choice}")[0] for choice in row["choices"]]
            hits.append(found.index(max(found)) == row["gold"])
        expected[name] = sum(hits) / len(hits)
    rows = read_rows(str(data), "retention/winogrande")
    found = [[scored(option, " " + row["continuation"])[0] for option in row["context_options"]] for row in rows]
    expected["winogrande"] = sum(f.index(max(f)) == r["gold"] for f, r in zip(found, rows, strict=True)) / len(rows)
    rows = read_rows(str(data), "retention/lambada_openai")
    expected["lambada_openai"] = sum(scored(r["context"], " " + r["continuation"])[1] for r in rows) / len(rows)
    rows = read_rows(str(data), "retention/triviaqa_sm_sub")
    hits = 0
    for row in rows:
        ids = tokenizer(row["context"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        for stop in ("\n", ".", ","):
            text = text.split(stop)[0]
        hits += text.strip().lower() in [alias.lower() for alias in row["aliases"]]
    expected["triviaqa"] = hits / len(rows)

    figures = harness_figures(model.train(), tokenizer, str(data), 30)
    assert model.training, "put back"
    assert {name: figures[name] for name in TASKS} == pytest.approx(expected)
    assert figures["tasks"] == pytest.approx(sum(expected.values()) / 5)
    assert 0 < expected["arc_easy"] < 1 and 0 < expected["winogrande"] < 1
    assert harness_figures(model, tokenizer, str(data), 0) == {}
