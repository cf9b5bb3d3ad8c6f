"""The trade-off of adapting and forgetting: what `tradeoff.py` wrote, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from results import load

from .base import caption, cell, markdown, mean, table

HOT, MILD = "0.003", "0.0006"
NOISY, CLEAN = ("Supervised, noisy answers, learning rate ", "Supervised, clean answers, learning rate ")
PAIRS = "Preferences, noise in both answers, learning rate "
# Setting of tradeoff.json -> what the pages call it. A star: at the moment of the run's lowest test loss.
TITLES = {
    "before tuning": "before tuning",
    "all tokens": "all tokens",
    "random half": "a random half of the tokens",
    "validation mixed in": "validation examples mixed into the batches",
    "validation only": "the 32 validation examples alone",
    "validation only*": "the same, stopped at its best test loss",
    "oracle": "an oracle that drops the noise",
    "RHO-1, clean reference": "RHO-1, reference tuned on the validation examples",
    "RHO-1 + KL 0.3 to its reference": "RHO-1 with KL 0.3 to its own reference",
    "KL 0.3": "all tokens with KL 0.3",
    "L2 0.001": "all tokens with L2 on the adapter's delta",
    "ghost K=3": "**ghost, K = 3** (default)",
    "ghost all, W=0": "**ghost, all blocks, W = 0**",
    "difference, no drift": "difference, lambda 0",
    "difference": "**difference**",
    "KL 0.3 + difference": "**difference with KL 0.3**",
    "difference, Adam's step": "**difference, Adam's step**",
    "difference, Adam's step, all 32": "the same, target of all 32 at every step (in full)",
    "difference, Adam's step, all 32, KL 0.3": "difference in full, with KL 0.3",
}
SHORT = (
    "before tuning",
    "all tokens",
    "random half",
    "KL 0.3",
    "RHO-1, clean reference",
    "ghost K=3",
    "difference",
    "KL 0.3 + difference",
    "difference, Adam's step, all 32",
)
GAPS = {  # what is compared: what, with what
    "ghost, K = 3 minus all tokens": ("ghost K=3", "all tokens"),
    "difference minus all tokens": ("difference", "all tokens"),
    "difference minus all tokens with KL 0.3": ("difference", "KL 0.3"),
    "difference minus validation mixed in": ("difference", "validation mixed in"),
    "all blocks minus last three (ghost)": ("ghost all", "ghost K=3"),
    "drift term: lambda 1.5 minus lambda 0 (difference)": ("difference", "difference, no drift"),
    "Adam's step minus plain gradient (difference)": ("difference, Adam's step", "difference"),
    "target of all 32 a step minus a quarter of them": ("difference, Adam's step, all 32", "difference, Adam's step"),
    "KL 0.3 beside difference minus without": ("KL 0.3 + difference", "difference"),
    "difference minus RHO-1": ("difference", "RHO-1, clean reference"),
    "difference in full minus RHO-1": ("difference, Adam's step, all 32", "RHO-1, clean reference"),
    "difference in full, with KL minus RHO-1 with KL": (
        "difference, Adam's step, all 32, KL 0.3",
        "RHO-1 + KL 0.3 to its reference",
    ),
    "difference minus the 32 examples alone": ("difference", "validation only"),
    "difference in full minus the 32 examples alone": ("difference, Adam's step, all 32", "validation only"),
}
EQUAL_TIME = ("ghost K=3", "difference", "difference, Adam's step", "difference, Adam's step, all 32",
              "RHO-1, clean reference", "KL 0.3")  # fmt: skip


def of_setting(name: str, rate: str, noise: str = NOISY) -> dict[str, Any]:
    """Figures of a setting of the trade-off at its last step, or, with a star, at its best measured moment."""
    found = load("tradeoff")["results"][noise + rate]
    return found["stopped at its best" if name.endswith("*") else "at equal steps"][name.rstrip("*")]


def rates(names: Iterable[str]) -> str:
    header = ["trained on"]
    for rate in (HOT, MILD):
        header += [f"target, lr {float(rate):g}", "retention", "tasks"]
    rows = []
    for name in names:
        line = [TITLES[name]]
        for rate in (HOT, MILD):
            found = of_setting(name, rate)
            line += [cell(found["target loss"]), cell(found["retention loss"]), f"{mean(found['tasks loss']):.3f}"]
        rows.append([*line, cell(of_setting(name.rstrip("*"), HOT)["time a step"], 2)])
    return markdown([*header, "time a step"], rows, "tradeoff")


@table
def results() -> str:
    return rates(SHORT)


@table
def results_all() -> str:
    return rates(TITLES)


@table
def gaps() -> str:
    """Differences of means: negative is better."""
    header = ["mean difference"] + [f"{what}, lr {float(rate):g}" for rate in (HOT, MILD) for what in ("target", "retention")]  # noqa: E501  # fmt: skip
    rows = []
    for title, (one, other) in GAPS.items():
        line = [title]
        for rate in (HOT, MILD):
            have = load("tradeoff")["results"][NOISY + rate]["at equal steps"]
            for figure in ("target loss", "retention loss"):
                known = one in have and other in have
                line.append(f"{mean(have[one][figure]) - mean(have[other][figure]):+.2f}" if known else "")
        rows.append(line)
    return markdown(header, rows, "tradeoff")


@table
def equal_time() -> str:
    columns = ("target, equal time", "retention, equal time")
    header = ["minus all tokens, in the time of 80 plain steps"]
    header += [f"{what.split(',')[0]}, lr {float(rate):g}" for rate in (HOT, MILD) for what in columns]
    rows = []
    for name in EQUAL_TIME:
        line = [TITLES[name]]
        for rate in (HOT, MILD):
            found = load("tradeoff")["results"][NOISY + rate]["minus all tokens, 95 % interval"].get(name, {})
            line += [cell(found.get(column), 2, "+") for column in columns]
        rows.append(line)
    return markdown(header, rows, "tradeoff")


@table
def clean() -> str:
    names = ("all tokens", "random half", "ghost K=3", "difference", "difference, rho 0.8")
    rows = []
    for name in names:
        found = of_setting(f"no noise: {name}", HOT, CLEAN)
        rows.append([name, *(cell(found[f"{what} loss"]) for what in ("target", "retention", "tasks"))])
    return markdown(["clean answers, lr 0.003", "target", "retention", "tasks"], rows, "tradeoff")


@table
def preferences() -> str:
    columns = {"accuracy": "accuracy", "margin": "margin", "loss of chosen": "loss of chosen", "retention loss": "retention"}  # noqa: E501  # fmt: skip
    rows = []
    for rate in ("0.001", "0.0003"):
        for name, found in load("tradeoff")["results"][PAIRS + rate]["at equal steps"].items():
            if name == "before tuning" and rate != "0.001":
                continue
            at = "" if name == "before tuning" else f", lr {float(rate):g}"
            rows.append([name.removeprefix("DPO: ") + at, *(cell(found[column]) for column in columns)])
    return markdown(["trained on", *columns.values()], rows, "tradeoff")


@table
def four_bits() -> str:
    section = load("tradeoff")["results"]["Supervised, noisy answers, 4-bit base, learning rate 0.003"]
    rows = [
        [name.removeprefix("NF4: "), *(cell(found[f"{what} loss"]) for what in ("target", "retention", "tasks"))]
        for name, found in section["at equal steps"].items()
    ]
    return markdown(["NF4 base, lr 0.003", "target", "retention", "tasks"], rows, "tradeoff")


@table
def results_gpu() -> str:
    rows = []
    for name, found in load("tradeoff_gpu")["results"].items():
        figures = [f"{found[rate][what]:.3f}" for rate in (HOT, MILD) for what in ("target", "retention", "tasks")]
        rows.append([name, *figures])
    header = [f"{what}, lr {float(rate):g}" for rate in (HOT, MILD) for what in ("target", "retention", "tasks")]
    return markdown(["trained on, one seed", *header], rows, "tradeoff_gpu")


@table
def tradeoff_tables() -> str:
    """Every table of the trade-off, section by section."""
    parts = []
    for section, found in load("tradeoff")["results"].items():
        parts.append(f"## {section}")
        for first, rows in found.items():
            columns = list(next(iter(rows.values())))
            lines = [[name, *(_tradeoff_cell(first, column, row[column]) for column in columns)] for name, row in rows.items()]  # noqa: E501  # fmt: skip
            parts.append(markdown([first, *columns], lines))
    return "\n\n".join([caption("tradeoff"), *parts])


def _tradeoff_cell(first: str, column: str, value: Any) -> str:
    if column in ("seeds", "after steps"):
        return "" if value is None else f"{value}"
    digits = 2 if column == "time a step" or first == "share kept" else 3
    return cell(value, digits, "+" if first.startswith("minus") else "")
