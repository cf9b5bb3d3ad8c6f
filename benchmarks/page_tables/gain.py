"""What shared_gain says of training rows (`shared_gain.py`)."""

from __future__ import annotations

import statistics
from typing import Any

from results import load

from alphatoken_loss import SharedGain

from .base import markdown, table

FILES = ("shared_gain_toy", "shared_gain_real")


@table
def gains() -> str:
    """A line for each kind of training rows, over its seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in FILES:
        for run in load(file)["results"]:
            found.setdefault(run["rows"], []).append(run)
    rows = []
    for name, runs in found.items():
        means = (statistics.mean(run[part] for run in runs) for part in ("clean", "training"))
        shares = (f"{run['share']:.2f} ({run['interval'][0]:.2f} to {run['interval'][1]:.2f})" for run in runs)
        rhos = (SharedGain(run["clean"], run["training"], tuple(run["interval"])).rho for run in runs)
        rows.append([name, *(f"{mean:+.2f}" for mean in means), ", ".join(shares), ", ".join(f"{r:.2f}" for r in rhos)])
    header = ["training rows", "clean rows gain", "they gain", "share (95 %), by seed", "rho"]
    return markdown(header, rows, *FILES)
