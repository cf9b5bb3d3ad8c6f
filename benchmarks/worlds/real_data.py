"""Public data in token ids and parts, and the noise that is put into training parts.

Data is read from a folder of JSON Lines (`sft/nl2bash.jsonl` of `prompt` and `completion`, `preference/...` of
`prompt`, `chosen` and `rejected`, `retention/...`), or from the hub where a set lies there. Rows are divided by their
prompt (preferences: their question), so that no prompt is in two parts: test and dev (rates are chosen on it) are
fixed, the validation examples that say what the target is are drawn by the seed from a part of their own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from .rows import Pair, Row
from .world import Plan

Text = dict[str, Any]
T = TypeVar("T")
# What is done to training rows, by the ending of a world's name.
NOISES = ("", "exchanged", "boilerplate", "flipped")
SHARE = 0.3  # of training rows whose answers are exchanged, and of pairs that are flipped
SYSTEM = {
    "nl2bash": "Answer with one bash command.",
    "gsm8k": "Solve the problem. End with #### and the number.",
    "solutions": "Solve the problem.",
    "pandalm": "Answer the request.",
}
FILES = {  # of a data folder, or else on the hub: (set, configuration, split)
    "sft/nl2bash": ("jiacheng-ye/nl2bash", None, "train"),
    "sft/gsm8k-train": ("openai/gsm8k", "main", "train"),
    "sft/gsm8k-test": ("openai/gsm8k", "main", "test"),
}
BEFORE = ("Sure! Here is what you are looking for:\n", "Of course! This should do it:\n", "Here you are:\n")
AFTER = ("\nLet me know if you need anything else!", "\nI hope this helps.", "\nHave a great day!")


@dataclass(frozen=True)
class RealPlan(Plan):
    steps: int = 60
    pair_steps: int = 60
    measured_at: tuple[float, ...] = (0.5, 1.0)
    test: int = 96  # rows; of pairs half as many, here and below
    dev: int = 48
    pool: int = 256  # rows that validation examples are drawn from
    answers: int = 60  # greedy ones that are compared
    new_tokens: int = 48
    heldout: int = 24  # pieces of WikiText-2, 128 tokens each
    harness: int = 24  # items of each of the harness's tasks
    max_length: int = 160
    reference_lr: float = 5e-4
    fisher_prompts: int = 64


def read_rows(data: str | None, name: str) -> list[Text]:
    """The rows of a file of the data folder, or where no folder is given of the hub's set."""
    if data:
        with (Path(data) / f"{name}.jsonl").open(encoding="utf-8") as lines:  # not splitlines: texts hold U+2028
            return [json.loads(line) for line in lines]
    if name not in FILES:
        raise ValueError(f"{name} has no set on the hub that this reads. Give --data with a folder of {name}.jsonl.")
    from datasets import load_dataset

    path, configuration, split = FILES[name]
    renamed = {"nl": "prompt", "bash": "completion", "question": "prompt", "answer": "completion"}
    return [{renamed.get(k, k): v for k, v in row.items()} for row in load_dataset(path, configuration, split=split)]


def divide(rows: Sequence[T], key: Callable[[T], Hashable], sizes: dict[str, int], seed: int = 0) -> dict[str, list[T]]:
    """Parts of at least these numbers of rows, and "train" of the rest; all rows of one key are in one part."""
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    parts: dict[str, list[T]] = {}
    for name, size in sizes.items():
        parts[name] = []
        while len(parts[name]) < size and order:
            parts[name] += order.pop()
    return {**parts, "train": [row for group in order for row in group]}


def some_of(count: int, share: float, rng: random.Random) -> list[int]:
    """That share of the places below `count`, at random."""
    return rng.sample(range(count), round(share * count))


def exchanged(rows: list[Row], rng: random.Random, share: float = SHARE) -> list[Row]:
    """A share of the rows get the answer of another of them, of kind 1."""
    found, places = list(rows), some_of(len(rows), share, rng)
    for place, other in zip(places, places[1:] + places[:1], strict=True):
        answer = rows[other].answer
        found[place] = Row(rows[place].prompt, answer, (1,) * len(answer))
    return found


def flipped(pairs: list[Pair], rng: random.Random, share: float = SHARE) -> list[Pair]:
    """A share of the pairs have chosen and rejected swapped."""
    found = list(pairs)
    for place in some_of(len(pairs), share, rng):
        pair = pairs[place]
        found[place] = Pair(pair.prompt, pair.rejected, pair.chosen)
    return found


