"""Do token values find what people mark as wrong? Spans of model answers that annotators marked, against scores.

    python benchmarks/marks.py --data FOLDER            # all marked answers; goes on where it stopped
    python benchmarks/marks.py --data FOLDER --batches 4 --scores difference random
    python benchmarks/marks.py --data FOLDER --report   # only the table, of what there is

QA-Feedback (Fine-Grained RLHF, arXiv 2306.01693) has spans of model answers that people marked as irrelevant,
redundant, wrong and so on, and the answers as they corrected them. A marked answer's tokens are valued as if it were a
training example, with the corrected answers of other questions as the target (two halves of the questions, each the
other's target). Told are areas under the ROC curve: the probability that a token inside a mark has a lower value than
one in no mark; 0.5 is chance. Intervals come from a bootstrap over questions. "Within answers" is the mean over answers
of each one's own area, which no difference between answers can move; "equal places" compares only tokens equally far
into their answers, since people mark ends more often than beginnings.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from worlds import runner
from worlds.measures import areas, auc, draws, interval
from worlds.real import Real, load_smollm2
from worlds.real_data import Encoder, RealPlan, read_rows
from worlds.rivals import at_labels
from worlds.rows import Row, chunks
from worlds.scores import SCORES, Scored
from worlds.tables import table
from worlds.toy import cached
from worlds.training import tune_reference

from alphatoken_loss import AlphaTokenConfig, make_path

SYSTEM = "Answer the question."
BASE = "excess loss (RHO-1)"  # that others are compared with
STRATUM = 8  # tokens of an answer that count as one place
LEFT_OUT = ("difference, Adam's step",)  # before the first step Adam has no scale


@dataclass(frozen=True)
class MarkPlan:
    target: int = 32  # corrected answers of other questions
    batch: int = 8
    max_length: int = 224  # tokens; what is beyond is not valued
    seed: int = 0


@dataclass(frozen=True)
class Marked:
    """An answer in tokens; `types` holds for each answer token the types of the marks that it lies in."""

    question: int
    row: Row
    types: tuple[frozenset[str], ...]


def types_of_tokens(
    text: str, offsets: Sequence[tuple[int, int]], errors: Sequence[dict[str, Any]]
) -> tuple[frozenset[str], ...]:
    """The types of marks that share a character other than white space with each token (if it has any other)."""
    found = []
    for start, end in offsets:
        inside = [place for place in range(start, end) if not text[place].isspace()] or range(start, end)
        found.append(frozenset(e["type"] for e in errors if any(e["start"] <= i < e["end"] for i in inside)))
    return tuple(found)


def marked_answer(number: int, text: dict[str, Any], encoder: Encoder, max_length: int) -> Marked:
    prompt = encoder.prompt(text["question"], SYSTEM)
    encoded = encoder.tokenizer(text["prediction"], add_special_tokens=False, return_offsets_mapping=True)
    room = max_length - len(prompt)
    offsets = encoded["offset_mapping"][:room]
    types = types_of_tokens(text["prediction"], offsets, text["errors"])
    return Marked(number, Row(prompt, tuple(encoded["input_ids"][:room])), types)


def halves(count: int, seed: int) -> list[list[int]]:
    """The numbers below `count` in two random halves."""
    order = random.Random(seed).sample(range(count), count)
    return [order[: count // 2], order[count // 2 :]]


def value_half(
    world: Real,
    plan: MarkPlan,
    answers: list[list[Marked]],
    target: list[Row],
    names: list[str],
    file: Path,
    digest: str,
) -> None:
    """Append the values of one half's batches by each score that the file does not hold."""

    def key(name: str, some: list[Marked]) -> str:
        return f"{digest}:{name}:{some[0].question}"

    there = runner.read_results(file)
    missing = [(some, [n for n in names if key(n, some) not in there]) for some in answers]
    missing = [(some, wanted) for some, wanted in missing if wanted]
    if not missing:
        return
    validation = [world.batch(rows) for rows in chunks(target, plan.batch)]
    model, targets = world.model(seed=plan.seed), {}
    tuned = world.model(seed=plan.seed)
    tune_reference(world, tuned, validation)
    tuned.set_adapter("ref")

    @functools.cache
    def path(config: AlphaTokenConfig) -> Any:
        return make_path(model, validation, config=config)

    for some, wanted in tqdm(missing, desc="batches", dynamic_ncols=True):
        batch = world.batch([answer.row for answer in some])
        generator = torch.Generator().manual_seed(some[0].question)
        with world.autocast():
            with torch.no_grad():
                reference = at_labels(tuned, batch)[1]
            scored = Scored(model, batch, validation, reference, path=path, generator=generator, targets=targets)
            for name in wanted:
                started = time.perf_counter()
                values = SCORES[name](scored)["total"].float().cpu()
                seconds = round(time.perf_counter() - started, 2)
                rows = [v[label != -100].tolist() for v, label in zip(values, batch["labels"].cpu(), strict=True)]
                entry = {
                    "questions": [a.question for a in some],
                    "values": [[float(f"{x:.6g}") for x in r] for r in rows],
                }
                runner.append(file, {"key": key(name, some), "score": name, **entry, "seconds": seconds})


