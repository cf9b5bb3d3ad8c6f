"""How well token values agree with exact ones, and what their inputs (target, Fisher) must be like.

    python benchmarks/fidelity.py                                   # both learning rates; some ten minutes of one core
    python benchmarks/fidelity.py --quick                           # a minute or two, one seed
    python benchmarks/fidelity.py --sections age validation --learning-rates 3e-4
    python benchmarks/fidelity.py --json benchmarks/results/fidelity.json   # for the pages: make figures
    python benchmarks/fidelity.py --pretrain-steps 0                # on a randomly initialised model

What masking token t takes away is the gradient of its own loss, so its exact value is <grad l_t, D>, with
D = target + lambda * drift over the scored adapter parameters: estimator="exact" over all blocks, in float32. Setting:
benchmarks/small.py. Along each tuning run, at several optimizer steps, Spearman's rank correlation and the share of a
batch's response tokens on the same side of the median are measured (`--sections`):

    estimators  ghost (K last blocks, W with and without the causal terms), exact over the last 3 blocks, and difference
                at its default step and others, in float32, under bf16 autocast and on an NF4 base (beside exact values
                on that base), beside exact values
    fisher      exact drift values and totals by the Fisher of n prompts, dense and factored, and by the one that no
                prompts are needed for (labels drawn at the validation sequences), beside the dense one of 1,024 others
    age         exact values (adaptation) by a target of so many optimizer steps ago beside those by a fresh one
    refresh     exact values (adaptation) by schedules of the target, beside those by a fresh one of the same 32
                sequences, and of 256 others; every fifth step of 10 to 45
    validation  exact values (adaptation) by the target of n sequences beside those by 256 others
"""

from __future__ import annotations

import argparse
import contextlib
import platform
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import repeat
from multiprocessing import get_context

import torch
from agreement import COLUMNS, Figures, plot, print_section
from results import write
from small import Batch, Run, counted, in_nf4, joined, last_blocks, pretrained, source_batch, with_adapter

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    Target,
    TokenValues,
    alphatoken_weights,
    estimate_fisher,
)

EXACT = AlphaTokenConfig(estimator="exact")
ADAPTATION = AlphaTokenConfig(estimator="exact", stability_weight=0)
EFFECTS = (None, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
AGES = (1, 2, 4, 8, 16)
AGED = range(20, 151, 26)  # optimizer steps at which ages are compared; values swing with AdamW, so not at one phase
SETS = {8: 3, 16: 3, 32: 3, 64: 2, 128: 1}  # validation sequences -> disjoint sets of so many
PROMPTS = {8: 2, 32: 2, 128: 2, 512: 1}  # Fisher prompts -> disjoint sets of so many
PARTS = ("adaptation", "stability", "total")
REFRESHED = range(10, 50, 5)  # optimizer steps at which schedules are compared: every age up to 8 as often


def values_of(
    model: torch.nn.Module, batch: Batch, config: AlphaTokenConfig, target: Target, fisher: Fisher | None = None
) -> TokenValues:
    _, values = alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config, return_values=True)
    return values


def in_training(
    model: torch.nn.Module, batch: Batch, config: AlphaTokenConfig, target: Target, fisher: Fisher | None = None
) -> torch.Tensor:
    """Totals as a training step has them."""
    alphatoken = AlphaToken(model, target=target, fisher=fisher, config=config)
    with alphatoken(batch):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    assert alphatoken.values is not None
    return alphatoken.values.total


