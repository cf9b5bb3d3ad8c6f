"""Architectures and adapters by estimator: `compatibility.py`."""

from __future__ import annotations

import re
from typing import Any

from results import load

from .base import caption, markdown, table


def compatible(kind: str) -> str:
    """A row a model, a column an estimator; what did not pass is told by check, its messages below by number."""
    found, messages = load("compatibility")["results"][kind], list[str]()
    estimators = list(next(iter(found.values()))["cells"])
    checks = list(next(iter(found.values()))["cells"][estimators[0]])

    def told(cell: dict[str, Any]) -> str:
        text = f"**{cell['verdict']}**" if cell["verdict"] == "failed" else cell["verdict"]
        if "error" in cell:
            return f"{text} ({cell['error']:.1g})" if cell["verdict"] != "passed" else text
        message = re.sub(r"^(ValueError|_NoRule): ", "", cell["message"])
        for alike in (r"(?<=base_model)\.[\w.]*\w", r"(?<=peft\.tuners)\.[\w.]*\w", r"\d+(?= such parameters)"):
            message = re.sub(alike, "…", message)
        if message not in messages:
            messages.append(message)
        return f"{text} [{messages.index(message) + 1}]"

    def all_of(cells: dict[str, dict[str, Any]]) -> str:
        by_check = {check: told(cell) for check, cell in cells.items()}
        if len(set(by_check.values())) == 1:
            return by_check[checks[0]]
        return "<br>".join(f"{check} {text}" for check, text in by_check.items())

    rows = [
        [name + ("*" if row["note"] else ""), *(all_of(row["cells"][estimator]) for estimator in estimators)]
        for name, row in found.items()
    ]
    verdicts = [cell["verdict"] for row in found.values() for cells in row["cells"].values() for cell in cells.values()]
    counts = ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in ("passed", "refused", "failed", "not tried")
    )
    text = f"{len(found)} {kind}, {len(verdicts)} checks: {counts}.\n\n"
    text += markdown(["", *(f"`{estimator}`" for estimator in estimators)], rows)
    text += "".join(f"\n\n\\* {name}: {row['note']}." for name, row in found.items() if row["note"])
    text += "".join(f"\n\n[{number}] {message}" for number, message in enumerate(messages, 1))
    return f"{text}\n\n{caption('compatibility')}"


@table
def compatible_architectures() -> str:
    return compatible("architectures")


@table
def compatible_adapters() -> str:
    return compatible("adapters")
