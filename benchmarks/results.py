"""What benchmarks found, as files: benchmarks/results/*.json, from which figures.py writes the tables of the pages.

A file says when, where and how its figures were made:

    {"date": ..., "command": ..., "machine": {...}, "versions": {...}, "settings": {...}, "results": {...}}

Files with a "source" were made after the fact, from the page that first printed the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
# Options whose values say something of a machine, not of a run.
PATHS = ("--data", "--output", "--cache", "--model", "--json", "--plot", "--join")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_SPREAD = re.compile(r"([+-]?\d+\.\d+) ±(\d+\.\d+)")


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine in words and numbers: what a figure of time or memory must be read with."""
    found: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu GiB": round(properties.total_memory / 2**30, 1)}
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process, with its script from the repository's root, less what tells of this machine
    alone."""
    argv = list(sys.argv if argv is None else argv)
    script = Path(argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    told, skip = [], False
    for argument in argv[1:]:
        if not skip and not argument.startswith(tuple(f"{option}=" for option in PATHS)) and argument not in PATHS:
            told.append(argument)
        skip = argument in PATHS
    return shlex.join(["python", name, *told])


def write(
    path: Path | str,
    results: Any,
    *,
    settings: argparse.Namespace | Mapping[str, Any],
    device: torch.device | str = "cpu",
    **more: Any,
) -> None:
    """Write figures with the date, the command, the machine and the versions they were made with."""
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else dict(settings)
    settings = {name: value for name, value in settings.items() if f"--{name}" not in PATHS}
    head = {"date": str(date.today()), "command": command(), "machine": machine(device), "versions": versions()}
    text = json.dumps(
        {**head, "settings": settings, **more, "results": results}, indent=1, ensure_ascii=False, default=str
    )
    Path(path).write_text(text + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """The file of a name in benchmarks/results."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def tables(text: str) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """The figures of a report in Markdown.

    Returns:
        `dict`: heading -> first cell of a table's head -> row -> column -> a number, `[mean, spread]` of
        "mean ±spread", or `None` where the cell is empty.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    heading, columns = "", list[str]()
    rows: dict[str, dict[str, Any]] | None = None
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        if not line.startswith("|"):
            rows = None
            continue
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if rows is None:
            columns, rows = cells, {}
            found.setdefault(heading, {})[first] = rows
        elif set(first) != {"-"}:
            rows[first] = dict(zip(columns, map(_cell, cells), strict=True))
    return found


def _cell(text: str) -> Any:
    if spread := _SPREAD.fullmatch(text):
        return [float(spread[1]), float(spread[2])]
    if _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return None if text == "nan" else text or None