def estimators(run: Run, moment: int, figures: Figures) -> None:
    batch, target = run.noisy(16), run.target()
    exact = values_of(run.model, batch, EXACT, target, run.fisher)
    configs = {"exact, K=3": AlphaTokenConfig(estimator="exact", num_layers=3)}
    for layers in (1, 3, "all"):
        for window in (32, 0):
            options = {"num_layers": layers, "causal_window": window}
            configs[f"ghost, K={layers}, W={window}"] = AlphaTokenConfig(**options)  # type: ignore[arg-type]
    for name, config in configs.items():
        found = values_of(run.model, batch, config, target, last_blocks(run.fisher, config.scored_layers))
        for part in PARTS:
            figures.add(("estimators", name, part), moment, getattr(found, part), getattr(exact, part), counted(batch))
    quantised = in_nf4(run.model)
    target_nf4 = run.target(model=quantised)
    exact_nf4 = values_of(quantised, batch, EXACT, target_nf4, run.fisher)
    for precision in ("float32", "bf16 autocast", "nf4"):
        nf4 = precision == "nf4"
        for effect in EFFECTS[: 1 if nf4 or run.seed else None]:
            config = AlphaTokenConfig(estimator="difference", difference_rms=effect)
            given = (quantised, batch, config, target_nf4) if nf4 else (run.model, batch, config, target)
            with torch.autocast("cpu", torch.bfloat16) if "bf16" in precision else contextlib.nullcontext():
                found_total = in_training(*given, run.fisher)
            key = ("estimators", f"difference, {precision}, {effect or 'default'}", "total")
            figures.add(key, moment, found_total, (exact_nf4 if nf4 else exact).total, counted(batch))


class Fishers:
    """Fishers of disjoint prompt sets, made once: they belong to the base."""

    def __init__(self, base: torch.nn.Module, sets: dict[int, int], large: int) -> None:
        self.model = with_adapter(base)
        self.generator = torch.Generator().manual_seed(1000)
        self.sets = {n: [self.of(n) for _ in range(count)] for n, count in sets.items()}
        self.large = self.of(large)

    def of(self, prompts: int) -> Fisher:
        ids = source_batch(prompts, self.generator, 32)["input_ids"].tolist()
        config = AlphaTokenConfig(estimator="exact", fisher="dense")
        return estimate_fisher(self.model, ids, max_new_tokens=32, batch_size=128, config=config)

    def measure(self, run: Run, moment: int, figures: Figures) -> None:
        if moment == 0:
            return  # nothing has drifted
        batch, target = run.noisy(16), run.target()
        wanted = values_of(run.model, batch, EXACT, target, self.large)
        compared = {f"large set, {self.large.prompts} prompts, factored": self.large.factored()}
        compared["validation sequences, factored"] = estimate_fisher(
            run.model, run.validation[:4], config=EXACT, generate=False, progress=False
        )
        for n, found in self.sets.items():
            for number, fisher in enumerate(found):
                compared |= {
                    f"{n} prompts, dense|{number}": fisher,
                    f"{n} prompts, factored|{number}": fisher.factored(),
                }
        for name, fisher in compared.items():
            values = values_of(run.model, batch, EXACT, target, fisher)
            for part in ("stability", "total"):
                key = ("fisher", name.split("|")[0], part)
                figures.add(key, moment, getattr(values, part), getattr(wanted, part), counted(batch))


def age(run: Run, moment: int, figures: Figures) -> None:
    batch = run.noisy(16)
    fresh = values_of(run.model, batch, ADAPTATION, run.target()).total
    for steps in AGES:
        found = values_of(run.model, batch, ADAPTATION, run.past[moment - steps]).total
        figures.add(("age", f"{steps} steps old", "adaptation"), moment, found, fresh, counted(batch))