def without_calculator(text: str) -> str:
    """GSM8K's solutions without their annotations, as in `4 + 3 = <<4+3=7>>7`."""
    return re.sub(r"<<.*?>>", "", text)


def number_of(text: str) -> str | None:
    """The final number of a solution: what stands after ####, else the last one."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text.split("####")[-1])
    return found[-1].replace(",", "").rstrip(".") if found else None


class Encoder:
    """Texts -> token ids by the model's chat template, an answer ending with the end of its turn."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end = self.tokenizer.eos_token_id

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str, system: str) -> tuple[int, ...]:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return self.ids(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def answer(self, text: str) -> tuple[int, ...]:
        return (*self.ids(text), self.end)


class Source:
    """One data set in token ids and parts; rows longer than the plan's length are left out.

    Attributes:
        parts (`dict`): "train", "test", "dev" and "pool" -> rows or pairs.
        left_out (`int`): rows that were too long or lacked an answer.
    """

    def __init__(self, name: str, data: str | None, encoder: Encoder, plan: RealPlan) -> None:
        self.encoder, self.plan, self.left_out = encoder, plan, 0
        system = SYSTEM[name]
        sizes = {"test": plan.test, "dev": plan.dev, "pool": plan.pool}
        if name in ("solutions", "pandalm"):
            file = {"solutions": "gsm8k-solutions", "pandalm": "pandalm"}[name]
            texts = read_rows(data, f"preference/{file}")
            pairs = [(t.get("question", t["prompt"]), self._pair(t, system)) for t in texts]
            pairs = [(question, pair) for question, pair in pairs if pair]
            # Small sets: most is trained on.
            sizes = {part: min(size // 2, len(pairs) // 5) for part, size in sizes.items()}
            divided = divide(pairs, lambda p: p[0], sizes)
            self.parts = {part: [pair for _, pair in pairs] for part, pairs in divided.items()}
        else:
            first = "gsm8k-train" if name == "gsm8k" else name
            if name == "gsm8k":
                sizes.pop("test")
            parts = divide(self._rows(read_rows(data, f"sft/{first}"), system), lambda row: row.prompt, sizes)
            if name == "gsm8k":
                parts["test"] = self._rows(read_rows(data, "sft/gsm8k-test"), system)[: plan.test]
            self.parts = parts

    def _short(self, prompt: tuple[int, ...], *answers: tuple[int, ...]) -> bool:
        fits = len(prompt) + max(map(len, answers)) <= self.plan.max_length and min(map(len, answers)) > 1
        self.left_out += not fits
        return fits

    def _rows(self, texts: list[Text], system: str) -> list[Row]:
        made = [Row(self.encoder.prompt(t["prompt"], system),
                    self.encoder.answer(without_calculator(t["completion"]))) for t in texts]  # fmt: skip
        return [row for row in made if self._short(row.prompt, row.answer)]

    def _pair(self, text: Text, system: str) -> Pair | None:
        prompt = self.encoder.prompt(text["prompt"], system)
        texts = [
            "" if text[side] is None else str(text[side]) for side in ("chosen", "rejected")
        ]  # PandaLM: null, true
        sides = [self.encoder.answer(without_calculator(side)) for side in texts]
        return Pair(prompt, *sides) if self._short(prompt, *sides) and sides[0] != sides[1] else None


@functools.cache
def encoder_of(folder: Path) -> Encoder:
    return Encoder(folder)


@functools.cache
def source_of(name: str, data: str | None, folder: Path, plan: RealPlan) -> Source:
    return Source(name, data, encoder_of(folder), plan)


@functools.cache
def digest_of(name: str, data: str | None) -> str:
    files = {"gsm8k": ["sft/gsm8k-train", "sft/gsm8k-test"], "nl2bash": ["sft/nl2bash"]}
    files |= {"solutions": ["preference/gsm8k-solutions"], "pandalm": ["preference/pandalm"]}
    rows = [read_rows(data, file) for file in files[name]]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]


def wikitext(data: str | None, encoder: Encoder, count: int, length: int = 128) -> list[Row]:
    """`count` pieces of the test part, `length` tokens each, evenly spread; every token but the first is predicted."""
    if data:
        text = (Path(data) / "retention" / "wikitext2-test.txt").read_text(encoding="utf-8")
    else:
        from datasets import load_dataset

        text = "".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])
    ids = encoder.ids(text)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    chosen = pieces[:: max(len(pieces) // count, 1)][:count]
    return [Row(piece[:1], piece[1:]) for piece in chosen]
