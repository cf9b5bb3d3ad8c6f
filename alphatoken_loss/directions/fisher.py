"""The reference's diagonal Fisher (arXiv 2606.01635, Eq. 5).

For a linear with input h and output gradient d at a response token, the dense Fisher is the mean over prompts of the
sum over sampled tokens of (d * d)(h * h)^T. The factored form keeps its row sums, column sums and total: F = row
col^T / total, the rank-one matrix with the same marginals (Adafactor, arXiv 1804.04235, section 3).

Parameters that are not the weight of a linear (other adapters, norms, biases, embeddings) have the diagonal of their
own Fisher: the mean over prompts of the squared gradient of the whole completion's log-likelihood. The gradients of
tokens that are sampled one after the other are uncorrelated, so its expectation is the same sum over tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import read_tensors, write_tensors
from ..models.sites import Scored
from ..models.start import NOWHERE_ELSE, Start
from ..models.structure import causal_lm
from ..models.tensors import positive

_FORMAT = "alphatoken_loss.fisher.1"


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of the scored layers' weights at the reference.

    Attributes:
        factors (`dict`): module name, as in `model.named_modules()` (the LoRA layer, or the plain linear), ->
            `(row, column)`, of shapes `(d_out,)` and `(d_in,)` with equal sums, when factored, or `(diagonal,)` of
            shape `(d_out, d_in)` when dense. Units: squared gradient of the log-likelihood, per prompt.
        prompts (`int`): over how many prompts it was averaged.
        base (`tuple`): some numbers of the model's input embedding, by which another model is recognised.
        others (`dict`): for scored parameters that are neither LoRA nor a linear's weight, name, as in
            `model.named_parameters()`, -> `(diagonal, reference)` of the parameter's shape: its Fisher, and the value
            it had when this was estimated, from which its drift is measured.
        start (`Start`): where training started, for models that adapters off do not take back there. A run that is
            resumed with this Fisher measures its drift from this start, and uses it as its reference.
    """

    factors: Mapping[str, tuple[torch.Tensor, ...]]
    prompts: int = 0
    base: tuple[float, ...] = ()
    others: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    start: Start = NOWHERE_ELSE

    def __repr__(self) -> str:
        others = f", {len(self.others)} other parameters" if self.others else ""
        return f"<Fisher, {self.form}: {len(self.factors)} modules{others}, from {self.prompts} prompts>"

    @property
    def names(self) -> list[str]:
        """Names of the modules in it."""
        return list(self.factors)

    @property
    def form(self) -> str:
        """`"factored"` or `"dense"`."""
        return "dense" if all(len(factor) == 1 for factor in self.factors.values()) else "factored"

    def diagonal(self, name: str) -> torch.Tensor:
        """The `(d_out, d_in)` diagonal that stands for one module, written out.

        Raises:
            KeyError: the module is not covered.
        """
        if name not in self.factors:
            raise KeyError(f"The Fisher has no module {name!r}; it covers {_some(self.names)}.")
        factor = self.factors[name]
        if len(factor) == 1:
            return factor[0]
        row, column = factor
        return torch.outer(row, column / positive(row.sum()))

    @classmethod
    def from_diagonals(cls, diagonals: Mapping[str, torch.Tensor], *, prompts: int = 0) -> Fisher:
        """A dense Fisher from `(d_out, d_in)` diagonals by module name."""
        return cls({name: (diagonal,) for name, diagonal in diagonals.items()}, prompts)

    def factored(self) -> Fisher:
        """The factored form: the same row and column sums, rank one."""
        factors = {name: f if len(f) == 2 else (f[0].sum(1), f[0].sum(0)) for name, f in self.factors.items()}
        return replace(self, factors=factors)

    def to(self, device: torch.device) -> Fisher:
        """The same with its tensors on `device`; itself if they are there already."""
        held: tuple[Mapping[str, tuple[torch.Tensor, ...]], ...] = (self.factors, self.others)
        if all(tensor.device == device for named in held for tensors in named.values() for tensor in tensors):
            return self
        factors = {name: tuple(part.to(device) for part in parts) for name, parts in self.factors.items()}
        others = {name: (diagonal.to(device), start.to(device)) for name, (diagonal, start) in self.others.items()}
        return replace(self, factors=factors, others=others)

    def state_dict(self) -> dict[str, Any]:
        """Its fields but for the start, in what `torch.save` keeps."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "start"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {f"{n}|{part}": tensor for n, factor in self.factors.items() for part, tensor in enumerate(factor)}
        for name, pair in self.others.items():
            tensors |= {f"{name}|other{part}": tensor for part, tensor in enumerate(pair)}
        tensors |= {f"{name}|start": tensor for name, tensor in self.start.tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        told_by = None if self.start.base is None else self.start.base.tolist()
        start = {"adapters_on": self.start.adapters_on, "base": told_by}
        about = json.dumps({"prompts": self.prompts, "base": self.base, "start": start})
        write_tensors(path, tensors, kind=_FORMAT, about={"about": about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read what `save` wrote. That it fits a model is checked when it is first used with one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved Fisher.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No Fisher at {path}. Make one with estimate_fisher(...).save(path).")
        tensors, about = read_tensors(Path(path), kind=_FORMAT, what="saved Fisher")
        factors: dict[str, tuple[torch.Tensor, ...]] = {}
        others: dict[str, Any] = {}
        started: dict[str, torch.Tensor] = {}
        for key in sorted(tensors):  # part 0 before part 1
            name, _, part = key.rpartition("|")
            if part == "start":
                started[name] = tensors[key]
                continue
            into = others if part.startswith("other") else factors
            into[name] = (*into.get(name, ()), tensors[key])
        saved = json.loads(about["about"])
        start = NOWHERE_ELSE
        if started:
            base = saved["start"]["base"]
            told_by = None if base is None else torch.tensor(base, dtype=torch.float64)
            start = Start(started, saved["start"]["adapters_on"], told_by)
        return cls(factors, saved["prompts"], tuple(saved["base"]), others, start)

    def check(self, scored: Scored) -> None:
        """Check that it was made for these scored modules.

        Raises:
            ValueError: the modules are not the scored ones, or a shape differs.
        """
        beyond = sorted(set(self.factors) - {site.name for site in scored.sites}) + sorted(
            set(self.others) - set(scored.others)
        )
        if beyond:
            raise ValueError(
                f"The Fisher covers {beyond[0]} ({len(beyond)} such entries), which is not scored. It was made for "
                "another model, adapter layout, estimator or num_layers: estimate it again with this config."
            )
        for name, parameter in scored.others.items():
            if name not in self.others or self.others[name][0].shape != parameter.shape:
                raise ValueError(
                    f"The Fisher has no entry of shape {tuple(parameter.shape)} for the scored parameter {name}. It "
                    "was made for another model, adapter layout, estimator or num_layers: estimate it again with this "
                    "config."
                )
        for site in scored.sites:
            if site.name not in self.factors:
                raise ValueError(
                    f"The Fisher has no entry for the scored module {site.name}; it covers {_some(self.names)}. It was "
                    "made for another model, adapter layout or num_layers: estimate it again with this config."
                )
            factor = self.factors[site.name]
            came = tuple(factor[0].shape) if len(factor) == 1 else (len(factor[0]), len(factor[1]))
            if came != site.shape:
                raise ValueError(
                    f"The Fisher of {site.name} is for a weight of shape {came}, the model's is {site.shape}. It was "
                    "made for another model: estimate it again."
                )

    def check_base(self, model: nn.Module) -> None:
        """Check, by the input embedding, that it was made for this base model; precision does not matter.

        Raises:
            ValueError: the embedding is another one.
        """
        check_same_base(self.base, model, "Fisher")


def check_same_base(made_for: Sequence[float], model: nn.Module, what: str) -> None:
    """Raise ValueError if the Fisher or the path was made with another base model (see `base_of`).

    An input embedding that is trained moves away from what it was, and tells nothing.
    """
    if causal_lm(model).get_input_embeddings().weight.requires_grad:  # type: ignore[operator]
        return
    here, made = torch.tensor(base_of(model)), torch.tensor(made_for)
    if len(made) and (made - here).norm() > 0.1 * made.norm():
        raise ValueError(
            f"The {what} was made for another base model: its input embedding differs from this model's. Make it again."
        )


def base_of(model: nn.Module) -> tuple[float, ...]:
    weight = causal_lm(model).get_input_embeddings().weight.detach()  # type: ignore[operator]
    places = torch.linspace(0, weight.numel() - 1, 64, dtype=torch.float64).long().to(weight.device)
    return tuple(weight[places // weight.shape[-1], places % weight.shape[-1]].double().tolist())


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} modules" + (f", such as {names[0]}" if names else "")
