"""Runs on a real model and public data: `real.py`."""

from __future__ import annotations

import statistics

from results import load

from .base import markdown, table
from .path import PATHS, against, ends

RATE = (5e-4,)
WORLD = "nl2bash, exchanged"
TITLES = {**PATHS, "path, from theta*": "path, begun at theta*, no KL"}
FIGURES = {"target": "target", "retention": "WikiText-2", "gsm8k loss": "GSM8K", "tasks": "tasks, mean accuracy"}


@table
def real_runs() -> str:
    return ends(RATE, TITLES, FIGURES, "real", WORLD)


@table
def real_gaps() -> str:
    return against("path, best()", RATE, TITLES, tuple(FIGURES), "real", WORLD)


@table
def real_kept() -> str:
    """Of tokens in right and in exchanged answers."""
    runs, rows = [run for run in load("real")["results"] if run["world"] == WORLD], []
    for name, title in TITLES.items():
        shares = [run["kept"] for run in runs if run["name"] == name and run["lr"] in RATE]
        if shares and min(shares[0].values()) < 1:
            rows.append([title, *(f"{statistics.mean(share[kind] for share in shares):.2f}" for kind in shares[0])])
    return markdown(["share kept of", "right answers", "exchanged answers"], rows, "real")
