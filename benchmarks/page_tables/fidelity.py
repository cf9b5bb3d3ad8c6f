"""How well targets, Fishers and step lengths of other kinds agree with exact values: `fidelity.py`."""

from __future__ import annotations

from results import load

from .base import cell, markdown, table


@table
def fresh_targets() -> str:
    shown = {
        "all 32, every 4": "8: all 32, every 4 steps",
        "8 of 32, every 1, 0.0 kept": "8: 8 of 32 a step, nothing kept",
        "8 of 32, every 1, 0.5 kept": "**8: 8 of 32 a step, half kept** (default)",
        "8 of 32, every 1, 0.75 kept": "8: 8 of 32 a step, three quarters kept",
        "8 of 32, every 2, 0.5 kept": "4: 8 of 32 every 2 steps, half kept",
        "all 32, every 2": "16: all 32, every 2 steps",
        "all 32, every 1": "32: all 32 a step",
    }
    rates = load("fidelity")["results"]
    rows = [
        [title, *(cell(found["refresh"][name]["beside the same 32"]["all"][:2], 2) for found in rates.values())]
        for name, title in shown.items()
    ]
    header = ["validation sequences a step, to 64 of training", *(f"lr {float(rate):g}" for rate in rates)]
    return markdown(header, rows, "fidelity")


def fidelity_rows(section: str, part: str, title: str) -> str:
    rates = load("fidelity")["results"]
    names = next(iter(rates.values()))[section]
    rows = [[n, *(cell(found[section][n][part]["all"][:2], 2) for found in rates.values())] for n in names]
    return markdown([title, *(f"lr {float(rate):g}" for rate in rates)], rows, "fidelity")


@table
def ages() -> str:
    return fidelity_rows("age", "adaptation", "age of the target")


@table
def validation_sizes() -> str:
    return fidelity_rows("validation", "adaptation", "target from")


@table
def fisher_sizes() -> str:
    return fidelity_rows("fisher", "stability", "Fisher from")


@table
def windows() -> str:
    rates = load("fidelity")["results"]
    names = [f"ghost, K={k}, W={w}" for k in ("3", "all") for w in (32, 0)]
    rows = [[n, *(cell(found["estimators"][n]["total"]["all"][:2], 2) for found in rates.values())] for n in names]
    return markdown(["estimator", *(f"lr {float(rate):g}" for rate in rates)], rows, "fidelity")


@table
def step_lengths() -> str:
    rates = load("fidelity")["results"]
    effects = ["default", "0.0003", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1.0"]
    rows = []
    for effect in effects:
        line = [effect]
        for precision in ("float32", "bf16 autocast"):
            found = [r["estimators"][f"difference, {precision}, {effect}"]["total"] for r in rates.values()]
            ranks = [c[0] for at in found for step, c in at.items() if step != "all"]
            line.append(f"{min(ranks):.3f} to {max(ranks):.3f}")
        rows.append(line)
    return markdown(["`difference_rms`", "float32", "bf16 autocast"], rows, "fidelity")
