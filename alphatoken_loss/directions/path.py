"""theta*, the end of the path: the adapter after some steps on validation examples and drift (follow.py)."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig
from ..files import read_tensors, write_tensors
from ..losses.logps import token_logps
from ..models.changes import Changes, undoing
from ..models.modes import without_noise
from ..models.sites import Scored, find_scored
from ..models.structure import name_in, unwrap
from ..models.tensors import accumulation_dtype
from .fisher import base_of, check_same_base

_FORMAT = "alphatoken_loss.path.1"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Path:
    """theta*, the end of a path.

    Attributes:
        parameters (`dict`): parameter name, as in `model.named_parameters()`, -> its value at theta*, of the
            parameter's shape, in float32 (float64 for a float64 model).
        steps (`int`): how many steps lead to it.
        rate (`float`): Adam's learning rate in them, which a trial may have found; 0 where it is not known.
        base (`tuple`): some numbers of the model's input embedding, by which another model is recognised.
    """

    parameters: Mapping[str, torch.Tensor]
    steps: int = 0
    base: tuple[float, ...] = ()
    rate: float = 0.0

    def __repr__(self) -> str:
        rate = f" at a rate of {self.rate:g}" if self.rate else ""
        return f"<Path: {len(self.parameters)} parameters, {self.steps} steps from its start{rate}>"

    @classmethod
    def of_adapter(cls, model: nn.Module, adapter: str, *, config: AlphaTokenConfig | None = None) -> Path:
        """Take an adapter that was trained before as theta* for the one in training.

        Args:
            model (`nn.Module`): a PEFT model that holds both, the one in training being active.
            adapter (`str`): its name, of the same kind, shape and scaling.

        Raises:
            ValueError: there is no adapter of that name; it lacks a scored parameter, or has what the other has not; or
                its layers scale what they add otherwise.
        """
        config = config or AlphaTokenConfig(estimator="path")
        scored = find_scored(model, config.scored_layers, config.scope)
        inner = unwrap(model)
        known, active = list(getattr(inner, "peft_config", {})), getattr(inner, "active_adapter", None)
        if adapter not in known or adapter == active or not isinstance(active, str):
            raise ValueError(
                f"path is the adapter {adapter!r}; the model's adapters are {known}, of which {active!r} is in "
                "training. Name another one of them, or give a Path."
            )
        own = dict(inner.named_parameters())
        names = {name: name_in(adapter, name, active, own) for name in scored.parameters}
        found = {name: own[other].detach().clone() for name, other in names.items() if other is not None}
        path = cls(accumulated(found), base=base_of(inner))
        path.check(scored)
        _check_alike(inner, own, active, adapter)
        return path

    def apply(self, model: nn.Module) -> None:
        """Write theta* into the model's parameters, so that training starts there. Call it before the first step.

        Raises:
            ValueError: the model has no parameter of a name, or one of another shape.
        """
        own = self._places(unwrap(model))
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                own[name].copy_(tensor)

    def _places(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by name; those of the path are among them."""
        own = dict(model.named_parameters())
        for name, tensor in self.parameters.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(
                    f"The model has no parameter {name} of shape {tuple(tensor.shape)}. {_MADE_FOR_ANOTHER}"
                )
        return own

    @undoing
    def logps(self, model: nn.Module, batch: Mapping[str, Any] | Batch) -> torch.Tensor:
        """Log-probabilities of a batch's labels at theta*, without dropout: what `path_logps` of a batch holds.

        What is trained and no part of theta* (with `num_layers`) stays as it is.

        Returns:
            `torch.Tensor`: `(B, T)` float32 (float64 for a float64 model) in nats, aligned with the labels, 0 where
            there is none; chosen rows first for pairs.

        Raises:
            ValueError: the model has no parameter of a name, or one of another shape.
        """
        read = read_batch(batch)
        inner = unwrap(model)
        own = self._places(inner)
        placed = {name: tensor.to(own[name]) for name, tensor in self.parameters.items()}
        with torch.no_grad(), without_noise(inner):
            return run_at(inner, placed, lambda m: token_logps(m, read))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"steps": self.steps, "base": self.base, "rate": self.rate})
        write_tensors(path, self.parameters, kind=_FORMAT, about={"about": about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Path:
        """Read what `save` wrote. That it fits a model is checked when it is first used with one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved path.
        """
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"No path at {path}. Make one with make_path(...).save(path).")
        found, about = read_tensors(path, kind=_FORMAT, what="saved path")
        saved = json.loads(about["about"])
        return cls(found, saved["steps"], tuple(saved["base"]), saved.get("rate", 0.0))

    def check(self, scored: Scored) -> None:
        """Check that it was made for these scored parameters.

        Raises:
            ValueError: it lacks a scored parameter, has one more, or one of another shape; or it is not finite.
        """
        for name, parameter in scored.parameters.items():
            there = self.parameters.get(name)
            if there is None or there.shape != parameter.shape:
                came = "nothing" if there is None else f"a tensor of shape {tuple(there.shape)}"
                raise ValueError(
                    f"The path has {came} for the scored parameter {name} of shape {tuple(parameter.shape)}. "
                    f"{_MADE_FOR_ANOTHER}"
                )
            if not there.isfinite().all():
                raise ValueError(f"The path's {name} is not finite. Make it again, with a lower path_rate.")
        beyond = [name for name in self.parameters if name not in scored.parameters]
        if beyond:
            raise ValueError(f"The path moves {beyond[0]}, which is not scored. {_MADE_FOR_ANOTHER}")

    def check_base(self, model: nn.Module) -> None:
        """Check, by the input embedding, that it was made for this base model; precision does not matter.

        Raises:
            ValueError: the embedding is another one.
        """
        check_same_base(self.base, model, "path")

    def to(self, device: torch.device) -> Path:
        """The same with its tensors on `device`; itself if they are there already."""
        if all(tensor.device == device for tensor in self.parameters.values()):
            return self
        return replace(self, parameters={name: tensor.to(device) for name, tensor in self.parameters.items()})


_MADE_FOR_ANOTHER = (
    "It was made for another model, adapter or num_layers: make it again with make_path(model, batches, config=config)."
)


def _check_alike(model: nn.Module, own: Mapping[str, nn.Parameter], active: str, adapter: str) -> None:
    """See that one adapter's parameters, in the place of the other's, are the same function."""
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        both = [scaling[one] for one in (active, adapter) if one in scaling] if isinstance(scaling, dict) else []
        if len(set(both)) > 1:
            raise ValueError(
                f"{name} scales what the adapter {active!r} adds by {both[0]:g} and what {adapter!r} adds by "
                f"{both[1]:g}, so that these parameters mean another function in each. Train path's adapter with the "
                "same r, lora_alpha and use_rslora."
            )
    beyond = [name for name in own if f".{adapter}." in name and name_in(active, name, adapter, own) is None]
    if beyond:
        raise ValueError(
            f"path's adapter {adapter!r} has {beyond[0]}, which {active!r} in training has not. Give one of the same "
            "configuration."
        )


def run_at(model: nn.Module, moved: Mapping[str, torch.Tensor], run: Callable[[nn.Module], _T]) -> _T:
    """`run(model)` with `moved` in the place of parameters of these names; theirs are never written to."""
    with Changes() as changes:  # functional_call would leave them there if Ctrl-C cut its end short
        changes.replace_named(model, moved)
        return run(model)


def accumulated(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(accumulation_dtype(tensor)) for name, tensor in named.items()}
