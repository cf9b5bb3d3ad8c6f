"""A record of some valued batches of a run, from which `python -m alphatoken_loss report` is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...batches.batch import IGNORE, Batch
from ...batches.read import read_batch
from ...files import read_tensors, save_text, write_tensors
from ...gate.alphatoken import AlphaToken
from ...values import TokenValues

FOLDER = "_alphatoken_samples"  # Trainer.push_to_hub leaves out what begins with "_"; samples hold training data
METRICS_FILE = "metrics.jsonl"
_KIND = "alphatoken_loss.sample.1"


@dataclass(frozen=True)
class Sample:
    """A valued batch: the optimizer steps taken before it, the batch, its weights and its values."""

    step: int
    batch: dict[str, torch.Tensor]
    weights: torch.Tensor
    values: TokenValues


class SampleWriter:
    """Records valued batches and logged figures of a run in a folder, for `python -m alphatoken_loss report`.

    The trainers do this by themselves; a loop of your own calls `add` behind `backward`. The first batch of a step is
    recorded where the step is a multiple of `every`. As soon as there are more than `limit`, every other one is deleted
    and the distance doubles, so the record always covers the whole run.

    Args:
        run_dir (`str` or `Path`): folder of the run; the record is in its subfolder "_alphatoken_samples", which
            trainers do not push to the hub.
        every (`int`): optimizer steps between two samples, at least 1.
        limit (`int`): samples on the disk, at least 2.
        rows (`int`): rows of a batch that are recorded; pairs count as two.
        step (`int`): where the run starts. What an earlier run recorded from there on is deleted.

    Raises:
        ValueError: a number is too small.

    Example:
        >>> writer = SampleWriter("out", every=50)
        >>> for step, batch in enumerate(loader):
        ...     with alphatoken(batch):
        ...         model(**batch).loss.backward()
        ...     writer.add(step, batch, alphatoken)
    """

    def __init__(self, run_dir: str | Path, *, every: int = 50, limit: int = 64, rows: int = 8, step: int = 0) -> None:
        for name, value, least in (("every", every, 1), ("limit", limit, 2), ("rows", rows, 2), ("step", step, 0)):
            if value < least:
                raise ValueError(f"{name} is {value!r}; it must be at least {least}.")
        self.folder = Path(run_dir) / FOLDER
        self.every, self.limit, self.rows = every, limit, rows
        self.last = -1
        if self.folder.is_dir():
            self._forget_from(step)
            self._thin()

    def add(self, step: int, batch: Mapping[str, Any] | Batch, alphatoken: AlphaToken) -> bool:
        """Record the batch that was valued last, if it is its turn.

        Args:
            step (`int`): optimizer steps taken before this batch.
            batch (`Mapping`): the batch, as `alphatoken` was given it.
            alphatoken (`AlphaToken`): after `backward`.

        Returns:
            `bool`: whether it was recorded.
        """
        weights, values = alphatoken.weights, alphatoken.values
        if step % self.every or step == self.last or weights is None or values is None:
            return False
        read = read_batch(batch)
        if tuple(weights.shape) != read.shape:
            raise ValueError(
                f"alphatoken valued a batch of shape {tuple(weights.shape)}, and this one has {read.shape}."
            )
        self.last = step
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"step": str(step), "pairs": str(int(read.pairs))}
        path = self.folder / f"step-{step:09d}.safetensors"
        write_tensors(path, self._tensors(read, weights, values), kind=_KIND, about=about)
        self._thin()
        return True

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Record figures of a step, such as the loss and `alphatoken.metrics()` under "alphatoken/...", as one line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
        with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({**numbers, "step": step}) + "\n")

    def _tensors(self, batch: Batch, weights: torch.Tensor, values: TokenValues) -> dict[str, torch.Tensor]:
        size = batch.shape[0]
        take = torch.arange(min(size, self.rows))
        if batch.pairs:
            take = torch.arange(min(size // 2, self.rows // 2))
            take = torch.cat([take, take + size // 2])
        take = take.to(batch.labels.device)
        tensors = {"labels": batch.labels, "weights": weights.float()}
        for name in ("input_ids", "attention_mask", "position_ids"):
            if isinstance(batch.inputs.get(name), torch.Tensor) and batch.inputs[name].dim() == 2:
                tensors[name] = batch.inputs[name].expand(batch.shape)
        for field in fields(TokenValues):
            if getattr(values, field.name) is not None:
                tensors[f"values.{field.name}"] = getattr(values, field.name).float()
        return {name: tensor[take.to(tensor.device)].contiguous() for name, tensor in tensors.items()}

    def _thin(self) -> None:
        while len(files := _files(self.folder)) > self.limit:
            self.every *= 2
            for step, file in files.items():
                if step % self.every:
                    file.unlink(missing_ok=True)

    def _forget_from(self, step: int) -> None:
        for number, file in _files(self.folder).items():
            if number >= step:
                file.unlink(missing_ok=True)
        log = self.folder / METRICS_FILE
        if log.is_file():
            lines = "".join(json.dumps(figures) + "\n" for figures in read_log(log) if figures["step"] <= step and step)
            save_text(log, lines)


def read_samples(run_dir: str | Path) -> Iterator[Sample]:
    """The samples of a run, by step.

    Raises:
        ValueError: a file of theirs is cut short, or another one.
    """
    for step, path in _files(Path(run_dir) / FOLDER).items():
        tensors, about = read_tensors(path, kind=_KIND, what="sample of a run (delete it to go on without)")
        pairs = about["pairs"] == "1"
        batch: dict[str, torch.Tensor] = {
            n: tensors[n] for n in ("input_ids", "attention_mask", "position_ids") if n in tensors
        }
        if pairs:
            batch["completion_mask"] = (tensors["labels"] != IGNORE).long()
        else:
            batch["labels"] = tensors["labels"]
        values = {n.removeprefix("values."): t for n, t in tensors.items() if n.startswith("values.")}
        yield Sample(step, batch, tensors["weights"].float(), TokenValues(**values))


def read_log(path: Path) -> list[dict[str, float]]:
    """Lines of figures; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(figures, dict) and "step" in figures:
            lines.append(figures)
    return lines


def _files(folder: Path) -> dict[int, Path]:
    """Step -> file, ascending."""
    found = {path.stem.removeprefix("step-"): path for path in sorted(folder.glob("step-*.safetensors"))}
    return {int(number): path for number, path in found.items() if number.isdecimal()}