def summary(answers: dict[int, Marked], values: dict[str, dict[int, list[float]]], boots: int = 1000) -> dict[str, Any]:
    """Areas by type of mark and over all, over the questions that every score has valued.

    Args:
        values: score -> question -> a value for each answer token.
    """
    numbers = sorted(set.intersection(*(set(found) for found in values.values())))
    types = [kinds for number in numbers for kinds in answers[number].types]
    groups = np.concatenate([[number] * len(answers[number].types) for number in numbers])
    # Low values are to mean marked.
    scores = {name: -np.concatenate([found[number] for number in numbers]) for name, found in values.items()}
    clean = np.array([not kinds for kinds in types])
    found: dict[str, Any] = {"questions": len(numbers), "tokens": len(types), "types": {}}
    for kind in ("any", *sorted(set().union(*types))):
        marked = np.array([bool(kinds) if kind == "any" else kind in kinds for kinds in types])
        told = marked | clean
        weights = list(draws(groups[told], boots))
        own = {
            name: (auc(score[told], marked[told]), areas(score[told], marked[told], weights))
            for name, score in scores.items()
        }
        found["types"][kind] = {"marked tokens": int(marked.sum()), "scores": _told(own)}
    marked = ~clean
    places = np.concatenate([np.arange(len(answers[number].types)) // STRATUM for number in numbers])
    weights = list(draws(groups, boots))
    at_place = {
        name: (auc(score, marked, strata=places), areas(score, marked, weights, places))
        for name, score in scores.items()
    }
    found["equal places"] = {"scores": _told(at_place)}
    within = {}
    for name, score in scores.items():
        own = np.array([auc(score[groups == number], marked[groups == number]) for number in numbers])
        own = own[np.isfinite(own)]
        rng = np.random.default_rng(0)
        within[name] = own.mean(), np.array([rng.choice(own, len(own)).mean() for _ in range(boots)])
    found["within answers"] = {"answers": len(own), "scores": _told(within)}
    return found


def _told(found: dict[str, tuple[float, np.ndarray]]) -> dict[str, Any]:
    """Each area with its interval, and its difference to the base's by the same draws."""
    told = {}
    for name, (area, drawn) in found.items():
        told[name] = {"auc": round(float(area), 4), "interval": _rounded(interval(drawn))}
        if BASE in found and name != BASE:
            own, base = found[name], found[BASE]
            told[name][f"minus {BASE}"] = round(float(own[0] - base[0]), 4)
            told[name][f"minus {BASE}, interval"] = _rounded(interval(own[1] - base[1]))
    return told


def _rounded(numbers: list[float]) -> list[float]:
    return [round(number, 4) for number in numbers]


def report(found: dict[str, Any]) -> str:
    columns = {kind: part["scores"] for kind, part in found["types"].items()}
    columns["equal places"] = found["equal places"]["scores"]
    columns["within answers"] = found["within answers"]["scores"]
    counts = {kind: f"{kind} ({part['marked tokens']})" for kind, part in found["types"].items()}
    rows = []
    for name in columns["any"]:
        cells = [f"{c[name]['auc']:.3f} [{c[name]['interval'][0]:.3f}, {c[name]['interval'][1]:.3f}]"
                 for c in columns.values()]  # fmt: skip
        rows.append([name, *cells])
    return table(["score", *(counts.get(kind, kind) for kind in columns)], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("ALPHATOKEN_REAL_DATA"), help="folder with spans/")
    parser.add_argument("--model", type=Path, help="folder of a model with a chat template (default SmolLM2-135M)")
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), help="only these (default all)")
    parser.add_argument("--batches", type=int, help="of answers, at most, of each half (default all)")
    parser.add_argument("--report", action="store_true", help="value nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of marks.json")
    parser.add_argument("--cache", type=Path, default=Path("outputs"), help="folder of the tokens' values")
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data (or ALPHATOKEN_REAL_DATA) must name a folder with spans/qa-feedback.jsonl")

    torch.set_num_threads(1)
    plan = MarkPlan()
    world = Real(args.model or load_smollm2(cached), RealPlan(), args.device, data=args.data)
    encoder = Encoder(world.folder)
    texts = read_rows(args.data, "spans/qa-feedback")
    names = args.scores or [name for name in SCORES if name not in LEFT_OUT]
    what = [asdict(plan), world.folder.name, json.dumps(texts, sort_keys=True), SYSTEM]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
    args.cache.mkdir(parents=True, exist_ok=True)
    file = args.cache / "marks.jsonl"
    parts = halves(len(texts), plan.seed)
    answers: dict[int, Marked] = {}
    for own, other in (parts, parts[::-1]):
        corrected = [t for t in (texts[i] for i in other) if t["corrected"]][: plan.target]
        target = [Row(encoder.prompt(t["question"], SYSTEM), encoder.answer(t["corrected"])) for t in corrected]
        mine = [marked_answer(i, texts[i], encoder, plan.max_length) for i in own if texts[i]["errors"]]
        answers |= {answer.question: answer for answer in mine}
        batches = chunks(sorted(mine, key=lambda answer: len(answer.types)), plan.batch)  # little padding
        random.Random(plan.seed).shuffle(batches)  # what a killed run leaves is a fair sample
        if not args.report:
            value_half(world, plan, batches[: args.batches], target, names, file, digest)
    values: dict[str, dict[int, list[float]]] = {}
    for key, row in runner.read_results(file).items():
        if key.startswith(digest) and row["score"] in names:
            values.setdefault(row["score"], {}).update(zip(row["questions"], row["values"], strict=True))
    if not values:
        print("Nothing has been valued yet.")
        return
    found = summary(answers, {name: values[name] for name in names if name in values})
    runner.write_json(args.output / "marks.json", {"about": runner.about(args.device), "plan": asdict(plan), **found})
    print(f"{found['questions']} answers, {found['tokens']} tokens: area under the ROC curve, 95 % interval\n")
    print(report(found))


if __name__ == "__main__":
    main()
