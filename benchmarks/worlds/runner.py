"""Many runs, one to a process, appended to a file of results as they end, so that a killed table goes on."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from results import command, write
from tqdm.auto import tqdm

from .settings import Setting
from .tables import Paces, joined, run_of
from .training import pace_of, run
from .world import World

Wanted = list[tuple[World, Setting, float, int]]  # learning rate and seed
PACKAGES = ("alphatoken-loss", "torch", "transformers", "peft", "trl")


def about(device: str = "cpu", argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Where, when and by which command something was measured; without the paths of this machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {
        "date": str(date.today()),
        "machine": f"{where}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions, "torch": torch.__version__},
        "command": command(argv),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.machine()


def key_of(world: World, setting: Setting, lr: float, seed: int) -> str:
    """A digest of all that decides a run but the code: after a change of that, begin another file."""
    what = [asdict(setting), lr, seed, asdict(world.plan), world.identity(), world.device]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def one_run(world: World, setting: Setting, lr: float, seed: int, where: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)  # runs stand side by side, one to a core
    found = run(world, setting, lr, seed)
    key = key_of(world, setting, lr, seed)
    return {"key": key, "world": world.name, "name": setting.name, "lr": lr, "seed": seed, **found, "about": where}


def read_results(file: Path, key: str = "key") -> dict[str, Any]:
    """Rows by their keys; a line that a kill cut short is taken out of the file."""
    results: dict[str, Any] = {}
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            results[row[key]] = row
    if len(results) < len(lines):
        unfinished = file.with_suffix(".part")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in results.values()))
        unfinished.replace(file)
    return results


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as sink:
        sink.write(json.dumps(row) + "\n")


def write_json(file: Path, content: Any) -> None:
    """Figures that are not defined are null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(_defined(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _defined(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _defined(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_defined(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def run_missing(wanted: Wanted, file: Path, workers: int, device: str) -> None:
    """Take the runs that the file does not hold, and append each as it ends."""
    there = read_results(file)
    missing = [r for r in wanted if key_of(*r) not in there]
    context = multiprocessing.get_context("spawn")
    where = about(device)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(one_run, *r, where) for r in missing]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="runs", dynamic_ncols=True):
                append(file, job.result())
        except BaseException:  # what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_paces(wanted: Wanted, file: Path) -> None:
    """Seconds of a step of each setting, and those it spends once, one after the other, by name."""
    torch.set_num_threads(1)  # as in the runs
    named = {setting.name: (world, setting) for world, setting, _, _ in wanted}
    write(file, {name: pace_of(*named[name]) for name in tqdm(named, desc="paces")}, settings={})


def add_options(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that all tables of runs have."""
    parser.add_argument("--only", nargs="+", help="only settings whose name one of these patterns finds")
    parser.add_argument("--seeds", type=int, help="only this many seeds")
    parser.add_argument("--rates", type=float, nargs="+", help="only these learning rates")
    parser.add_argument("--report", action="store_true", help="no run, only tables and plot")
    parser.add_argument("--join", type=Path, help="a table (.json) of earlier runs on the same base, to be kept in it")
    parser.add_argument("--pace", action="store_true", help="no run, only the time of a step, for the column of it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs side by side (default: cores)")
    parser.add_argument("--device", default="cpu", help="where runs take place (default cpu)")
    parser.add_argument("--output", type=Path, default=output, help=f"folder of results and report (default {output})")


def selected(wanted: Wanted, args: argparse.Namespace) -> Wanted:
    """The runs that the options leave."""

    def left(name: str, rate: float, seed: int) -> bool:
        named = not args.only or any(re.search(pattern, name) for pattern in args.only)
        return named and (args.seeds is None or seed < args.seeds) and (not args.rates or rate in args.rates)

    return [(world, setting, rate, seed) for world, setting, rate, seed in wanted if left(setting.name, rate, seed)]


def take_and_read(wanted: Wanted, file: Path, args: argparse.Namespace) -> tuple[list[Any], Paces]:
    """Do as the options say; the runs that there are, and what settings take."""
    wanted = selected(wanted, args)
    for world, setting in {(world, setting) for world, setting, _, _ in wanted}:
        if setting.config is not None and setting.config.stability_weight > 0 and not args.report:
            world.fisher(setting.config)  # once, before processes want it
    file.parent.mkdir(parents=True, exist_ok=True)
    paces = file.with_name("paces.json") if file.name == "results.jsonl" else file.with_suffix(".paces.json")
    if args.pace:
        measure_paces(wanted, paces)
    elif not args.report:
        run_missing(wanted, file, args.workers, args.device)
    results = read_results(file)
    keys = [key_of(*r) for r in wanted]
    known = json.loads(paces.read_text())["results"] if paces.is_file() else {}
    found = [results[key] for key in keys if key in results]
    if args.join:
        found = joined(found, map(run_of, json.loads(args.join.read_text(encoding="utf-8"))["results"]))
    return found, known
