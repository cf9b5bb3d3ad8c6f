"""The toy world of tradeoff.py: text, tasks and a small base model, from files that ship with Python and what it needs.

- *Pretraining*: Python source (the standard library), English prose (the language reference, and the descriptions of
  installed packages), and little tasks made here ("reverse: d k a" -> "a k d"). Every tenth document is held out.
- *Target*: continue C++ (the headers of torch), a language that the base has not seen, in the form of an instruction.
  Files are divided: training, validation and test answers never come from one file.
- *Noise*, in training answers only: a polite line before the code, a forum footer after it, and a quarter of the code's
  tokens replaced at random. What each token is, is kept, for the oracle and for counting what a selection keeps.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tiny_lm import Pretraining, cached, pretrain, token_stream, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from .real_data import exchanged
from .rows import Pair, Row, as_batch, to_device
from .settings import Setting
from .training import measure
from .world import Exam, Plan, World

PACKAGES = ("accelerate", "bitsandbytes", "datasets", "numpy", "pandas", "peft", "torch", "tqdm", "transformers", "trl")
KINDS = ("code", "corrupted", "boilerplate", "junk")  # of response tokens; a token's kind is its place here
BASES = {
    "small": Pretraining(
        hidden_size=192, intermediate_size=384, num_layers=6, steps=1000, batch_size=16, code_sequences=5
    ),
    # About 60M parameters, for a GPU.
    "medium": Pretraining(
        vocab_size=4096,
        hidden_size=640,
        intermediate_size=1792,
        num_layers=12,
        steps=600,
        batch_size=48,
        code_sequences=15,
        seq_len=256,
        learning_rate=3e-3,
    ),
}
INSTRUCTION, ANSWER = "### Continue this C++ code\n", "\n### Answer\n"


@dataclass(frozen=True)
class Texts:
    """Documents by what they are used for."""

    prose: list[str]
    prose_heldout: list[str]
    code: list[str]
    code_heldout: list[str]
    cpp_train: list[str]
    cpp_validation: list[str]
    cpp_test: list[str]


def read_texts() -> Texts:
    paths = sysconfig.get_paths()
    described = [str(importlib.metadata.metadata(name).get_payload()) for name in PACKAGES]
    prose = [topics[name] for name in sorted(topics)] + [text for text in described if len(text) > 500]
    files = sorted(Path(paths["stdlib"]).glob("*.py"))
    code = [f.read_text(encoding="utf-8") for f in files if 8_000 < f.stat().st_size < 80_000]
    include = Path(torch.__file__).parent / "include"
    headers = sorted([*include.glob("torch/csrc/**/*.h"), *include.glob("c10/**/*.h")])
    cpp = [f.read_text(encoding="utf-8") for f in headers if 3_000 < f.stat().st_size < 40_000]
    return Texts(
        prose=[text for i, text in enumerate(prose) if i % 10],
        prose_heldout=prose[::10],
        code=[text for i, text in enumerate(code) if i % 10],
        code_heldout=code[::10],
        cpp_train=[text for i, text in enumerate(cpp) if i % 4 < 2],
        cpp_validation=cpp[2::4],
        cpp_test=cpp[3::4],
    )


def little_task(rng: random.Random) -> tuple[str, str]:
    """A prompt and its answer."""
    letters = [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(3, 7))]
    name, answer = rng.choice(
        [
            ("reverse", letters[::-1]),
            ("sort", sorted(letters)),
            ("capitals", [letter.upper() for letter in letters]),
            ("first and last", [letters[0], letters[-1]]),
            ("double", [letter for letter in letters for _ in range(2)]),
        ]
    )
    return f"### {name}: {' '.join(letters)}\n### Answer\n", " ".join(answer)


def make_base(texts: Texts, settings: Pretraining, device: str = "cpu") -> Path:
    """The folder of the base model and its tokenizer; trained where it is not cached."""

    def make() -> tuple[Any, Any]:
        rng = random.Random(settings.seed)
        tasks = ["".join(little_task(rng)) for _ in range(20_000)]
        tokenizer = train_tokenizer(texts.prose + texts.code[:30] + tasks[:500], settings.vocab_size)
        counts = settings.code_sequences, settings.batch_size - 2 * settings.code_sequences, settings.code_sequences
        streams = [token_stream(tokenizer, documents) for documents in (texts.code, texts.prose, tasks)]
        return pretrain(tokenizer, list(zip(streams, counts, strict=True)), settings, device), tokenizer

    return cached("tradeoff-base", [asdict(settings), texts.prose, texts.code], make)


def load_base(folder: Path, *, nf4: bool = False) -> Any:
    if not nf4:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)


def _runs(ids: list[int], length: int = 12) -> Iterator[tuple[int, ...]]:
    return zip(*(ids[start:] for start in range(length)), strict=False)


class Tasks:
    """Rows of the target task, of what is to be retained, and of the little tasks, in token ids.

    Args:
        prompt, answer (`int`): tokens of code in a row's prompt and in its answer.
        corrupted (`float`): share of the code tokens of a noisy answer that are replaced.
        heldout (`int`): pieces of prose, and of Python, that say what is retained.
    """

    def __init__(self, texts: Texts, folder: Path, *, prompt: int, answer: int, corrupted: float, heldout: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.prompt, self.answer, self.corrupted = prompt, answer, corrupted
        self.ends = self._ids(INSTRUCTION), self._ids(ANSWER)
        # Windows start where a line does, so that code looks like code.
        self.windows = {part: self._windows(getattr(texts, f"cpp_{part}")) for part in ("train", "validation", "test")}
        self.python = {"train": self._windows(texts.code), "test": self._windows(texts.code_heldout)}
        self.python["validation"] = self.python["train"]
        self.prose = self._unseen(texts.prose_heldout, texts.prose, heldout)
        self.code = self._unseen(texts.code_heldout, texts.code, heldout)

    def _ids(self, text: Any) -> Any:
        """The token ids of a text, or of each of a list of them."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _unseen(self, heldout: list[str], trained: list[str], count: int, length: int = 96) -> torch.Tensor:
        """`(count, length)`: pieces drawn from all held-out documents, no run of 12 tokens trained on."""
        seen = {run for document in trained for run in _runs(self._ids(document))}
        found = []
        for document in heldout:
            ids = self._ids(document)
            cut = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            found += [piece for piece in cut if seen.isdisjoint(_runs(piece))]
        return torch.tensor(random.Random(0).sample(found, count))

    def _windows(self, documents: list[str]) -> list[list[int]]:
        found = []
        for document in documents:
            lines = self._ids(document.splitlines(keepends=True))
            ids = [i for line in lines for i in line]
            starts = list(itertools.accumulate(map(len, lines)))[19:-1:4]
            found += [ids[s : s + self.prompt + self.answer] for s in starts]
        return [window for window in found if len(window) == self.prompt + self.answer]

    def _row(self, window: list[int]) -> Row:
        return Row(tuple(self.ends[0] + window[: self.prompt] + self.ends[1]), tuple(window[self.prompt :]))

    def clean(self, part: str, count: int, seed: int) -> list[Row]:
        """Rows of one part of the files, without noise."""
        return [self._row(window) for window in random.Random(seed).sample(self.windows[part], count)]

    def noisy(self, answer: Sequence[int], rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """An answer with a line before it, a footer behind it and some tokens replaced; and each token's kind."""
        user, score, number = rng.randrange(10**4), rng.randrange(100), rng.randrange(10**4)
        before = rng.choice(["Sure! Here is the code:\n", "Of course, this should do:\n", "Here you are:\n"])
        code = [rng.randrange(3, len(self.tokenizer)) if rng.random() < self.corrupted else i for i in answer]
        head, tail = self._ids(before), self._ids(f"\n-- user{user}, score {score}, #{number}")
        kinds = [2] * len(head) + [int(a != b) for a, b in zip(answer, code, strict=True)] + [3] * len(tail)
        return tuple(head + code + tail), tuple(kinds)

    def training(self, count: int, seed: int, *, noise: bool) -> list[Row]:
        rng = random.Random(seed)
        rows = self.clean("train", count, seed)
        return [Row(row.prompt, *self.noisy(row.answer, rng)) for row in rows] if noise else rows

    def pairs(self, part: str, count: int, seed: int, *, noise: bool) -> list[Pair]:
        """Prompts, the C++ that follows them, and Python: what the base would rather write."""
        rng = random.Random(seed)
        rows = self.clean(part, count, seed)
        others = [window[self.prompt :] for window in rng.sample(self.python[part], count)]
        found = []
        for row, other in zip(rows, others, strict=True):
            chosen, rejected = row.answer, tuple(other)
            if noise:
                chosen, rejected = self.noisy(chosen, rng)[0], self.noisy(rejected, rng)[0]
            found.append(Pair(row.prompt, chosen, rejected))
        return found

    def little(self, count: int, seed: int) -> list[Row]:
        rng = random.Random(seed)
        tasks = [little_task(rng) for _ in range(count)]
        return [Row(tuple(self._ids(prompt)), tuple(self._ids(answer))) for prompt, answer in tasks]


@dataclass(frozen=True)
class ToyPlan(Plan):
    heldout: int = 48  # pieces of prose and of Python, 96 tokens each
    prompt: int = 28  # tokens of code
    answer: int = 32
    corrupted: float = 0.25


@functools.cache
def texts_digest() -> str:
    """The base's folder tells its own text; this is all of it."""
    return hashlib.sha256(json.dumps(asdict(read_texts())).encode()).hexdigest()[:12]


@functools.cache
def _tasks(folder: Path, plan: ToyPlan) -> Tasks:
    sizes = {"prompt": plan.prompt, "answer": plan.answer, "heldout": plan.heldout}
    return Tasks(read_texts(), folder, **sizes, corrupted=plan.corrupted)


@dataclass(frozen=True)
class Toy(World):
    plan: ToyPlan = ToyPlan()

    kinds = KINDS

    @property
    def tasks(self) -> Tasks:
        return _tasks(self.folder, self.plan)

    @property
    def pad(self) -> int:
        return self.tasks.tokenizer.pad_token_id

    @property
    def data_name(self) -> str:
        return str(self.plan.prompt)

    def identity(self) -> list[Any]:
        return [self.folder.name, texts_digest()]

    def load(self, *, nf4: bool = False) -> Any:
        return load_base(self.folder, nf4=nf4)

    def prompts(self, count: int) -> list[list[int]]:
        return [list(row.prompt) for row in self.tasks.clean("train", count, seed=10**6)]

    def training(self, setting: Setting, seed: int) -> list[Any]:
        if setting.task == "dpo":
            return self.tasks.pairs("train", self.plan.pair_steps * self.plan.batch, seed, noise=setting.noise)
        rows = self.tasks.training(self.plan.steps * self.plan.batch, seed, noise=setting.noise)
        return exchanged(rows, random.Random(seed + 77), setting.exchanged) if setting.exchanged else rows

    def validation(self, setting: Setting, seed: int) -> list[Any]:
        if setting.task == "dpo":
            return self.tasks.pairs("validation", self.plan.validation, seed, noise=False)
        return self.tasks.clean("validation", self.plan.validation, seed)

    def test_rows(self) -> list[Row]:
        return self.tasks.clean("test", self.plan.test, seed=10**6)

    def test_pairs(self) -> list[Pair]:
        return self.tasks.pairs("test", self.plan.last_pairs, 10**6, noise=False)

    def exam(self, setting: Setting) -> Exam:
        """Loss, tokens right and rows right of the target task, of what is retained and of the little tasks."""
        tasks, count = self.tasks, self.plan.test
        sets = {
            "target": as_batch(self.test_rows(), self.pad),
            "prose": {"input_ids": tasks.prose, "labels": tasks.prose},
            "code": {"input_ids": tasks.code, "labels": tasks.code},
            "tasks": as_batch(tasks.little(count, seed=10**6), self.pad),
        }
        sets = {name: to_device(batch, self.device) for name, batch in sets.items()}

        def take(model: Any) -> dict[str, float]:
            found = {}
            for name, batch in sets.items():
                found[name], found[f"{name} tokens"], found[f"{name} rows"] = measure(model, [batch])
            kept = {k: v for k, v in found.items() if not k.endswith("rows") or k == "tasks rows"}
            return {**kept, "retention": (found["prose"] + found["code"]) / 2}

        return take
