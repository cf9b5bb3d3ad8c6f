"""Does it adapt better and forget less? Token selections side by side, on a laptop, offline.

    python benchmarks/tradeoff.py --quick      # five selections, one seed: under five minutes once the base is cached
    python benchmarks/tradeoff.py              # the full table: hours on two cores; goes on where it stopped
    python benchmarks/tradeoff.py --pace       # seconds a step of each setting, one after the other, on a quiet machine
    python benchmarks/tradeoff.py --report     # only the tables and the plot, of the runs there are

A Llama of 2.2M parameters, trained here on Python, English prose and little tasks (about ten minutes, cached), is tuned
by LoRA to continue C++ code, from answers with boilerplate, a junk tail and corrupted tokens; 32 clean examples from
other files say what the target is. Measured along the way: the loss on clean C++ of yet other files (target), the loss
on held-out Python and prose and on the little tasks (retention), tokens kept by kind, and time. See tradeoff_data.py
for the text, tradeoff_runs.py for a run; all settings are below.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch
from tqdm.auto import tqdm
from tradeoff_data import Pretraining, make_base, read_texts
from tradeoff_report import Run, write_report
from tradeoff_runs import Plan, Setting, make_fishers, pace_of, run

from alphatoken_loss import AlphaTokenConfig

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
PLAN = Plan()
RATES = {"sft": (3e-3, 6e-4), "dpo": (1e-3, 3e-4)}  # hot and mild
SEEDS = 5


def values(name: str, **options: object) -> Setting:
    """AlphaToken with these settings; further fields of `Setting` as in `values("...", setting={"kl": 0.3})`."""
    more: dict[str, object] = options.pop("setting", {})  # type: ignore[assignment]
    return Setting(name, "values", AlphaTokenConfig(**options), **more)  # type: ignore[arg-type]


def supervised() -> Iterator[Setting]:
    yield Setting("all tokens")
    yield Setting("random half", "random")
    yield Setting("validation mixed in", "mixed")
    yield Setting("validation only", "only")
    yield Setting("RHO-1, clean reference", "rho1")
    yield Setting("RHO-1 + KL 0.3", "rho1", kl=0.3)
    yield Setting("oracle", "oracle")
    yield values("difference", estimator="difference")
    yield values("difference, Adam's step", estimator="difference", setting={"precondition": True})
    best = Setting("difference, Adam's step, all 32", "values", AlphaTokenConfig.best(), precondition=True)
    yield best
    yield replace(best, name="difference, Adam's step, all 32, KL 0.3", kl=0.3)
    options: dict[str, object] = {"estimator": "difference", "threshold": "zero"}
    yield values("difference, Adam's step, above zero", **options, setting={"precondition": True})
    yield values("ghost K=3")
    yield Setting("ghost K=3, paper preset", "values", AlphaTokenConfig.paper())
    yield values("ghost K=3, W=0", causal_window=0)
    yield values("ghost all, W=0", num_layers="all", causal_window=0)
    yield values("ghost all", num_layers="all")
    yield values("ghost all, W=0, Adam's step", num_layers="all", causal_window=0, setting={"precondition": True})
    yield values("difference, no drift", estimator="difference", stability_weight=0)
    yield values("ghost K=3, no drift", stability_weight=0)
    yield values("ghost all, no drift", num_layers="all", stability_weight=0)
    yield values("difference K=3", estimator="difference", num_layers=3)
    for kl in (0.1, 0.3, 1.0):
        yield Setting(f"KL {kl}", kl=kl)
        yield values(f"KL {kl} + difference", estimator="difference", setting={"kl": kl})
    yield Setting("L2 0.001", l2=0.001)
    yield values("L2 0.001 + difference", estimator="difference", setting={"l2": 0.001})
    yield values("ghost K=3, W=0, no drift", causal_window=0, stability_weight=0)
    yield values("ghost all, W=0, no drift", num_layers="all", causal_window=0, stability_weight=0)
    yield values("difference K=3, no drift", estimator="difference", num_layers=3, stability_weight=0)
    yield values("exact", estimator="exact")
    yield values("exact K=3", estimator="exact", num_layers=3)


def without_noise() -> Iterator[Setting]:
    yield Setting("no noise: all tokens", noise=False)
    yield Setting("no noise: random half", "random", noise=False)
    yield values("no noise: ghost K=3", setting={"noise": False})
    yield values("no noise: difference", estimator="difference", setting={"noise": False})
    yield values("no noise: difference, rho 0.8", estimator="difference", rho=0.8, setting={"noise": False})
    both: dict[str, object] = {"noise": False, "precondition": True}
    yield values("no noise: difference, Adam's step", estimator="difference", setting=both)
    yield values(
        "no noise: difference, Adam's step, above zero", estimator="difference", threshold="zero", setting=both
    )


def in_nf4() -> Iterator[Setting]:
    yield Setting("NF4: all tokens", nf4=True)
    yield values("NF4: ghost K=3", setting={"nf4": True})
    yield values("NF4: difference", estimator="difference", setting={"nf4": True})


def preferences() -> Iterator[Setting]:
    yield Setting("DPO: all tokens", task="dpo")
    yield Setting("DPO: random half", "random", task="dpo")
    yield Setting("DPO: log-ratio", "log_ratio", task="dpo")
    yield values("DPO: ghost K=3", setting={"task": "dpo"})
    yield values("DPO: ghost all, W=0", num_layers="all", causal_window=0, setting={"task": "dpo"})
    yield values("DPO: difference", estimator="difference", setting={"task": "dpo"})
    both = {"task": "dpo", "precondition": True}
    yield values("DPO: difference, Adam's step", estimator="difference", setting=both)
    yield Setting("DPO: validation only", "only", task="dpo")
    yield values("DPO: difference, no drift", estimator="difference", stability_weight=0, setting={"task": "dpo"})


# What the other settings are compared with, first in line and at the mild rate too; of clean answers and pairs MILD is.
MAIN = (
    "all tokens",
    "random half",
    "validation mixed in",
    "validation only",
    "RHO-1, clean reference",
    "RHO-1 + KL 0.3",
    "oracle",
    "difference",
    "difference, Adam's step",
    "difference, Adam's step, all 32",
    "difference, Adam's step, all 32, KL 0.3",
    "difference, Adam's step, above zero",
    "difference, no drift",
    "ghost K=3",
    "ghost all, W=0",
    "KL 0.3",
    "KL 0.3 + difference",
    "L2 0.001",
    "L2 0.001 + difference",
)
MILD = ("all tokens", "validation only", "difference", "difference, Adam's step")
QUICK = ("all tokens", "random half", "RHO-1, clean reference", "ghost K=3", "difference")


def all_runs(quick: bool) -> list[tuple[Setting, float, int]]:
    """Setting, learning rate and seed; one seed after the other, so that what is there is balanced."""
    main = [setting for setting in supervised() if setting.name in MAIN]
    rest = [setting for setting in supervised() if setting.name not in MAIN]
    hot, mild = RATES["sft"]
    if quick:
        return [(setting, hot, 0) for setting in main if setting.name in QUICK]
    first = [(setting, lr) for setting in main for lr in (hot, mild)]
    for setting in (*without_noise(), *preferences()):
        rates = RATES[setting.task]
        first += [(setting, lr) for lr in (rates if setting.name.partition(": ")[2] in MILD else rates[:1])]
    second = [(setting, hot) for setting in (*rest, *in_nf4())]
    return [(*one, seed) for group in (first, second) for seed in range(SEEDS) for one in group]


@functools.cache
def texts_digest() -> str:
    """The base's folder tells its own text; this is all of it."""
    return hashlib.sha256(json.dumps(asdict(read_texts())).encode()).hexdigest()[:12]


