"""What does masking tokens really do? Optimizer steps on random halves of a batch's tokens, against summed values.

    python benchmarks/counterfactual.py --world toy                  # minutes on one core
    python benchmarks/counterfactual.py --world real --data FOLDER   # hours on one core; goes on where it stopped
    python benchmarks/counterfactual.py --world toy --report         # only the table, of what there is

An adapter is tuned for some steps. Then, of a further batch, random halves of the response tokens are masked; from this
same state 1, 4 and 16 optimizer steps are taken on what is left, and the change of the validation loss, of the loss on
test rows and of the Fisher drift 1/2 sum F dW^2 is measured. Told is the Spearman correlation over halves between the
sum of values of the kept tokens and the improvement: the token-level form of the linear datamodeling score
(arXiv 2303.14186). Validation and test loss are compared with the adaptation part of a value, the drift with the
stability part, the objective (validation loss + lambda * drift) with the whole; a rival has one score for all.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from worlds import runner
from worlds.measures import interval, spearman
from worlds.real import Real, load_smollm2
from worlds.real_data import RealPlan
from worlds.rivals import at_labels
from worlds.rows import Batch, chunks
from worlds.scores import SCORES, Scored
from worlds.settings import Setting
from worlds.tables import table
from worlds.toy import BASES, Toy, ToyPlan, cached, make_base, read_texts
from worlds.training import make_optimizer, measure, tune_reference
from worlds.world import World

import alphatoken_loss
from alphatoken_loss import AlphaTokenConfig, Fisher, sft_loss

ALL = Setting("all tokens")
PART = {"validation": "adaptation", "test": "adaptation", "drift": "stability", "objective": "total"}


@dataclass(frozen=True)
class CounterPlan:
    """Args:
    warm: steps before.
    test: rows that nothing was trained on.
    """

    warm: int = 20
    steps: tuple[int, ...] = (1, 4, 16)
    test: int = 48
    stability_weight: float = 1.5
    lr: float = 3e-3
    seed: int = 0


def half_of(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`(B, T)` 1 for a random half of the places that are true, else 0."""
    places = rows.flatten().nonzero().flatten()
    kept = places[torch.randperm(len(places), generator=generator)[: len(places) // 2]]
    return torch.zeros(rows.numel()).index_fill(0, kept, 1.0).view(rows.shape)


def drift_of(model: Any, fisher: Fisher) -> float:
    """1/2 sum F dW^2 over the LoRA layers of the Fisher, dW = s B A."""
    modules, total = dict(model.named_modules()), 0.0
    for name in fisher.names:
        module = modules[name]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        delta = module.scaling["default"] * (b.detach() @ a.detach())
        total += 0.5 * (fisher.diagonal(name).to(delta) * delta**2).sum().item()
    return total


class State:
    """A model in training and its optimizer, which can be put back to where they were made this."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]
        self.moments = copy.deepcopy(optimizer.state_dict())

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(copy.deepcopy(self.moments))


def take_step(
    world: World, model: Any, optimizer: torch.optim.Optimizer, batch: Batch, mask: torch.Tensor | None
) -> None:
    with world.autocast():
        loss = sft_loss(model, batch, None if mask is None else mask.to(batch["labels"].device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Check:
    """One world at one rate: the state after the warm steps, and what is measured from there."""

    def __init__(self, world: World, plan: CounterPlan) -> None:
        self.world, self.plan, size = world, plan, world.plan.batch
        self.model = world.model(seed=plan.seed)
        self.rows = [world.batch(rows) for rows in chunks(world.training(ALL, plan.seed), size)]
        clean = world.validation(ALL, plan.seed)
        self.validation = [world.batch(rows) for rows in chunks(clean, size)]
        self.test = [world.batch(rows) for rows in chunks(world.test_rows()[: plan.test], size)]
        self.fisher = world.fisher(AlphaTokenConfig(estimator="difference"))
        self.optimizer = make_optimizer(self.model, plan.lr)
        for number, batch in enumerate(self.rows[: plan.warm], start=1):
            for group in self.optimizer.param_groups:
                group["lr"] = plan.lr * min(1.0, number / 5)
            take_step(world, self.model, self.optimizer, batch, None)
        self.state = State(self.model, self.optimizer)
        self.before = self.figures()
        self.tuned: Any = None
        self.there: alphatoken_loss.Path | None = None
        self.targets: dict[Any, Any] = {}

    def figures(self) -> dict[str, float]:
        """In float32, without autocast: the changes looked for are small."""
        found = {name: measure(self.model, getattr(self, name))[0] for name in ("validation", "test")}
        found["drift"] = drift_of(self.model, self.fisher)
        return {**found, "objective": found["validation"] + self.plan.stability_weight * found["drift"]}

    def batch(self, number: int) -> Batch:
        return self.rows[self.plan.warm + number]

    def changes(self, number: int, mask_number: int) -> dict[str, Any]:
        """The mask's places, and for each number of steps how much lower each figure is than before."""
        batch = self.batch(number)
        counted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (1, 0)).cpu()
        generator = torch.Generator().manual_seed(1000 * number + mask_number)
        mask = half_of(counted, generator)
        self.state.restore()
        found = {}
        for step in range(1, max(self.plan.steps) + 1):
            take_step(self.world, self.model, self.optimizer, batch, mask)
            if step in self.plan.steps:
                found[str(step)] = {name: self.before[name] - after for name, after in self.figures().items()}
        self.state.restore()
        return {"kept": mask[counted].int().tolist(), "lower by": found}

    def path(self, config: AlphaTokenConfig) -> alphatoken_loss.Path:
        """From where training started, as theta* is made in training."""
        if self.there is None:
            model, fisher = self.world.model(seed=self.plan.seed), self.world.fisher(config)
            self.there = alphatoken_loss.make_path(model, self.validation, fisher=fisher, config=config)
        return self.there

    def scores(self, number: int, name: str) -> dict[str, list[float]]:
        """Parts of a score, one number for each response token of the batch."""
        batch = self.batch(number)
        counted = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (1, 0)).cpu()
        with self.world.autocast():
            if self.tuned is None:  # from the base, as RHO-1's is in training
                self.tuned = self.world.model(seed=self.plan.seed)
                tune_reference(self.world, self.tuned, self.validation)
                self.tuned.set_adapter("ref")
            with torch.no_grad():
                reference = at_labels(self.tuned, batch)[1]
            scored = Scored(
                self.model,
                batch,
                self.validation,
                reference,
                fisher=self.world.fisher,
                path=self.path,
                stability_weight=self.plan.stability_weight,
                generator=torch.Generator().manual_seed(number),
                optimizer=self.optimizer,
                targets=self.targets,
            )
            parts = SCORES[name](scored)
        return {part: values.cpu()[counted].double().tolist() for part, values in parts.items()}


