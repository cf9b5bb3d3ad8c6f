"""Which models and adapters each estimator is right on, found by running every one of them.

    python benchmarks/compatibility.py                       # what is not in the results yet; minutes of one core
    python benchmarks/compatibility.py --only OLMo --fresh   # those again whose name has this in it

Every architecture is built from a small configuration with random weights and LoRA on its linears, every adapter on a
small Llama. Each meets each estimator in three checks, on a padded batch of three sequences:

- gradient: that of a step through the gate is that of the loss masked explicitly;
- values: those of the difference and exact estimators are the inner products of an explicit target gradient with one
  explicit backward per token; those of the path are the differences of two explicit forwards; those of the ghost, which
  values positions and not tokens, sum over a sequence to the sum of such backwards where every token is an answer
  (all blocks, no causal window). All without the drift term, which tests/ covers;
- checkpointing: the first check again under non-reentrant gradient checkpointing, with the same values.

A cell holds "passed", "failed", "refused" (an error that this library raises, with its message) or "not tried" (what
the model itself cannot do, in its words), and the largest error over the largest expected entry.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from compatibility_cases import ADAPTERS, ARCHITECTURES, DIFFERENCE, VOCAB, Case
from results import FOLDER, write
from torch import nn

import alphatoken_loss
from alphatoken_loss import AlphaToken, AlphaTokenConfig, alphatoken_weights, target_gradient
from alphatoken_loss import Path as ThetaPath

Batch = dict[str, torch.Tensor]
ESTIMATORS = ("ghost", "difference", "exact", "path")
INVOKED = 7  # stands in every sequence: what adapters that wait for a token wait for
CHECKS = ("gradient", "values", "checkpointing")
PACKAGE = str(Path(alphatoken_loss.__file__).parent)
# Norms and rotations compute in float32 whatever they are given.
TOLERANCE = {"gradient": 1e-4, "ghost": 1e-3, "exact": 1e-3, "path": 1e-4, "difference": DIFFERENCE}


def batch_of(seed: int, *, full: bool = False) -> Batch:
    """Three sequences of 7 to 11 tokens, padded on the right; or of 8, all of them answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 8 if full else 11), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if not full:
        for row, end in enumerate((11, 9, 7)):
            labels[row, : 2 + row], labels[row, end:], ids[row, end:], mask[row, end:] = -100, -100, 0, 0
    ids[:, 1] = INVOKED
    labels[:, 1] = labels[:, 1].where(labels[:, 1] == -100, INVOKED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def responses(batch: Batch) -> torch.Tensor:
    mask = batch["labels"] != -100
    mask[:, 0] = False
    return mask


def token_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """`(B, T)`; logits of virtual tokens, which stand before the batch's own, are left out."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :].double()
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return nn.functional.pad(losses * (labels[:, 1:] != -100), (1, 0))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(loss: torch.Tensor, parameters: dict[str, nn.Parameter], keep: bool = False) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=keep)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: (torch.zeros_like(p) if g is None else g).double() for (name, p), g in pairs}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest wanted entry; infinite where there is nothing to compare."""
    scale = float(wanted.abs().max())
    gap = float((found.double() - wanted.double()).abs().max())
    return gap / scale if scale > 0 else float("inf")


def gradient_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of the worst parameter, over its own largest entry; entries below a millionth of all count as that."""
    least = 1e-6 * max(float(gradient.abs().max()) for gradient in wanted.values())
    assert least > 0, "the explicitly masked loss has no gradient"
    gaps = [float((found[n] - g).abs().max()) / max(float(g.abs().max()), least) for n, g in wanted.items()]
    return float("nan") if any(gap != gap for gap in gaps) else max(gaps)


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


@dataclass
class Trial:
    """One model under one estimator."""

    model: nn.Module
    estimator: str
    batch: Batch = field(default_factory=lambda: batch_of(0))
    validation: Batch = field(default_factory=lambda: batch_of(1))

    def config(self, **changes: Any) -> AlphaTokenConfig:
        layers = {} if self.estimator == "path" else {"num_layers": "all"}
        nudge = {"difference_rms": 1e-3} if self.estimator == "difference" else {}
        return AlphaTokenConfig(estimator=self.estimator, stability_weight=0, **layers, **nudge, **changes)

    def direction(self) -> dict[str, Any]:
        """theta* a little away from the adapter, or what the target is made of."""
        if self.estimator != "path":
            return {"target": [self.validation]}
        generator, moved = torch.Generator().manual_seed(3), {}
        for name, parameter in trained(self.model).items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            moved[name] = parameter.detach() + 0.05 * noise
        return {"path": ThetaPath(moved)}

    def step(self) -> tuple[AlphaToken, dict[str, torch.Tensor]]:
        """(gate, gradient) of the summed losses through the gate."""
        gate = AlphaToken(self.model, **self.direction(), config=self.config())
        with gate(self.batch):
            loss = token_losses(self.model, self.batch).sum()
            loss.backward()
        found = {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).double()
            for name, p in trained(self.model).items()
        }
        self.model.zero_grad()
        return gate, found

    def gradient(self) -> float:
        gate, found = self.step()
        count, kept = int(responses(self.batch).sum()), int(gate.weights.sum())
        assert 0 < kept < count, f"{kept} of {count} tokens kept"
        wanted = (token_losses(self.model, self.batch) * gate.weights).sum()
        return gradient_error(found, gradients(wanted, trained(self.model)))

    def values(self) -> float:
        """Of the estimator's own kind of value, see the module's docstring."""
        ghost = self.estimator == "ghost"
        batch = batch_of(2, full=True) if ghost else self.batch
        config = self.config(**({"causal_window": 0} if ghost else {}))
        direction = self.direction()
        wanted = torch.zeros(batch["labels"].shape, dtype=torch.float64)
        if self.estimator == "path":
            with torch.no_grad():
                wanted += token_losses(self.model, batch)
                own = {name: p.detach().clone() for name, p in trained(self.model).items()}
                for name, parameter in trained(self.model).items():
                    parameter.copy_(direction["path"].parameters[name])
                wanted -= token_losses(self.model, batch)
                for name, parameter in trained(self.model).items():
                    parameter.copy_(own[name])
        else:
            direction["target"] = target_gradient(self.model, [self.validation], config=config)
            scored = {n: p for n, p in trained(self.model).items() if n in direction["target"].gradients}
            losses = token_losses(self.model, self.validation).sum() / responses(self.validation).sum()
            explicit = gradients(losses, scored)
            losses = token_losses(self.model, batch)
            for row, column in responses(batch).nonzero().tolist():
                own = gradients(losses[row, column], scored, keep=True)
                wanted[row, column] = sum(float((own[name] * explicit[name]).sum()) for name in scored)
        _, values = alphatoken_weights(self.model, None, batch, **direction, config=config, return_values=True)
        if ghost:
            return error(values.total.sum(1), wanted.sum(1))
        return error(values.total, wanted)

    def checkpointing(self) -> float:
        plain, _ = self.step()
        wanted = gradients((token_losses(self.model, self.batch) * plain.weights).sum(), trained(self.model))
        checkpointed(self.model)
        gate, found = self.step()
        same = error(gate.values.total, plain.values.total) if self.estimator != "difference" else 0.0
        if not torch.equal(gate.weights, plain.weights):
            wanted = gradients((token_losses(self.model, self.batch) * gate.weights).sum(), trained(self.model))
        return max(gradient_error(found, wanted), same)


def message_of(raised: Exception) -> str:
    """In one line, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", f"{type(raised).__name__}: {' '.join(str(raised).split())}")


def not_tried(raised: Exception) -> dict[str, Any]:
    """The model itself fails; of its words the beginning."""
    return {"verdict": "not tried", "message": textwrap.shorten(f"without this library: {message_of(raised)}", 160)}


def is_refusal(raised: Exception) -> bool:
    """Whether a `raise` of this library raised it: an error that only passes through is a failure."""
    last = traceback.extract_tb(raised.__traceback__)[-1]
    return last.filename.startswith(PACKAGE) and (last.line or "").startswith("raise ")


def tried(case: Case, estimator: str, check: str, dtype: torch.dtype) -> dict[str, Any]:
    """The cell of one check."""
    model = case.make(dtype)
    if check == "checkpointing":
        try:
            token_losses(checkpointed(case.make(dtype)), batch_of(0)).sum().backward()
        except Exception as raised:
            return not_tried(raised)
    try:
        found = getattr(Trial(model, estimator), check)()
    except Exception as raised:
        return {"verdict": "refused" if is_refusal(raised) else "failed", "message": message_of(raised)}
    allowed = TOLERANCE[estimator if check == "values" else "gradient"]
    if (check, estimator) == ("values", "difference"):
        allowed = case.tolerance
    return {"verdict": "passed" if found < allowed else "failed", "error": float(f"{found:.1e}")}


def dtype_of(case: Case) -> torch.dtype:
    """float64 where a step of the model alone runs in it, else float32; raises what the model raises."""
    for dtype in (torch.float64, torch.float32):
        try:
            token_losses(case.make(dtype), batch_of(0)).sum().backward()
            return dtype
        except Exception:
            if dtype == torch.float32:
                raise
    raise AssertionError


def run(name: str, case: Case) -> dict[str, Any]:
    """All cells of a row: estimator -> check -> cell."""
    started = time.perf_counter()
    try:
        dtype = dtype_of(case)
    except Exception as raised:
        return {
            "cells": {estimator: dict.fromkeys(CHECKS, not_tried(raised)) for estimator in ESTIMATORS},
            "note": case.note,
        }
    cells = {e: {check: tried(case, e, check, dtype) for check in CHECKS} for e in ESTIMATORS}
    seconds = round(time.perf_counter() - started, 1)
    print(f"{name}: {summary(cells)} ({seconds} s)", flush=True)
    return {"cells": cells, "dtype": str(dtype).removeprefix("torch."), "note": case.note, "seconds": seconds}


def summary(cells: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{e} " + "/".join(cell["verdict"] for cell in checks.values()) for e, checks in cells.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--fresh", action="store_true", help="run them again, whatever the results hold")
    parser.add_argument("--output", type=Path, default=FOLDER / "compatibility.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, Any]] = {"architectures": {}, "adapters": {}}
    if args.output.is_file():
        results = json.loads(args.output.read_text(encoding="utf-8"))["results"]
    for kind, cases in (("architectures", ARCHITECTURES), ("adapters", ADAPTERS)):
        for name, case in cases.items():
            if args.only in name and (args.fresh or name not in results[kind]):
                results[kind][name] = run(name, case)
                write(args.output, results, settings={"tolerances": TOLERANCE})
        results[kind] = {name: results[kind][name] for name in cases if name in results[kind]}
    write(args.output, results, settings={"tolerances": TOLERANCE})


if __name__ == "__main__":
    main(sys.argv[1:])