def key_of(setting: Setting, lr: float, seed: int, plan: Plan, folder: Path, device: str) -> str:
    """A digest of all that decides a run but the code: after a change of that, begin another output folder."""
    what = [asdict(setting), lr, seed, asdict(plan), folder.name, texts_digest(), device]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def one_run(folder: Path, setting: Setting, lr: float, seed: int, plan: Plan, device: str) -> dict[str, object]:
    torch.set_num_threads(1)  # runs stand side by side, one to a core
    found = run(folder, setting, lr, seed, plan, device)
    return {
        "key": key_of(setting, lr, seed, plan, folder, device),
        "name": setting.name,
        "lr": lr,
        "seed": seed,
        **found,
    }


def read_results(file: Path) -> dict[str, Run]:
    """Runs by their keys; a line that a kill cut short is taken out of the file."""
    results: dict[str, Run] = {}
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            results[row["key"]] = row
    if len(results) < len(lines):
        unfinished = file.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in results.values()))
        unfinished.replace(file)
    return results


def run_missing(folder: Path, wanted: list[tuple[Setting, float, int]], file: Path, args: argparse.Namespace) -> None:
    """Take the runs that the file does not hold, and append each as it ends."""
    there = read_results(file)
    missing = [r for r in wanted if key_of(*r, PLAN, folder, args.device) not in there and not args.report]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool, file.open("a") as sink:
        jobs = [pool.submit(one_run, folder, *r, PLAN, args.device) for r in missing]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs", dynamic_ncols=True):
                sink.write(json.dumps(job.result()) + "\n")
                sink.flush()
        except BaseException:  # what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_paces(folder: Path, settings: list[Setting], file: Path, device: str) -> None:
    torch.set_num_threads(1)  # as in the runs
    named = {setting.name: setting for setting in settings}
    paces = {name: pace_of(folder, named[name], PLAN, device=device) for name in tqdm(named, desc="paces")}
    file.write_text(json.dumps(paces, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five selections, one seed, one learning rate")
    parser.add_argument("--only", nargs="+", help="only settings whose name one of these patterns finds")
    parser.add_argument("--report", action="store_true", help="no run, only tables and plot")
    parser.add_argument("--pace", action="store_true", help="no run, only the time of a step, for the column of it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: cores)")
    parser.add_argument("--size", choices=list(BASES), default="small", help="of the base model (default small)")
    parser.add_argument("--device", default="cpu", help="where runs take place (default cpu)")
    parser.add_argument("--output", type=Path, default=Path("outputs/tradeoff"), help="folder of results and report")
    args = parser.parse_args(argv)

    folder = make_base(read_texts(), BASES[args.size], args.device)
    make_fishers(folder, PLAN, args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    wanted = all_runs(args.quick)
    if args.only:
        wanted = [r for r in wanted if any(re.search(pattern, r[0].name) for pattern in args.only)]
    paces = args.output / "paces.json"
    if args.pace:
        measure_paces(folder, [setting for setting, _, _ in wanted], paces, args.device)
    else:
        run_missing(folder, wanted, file, args)
    keys = [key_of(*r, PLAN, folder, args.device) for r in wanted]
    results = read_results(file)
    about = f"{date.today()}, {platform.machine()}, {args.device}, torch {torch.__version__}"
    known = json.loads(paces.read_text()) if paces.is_file() else {}
    write_report([results[key] for key in keys if key in results], known, args.output, about)


if __name__ == "__main__":
    main()
