"""What all tables of the pages share: their names, their form, and the line that says where figures come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from results import load
from worlds import tables

TABLES: dict[str, Callable[[], str]] = {}


def table(register: Callable[[], str]) -> Callable[[], str]:
    """Make a function's text available to pages, by its name."""
    TABLES[register.__name__.replace("_", "-")] = register
    return register


def markdown(header: Iterable[str], rows: Iterable[list[str]], *sources: str) -> str:
    """A table, and below it where its figures come from: names of files in benchmarks/results."""
    text = tables.table(list(header), rows).rstrip("\n")
    return text + (f"\n\n{caption(*sources)}" if sources else "")


def caption(*names: str) -> str:
    """Where figures come from: file, date, machine; and, of files made after the fact, from what."""
    return f"*{'; '.join(map(_source, names))}.*"


def _source(name: str) -> str:
    found = load(name)
    found = found if "date" in found else found["about"]
    machine = found["machine"]
    if isinstance(machine, dict):
        machine = machine["gpu"] if "gpu" in machine else f"{machine['cores']} CPU cores, no GPU"
    told = [found["date"], machine, f"torch {found['versions']['torch']}"]
    if "transcribed" in found.get("source", ""):
        told.append("transcribed from the page of that date")
    return f"`benchmarks/results/{name}.json`: {', '.join(told)}"


def cell(value: Any, digits: int = 3, sign: str = "") -> str:
    """A number, or a mean with its spread."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return f"{value[0]:{sign}.{digits}f} ±{value[1]:.{digits}f}"
    return f"{value:{sign}.{digits}f}"


def mean(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)