def validation(run: Run, moment: int, figures: Figures) -> None:
    batch = run.noisy(16)
    wanted = values_of(run.model, batch, ADAPTATION, run.target(run.large)).total
    eights = [run.target([eight]) for eight in run.validation]
    for n, sets in SETS.items():
        for number in range(sets):
            target = joined(eights[number * n // 8 : (number + 1) * n // 8])
            found = values_of(run.model, batch, ADAPTATION, target).total
            figures.add(("validation", f"{n} sequences", "adaptation"), moment, found, wanted, counted(batch))


class Refresh:
    """Schedules of the target along one run, as `AlphaToken` keeps them, from one set of gradients a step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.targets: dict[str, Target] = {}
        # Sequences in all, optimizer steps between two estimates, share kept (None: an estimate from all of them).
        self.schedules: dict[str, tuple[int, int, float | None]] = {
            f"all 32, every {every}": (32, every, None) for every in (1, 2, 4, 8)
        }
        for size, every, decay in (
            (32, 1, 0.0),
            (32, 1, 0.5),
            (32, 1, 0.75),
            (32, 2, 0.5),
            (128, 1, 0.5),
            (128, 1, 0.75),
        ):
            self.schedules[f"8 of {size}, every {every}, {decay} kept"] = (size, every, decay)

    def follow(self, step: int, batch: Batch, figures: Figures) -> None:
        """Before an optimizer step: bring every target up to date, and compare where it is time."""
        run = self.run
        parts = run.validation if step == 0 else [*run.validation[:4], run.validation[(step - 1) % 16]]
        eights = [run.target([part]) for part in parts]
        for name, (size, every, decay) in self.schedules.items():
            if step == 0 or (decay is None and step % every == 0):
                whole = joined(eights[: size // 8])
                # The first of a running average is worth as much as one of those that follow.
                self.targets[name] = whole if decay is None else Target(whole.gradients, whole.tokens * 8 / size)
            elif decay is not None and step % every == 0:
                newer = eights[-1] if size == 128 else eights[(step // every - 1) % 4]
                self.targets[name] = self.targets[name].averaged(newer, decay)
        if step not in REFRESHED:
            return
        wanted = {"the same 32": self.targets["all 32, every 1"], "256 others": run.target(run.large)}
        truths = {name: values_of(run.model, batch, ADAPTATION, target).total for name, target in wanted.items()}
        for name, target in self.targets.items():
            found = values_of(run.model, batch, ADAPTATION, target).total
            for beside, truth in truths.items():
                figures.add(("refresh", name, f"beside {beside}"), step, found, truth, counted(batch))


def measure(run: Run, args: argparse.Namespace, fishers: Fishers) -> Figures:
    """One run, with the sections that are asked for."""
    schedules = Refresh(run)
    of = {"estimators": estimators, "fisher": fishers.measure, "validation": validation, "age": age}
    at = {section: args.moments for section in of} | {"age": AGED, "refresh": REFRESHED}
    at = {section: [step for step in at[section] if step <= max(args.moments)] for section in args.sections}
    figures = Figures(run.learning_rate)
    for step, batch in run.steps(max((step for steps in at.values() for step in steps), default=0)):
        if any(step + steps in at.get("age", ()) for steps in AGES):
            run.past[step] = run.target()
        if step <= max(at.get("refresh", ()), default=-1):
            schedules.follow(step, batch, figures)
        for section in of:
            if step in at.get(section, ()):
                of[section](run, step, figures)
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ["estimators", "fisher", "age", "refresh", "validation"]
    parser.add_argument("--sections", nargs="+", choices=sections, default=sections)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 3e-4], help="default 3e-3 3e-4")
    parser.add_argument("--seeds", type=int, default=2, help="tuning runs a learning rate (default 2)")
    parser.add_argument(
        "--moments", type=int, nargs="+", default=[0, 20, 60, 150], help="optimizer steps measured at, from at least 20"
    )
    parser.add_argument("--pretrain-steps", type=int, default=250, help="steps of 16 x 96 bytes (default 250)")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and rate, moments 0 and 20, fewer steps and prompts"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--plot", help="also draw them into this file (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.moments, args.pretrain_steps = 1, [0, 20], 60
        args.learning_rates = args.learning_rates[:1]

    about = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{date.today()}, {about}, {args}")
    base = pretrained(args.pretrain_steps, seed=0)
    wide = "fisher" in args.sections and not args.quick
    fishers = Fishers(base, PROMPTS if wide else {8: 1, 128: 1}, 1024 if wide else 128)
    fisher = fishers.sets[128][0].factored()
    runs = [Run(base, fisher, rate, seed) for seed in range(args.seeds) for rate in args.learning_rates]
    figures = Figures()
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for found in pool.map(measure, runs, repeat(args), repeat(fishers)):
            figures.merge(found)
            if args.json:  # after each run, so that an interrupted measurement leaves something
                write(args.json, figures.results(), settings=args, columns=COLUMNS)
    for section in args.sections:
        print_section(figures.results(), section)
    if args.plot:
        plot(figures.results(), args.plot)


if __name__ == "__main__":
    main()