def correlations(
    scores: dict[str, dict[Any, dict[str, list[float]]]], changes: dict[Any, list[dict[str, Any]]], boots: int = 1000
) -> dict[str, Any]:
    """Score -> steps -> figure -> mean Spearman over batches, with a bootstrap interval over masks.

    Args:
        scores: score -> batch -> part -> a number for each response token.
        changes: batch -> masks, as `Check.changes` gives them.
    """
    found: dict[str, Any] = {}
    steps = list(next(iter(changes.values()))[0]["lower by"])
    for name, of_batches in scores.items():
        for step in steps:
            for figure, part in PART.items():
                sums, gains = [], []
                for number, parts in of_batches.items():
                    values = np.array(parts.get(part, parts["total"]))
                    sums.append(np.array([values @ np.array(mask["kept"]) for mask in changes[number]]))
                    gains.append(np.array([mask["lower by"][step][figure] for mask in changes[number]]))
                found.setdefault(name, {}).setdefault(step, {})[figure] = _correlation(sums, gains, boots)
    return found


def _correlation(sums: Sequence[np.ndarray], gains: Sequence[np.ndarray], boots: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    drawn = []
    for values, gain in zip(sums, gains, strict=True):
        places = rng.integers(len(values), size=(boots, len(values)))
        drawn.append(spearman(values[places], gain[places]))
    mean = statistics.mean(float(spearman(s, g)) for s, g in zip(sums, gains, strict=True))
    return {"spearman": round(mean, 4), "interval": [round(x, 4) for x in interval(np.mean(drawn, 0))]}


def report(found: dict[str, Any]) -> str:
    steps = list(next(iter(found.values())))
    columns = [(step, figure) for figure in PART for step in steps]
    rows = []
    for name, of_steps in found.items():
        cells = [of_steps[step][figure] for step, figure in columns]
        shown = [f"{c['spearman']:+.2f} [{c['interval'][0]:+.2f}, {c['interval'][1]:+.2f}]" for c in cells]
        rows.append([name, *shown])
    return table(["score", *(f"{figure}, {step} steps" for step, figure in columns)], rows)


def fill(make: Callable[[], Check], file: Path, digest: str, batches: int, masks: int, names: Sequence[str]) -> None:
    """Append what the file does not hold: scores first, then one mask of every batch after the other."""
    there = runner.read_results(file)
    wanted: list[tuple[str, int, Any]] = [("score", n, name) for name in names for n in range(batches)]
    wanted += [("mask", n, m) for m in range(masks) for n in range(batches)]
    missing = [(kind, n, what) for kind, n, what in wanted if f"{digest}:{kind}:{n}:{what}" not in there]
    if not missing:
        return
    check = make()
    for kind, number, what in tqdm(missing, desc="scores and masks", dynamic_ncols=True):
        started = time.perf_counter()
        found = {"parts": check.scores(number, what)} if kind == "score" else check.changes(number, what)
        row = {"key": f"{digest}:{kind}:{number}:{what}", "kind": kind, "batch": number, "what": what, **found}
        runner.append(file, {**row, "seconds": round(time.perf_counter() - started, 2)})


def gathered(
    rows: dict[str, Any], digest: str, names: Sequence[str]
) -> tuple[dict[str, dict[int, dict[str, list[float]]]], dict[int, list[dict[str, Any]]]]:
    mine = [row for key, row in rows.items() if key.startswith(digest)]
    changes: dict[int, list[dict[str, Any]]] = {}
    for row in mine:
        if row["kind"] == "mask":
            changes.setdefault(row["batch"], []).append(row)
    changes = {number: found for number, found in changes.items() if len(found) >= 4}
    scores: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in mine:
        if row["kind"] == "score" and row["what"] in names and row["batch"] in changes:
            scores.setdefault(row["what"], {})[row["batch"]] = row["parts"]
    return scores, changes


def make_world(args: argparse.Namespace) -> World:
    if args.world == "toy":
        return Toy(make_base(read_texts(), BASES["small"], args.device), ToyPlan(), args.device)
    plan = replace(RealPlan(), steps=40, batch=args.rows)
    return Real(args.model or load_smollm2(cached), plan, args.device, noise="exchanged", data=args.data)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["toy", "real"], default="toy")
    parser.add_argument("--data", default=os.environ.get("ALPHATOKEN_REAL_DATA"), help="folder of data (default: hub)")
    parser.add_argument("--model", type=Path, help="folder of the real world's model (default SmolLM2-135M)")
    parser.add_argument("--lr", type=float, help="learning rate (default 3e-3 toy, 5e-4 real)")
    parser.add_argument("--warm", type=int, default=20, help="steps before (default 20)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16], help="measured at (default 1 4 16)")
    parser.add_argument("--test", type=int, default=48, help="rows of the test loss (default 48)")
    parser.add_argument("--rows", type=int, default=8, help="of a batch, in the real world (default 8)")
    parser.add_argument("--batches", type=int, default=4, help="that are masked (default 4)")
    parser.add_argument("--seeds", type=int, default=1, help="of the tuned state, with batches of its own (default 1)")
    parser.add_argument("--masks", type=int, default=32, help="of each batch (default 32)")
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), help="only these (default all)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the summary")
    parser.add_argument("--cache", type=Path, default=Path("outputs"), help="folder of what was measured")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    lr = args.lr or (3e-3 if args.world == "toy" else 5e-4)
    plan = CounterPlan(warm=args.warm, steps=tuple(args.steps), test=args.test, lr=lr)
    world, names = make_world(args), args.scores or list(SCORES)
    args.cache.mkdir(parents=True, exist_ok=True)
    file = args.cache / f"counterfactual-{args.world}.jsonl"
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    changes: dict[str, list[dict[str, Any]]] = {}
    for one in (replace(plan, seed=seed) for seed in range(args.seeds)):
        what = [asdict(one), asdict(world.plan), world.identity(), args.device]
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        if not args.report:
            fill(functools.partial(Check, world, one), file, digest, args.batches, args.masks, names)
        own, measured = gathered(runner.read_results(file), digest, names)
        changes |= {f"{one.seed}:{number}": found for number, found in measured.items()}
        for name, of_batches in own.items():
            scores.setdefault(name, {}).update({f"{one.seed}:{number}": found for number, found in of_batches.items()})
    if not scores:
        print("Fewer than four masks of any batch have been measured yet.")
        return
    found = correlations(scores, changes)
    told = {"masks": {number: len(masks) for number, masks in changes.items()}, "spearman": found}
    head = {"about": runner.about(args.device), "world": world.name, "plan": asdict(plan)}
    runner.write_json(args.output / f"counterfactual-{args.world}.json", {**head, **told})
    print(f"{args.world}: Spearman of summed values and improvement; masks by batch: {told['masks']}\n")
    print(report(found))


if __name__ == "__main__":
    main()
