"""What a run asks of a world, and what all worlds have alike. Worlds are small frozen records, so that processes can be
told of them; what they read is kept by each process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import alphatoken_loss
from alphatoken_loss import AlphaTokenConfig, Fisher, estimate_fisher

from .rows import Batch, Pair, Row, as_batch, pair_batch, to_device
from .settings import Setting

Exam = Callable[[Any], dict[str, float]]


@functools.cache
def _code() -> bytes:
    """Of the library's core and of this folder."""
    package = Path(alphatoken_loss.__file__).parent
    rooms = (*(package / room for room in ("batches", "models", "losses", "directions")), Path(__file__).parent)
    files = sorted(file for room in rooms for file in room.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


@dataclass(frozen=True)
class Plan:
    """What all runs share, in every world."""

    steps: int = 80
    batch: int = 8  # training rows, or pairs
    measured_at: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0)  # shares of the steps
    validation: int = 32  # clean examples of the target task
    test: int = 48
    last_pairs: int = 512  # test pairs before the first step and after the last; along the way the first `test` of them
    pair_steps: int = 50
    mixed: int = 2  # validation rows in a batch of the selection "mixed"
    reference_steps: int = 16  # that RHO-1's reference is tuned for on the validation examples
    reference_lr: float = 3e-3
    fisher_prompts: int = 256
    fisher_tokens: int = 32
    beta: float = 0.1

    def moments(self, steps: int) -> set[int]:
        return {round(share * steps) for share in self.measured_at}


@dataclass(frozen=True)
class World(ABC):
    """A model, the data it is tuned on, and what is measured of it.

    Attributes:
        folder (`Path`): of the base model and its tokenizer; Fishers are kept there too.
        kinds: names of the kinds of answer tokens.
        name: of the world, in results.
    """

    folder: Path
    plan: Plan
    device: str = "cpu"

    kinds = ("answer",)
    name = "toy"

    @abstractmethod
    def identity(self) -> list[Any]:
        """All that decides a run beside setting, rate, seed, plan and device, in JSON."""

    @abstractmethod
    def load(self, *, nf4: bool = False) -> Any:
        """The base model."""

    @property
    @abstractmethod
    def pad(self) -> int: ...

    @abstractmethod
    def prompts(self, count: int) -> list[list[int]]:
        """Of the training data, for the Fisher."""

    @abstractmethod
    def training(self, setting: Setting, seed: int) -> list[Any]:
        """`Row`s (`Pair`s for DPO) of all steps, in their order."""

    @abstractmethod
    def validation(self, setting: Setting, seed: int) -> list[Any]:
        """Clean rows (pairs)."""

    @abstractmethod
    def exam(self, setting: Setting) -> Exam:
        """What is measured of a model along the way, by name."""

    @abstractmethod
    def test_rows(self) -> list[Row]:
        """Clean answers that nothing was trained on."""

    def test_pairs(self) -> list[Pair]:
        return []

    def dev_pairs(self) -> list[Pair]:
        """For choosing a learning rate."""
        return []

    def last_exam(self, setting: Setting) -> Exam | None:
        """What is measured before the first step and after the last one only."""
        return None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around every forward."""
        return contextlib.nullcontext()

    def batch(self, rows: list[Row]) -> Batch:
        return to_device(as_batch(rows, self.pad), self.device)

    def pair_batch(self, pairs: list[Pair]) -> Batch:
        return to_device(pair_batch(pairs, self.pad), self.device)

    def model(self, *, seed: int, nf4: bool = False) -> Any:
        """The base with a fresh adapter, in training mode: 4-bit linears must not run in another on a CPU."""
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.load(nf4=nf4).to(self.device), lora).train()

    def base_identity(self) -> list[Any]:
        """What decides what the base says, and what a few steps from it lead to, beside the rows, in JSON."""
        precision = torch.get_autocast_dtype(self.device.partition(":")[0]) if self._autocasts() else torch.float32
        return [self.device, str(precision), self.plan.batch]

    def _autocasts(self) -> bool:
        with self.autocast():
            return torch.is_autocast_enabled(self.device.partition(":")[0])

    def kept(self, name: str, what: list[Any], kind: str) -> Path:
        """A file beside the base for what is made once, by a digest of all that decides it: code too."""
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        digest.update(_code())
        return self.folder / f"{name}-{digest.hexdigest()[:16]}.{kind}"

    def fisher_path(self, config: AlphaTokenConfig) -> Path:
        size = f"{self.plan.fisher_prompts}x{self.plan.fisher_tokens}"
        return self.folder / f"fisher-{self.data_name}-{config.scored_layers}-{config.fisher}-{size}.safetensors"

    @property
    def data_name(self) -> str:
        """Of the data that Fisher prompts are taken from, in file names."""
        return "data"

    def fisher(self, config: AlphaTokenConfig) -> Fisher:
        """The base's Fisher in the form that the config uses, estimated once and kept beside the base."""
        path = self.fisher_path(config)
        if not path.is_file():
            model = self.model(seed=0)
            prompts = self.prompts(self.plan.fisher_prompts)
            with self.autocast():
                found = estimate_fisher(
                    model, prompts, max_new_tokens=self.plan.fisher_tokens, batch_size=32, config=config
                )
            found.save(path)
        return Fisher.load(path)
