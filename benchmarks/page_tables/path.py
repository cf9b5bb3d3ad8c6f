"""Runs of the path estimator and its rivals: `tradeoff.py`, one base, the same data of a seed for all settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from results import load
from worlds.tables import paired, spread

from .base import markdown, table
from .tradeoff import HOT, MILD

# Setting of runs.json -> what the pages call it.
PATHS = {
    "all tokens": "all tokens",
    "KL 0.1": "all tokens with KL 0.1 to the base",
    "KL 0.3": "all tokens with KL 0.3 to the base",
    "KL 1.0": "all tokens with KL 1 to the base",
    "RHO-1, clean reference": "RHO-1, reference tuned on the validation examples",
    "RHO-1 + KL 0.3 to the base": "RHO-1 with KL 0.3 to the base",
    "RHO-1 + KL 0.3 to its reference": "RHO-1 with KL 0.3 to its own reference",
    "path": '`estimator="path"`, nothing else',
    "path, theta* renewed": "path, begun at theta*, KL 0.3 to it, renewed every 20 steps",
    "path, no drift, best() else": "`best()` with lambda 0",
    "path, best(), KL 0.3 to the base": "`best()` and KL 0.3 to the base",
    "path, best()": "**`best()`**: path, begun at theta*, KL 0.6 to it",
}
PAIRED = {
    "all tokens": "plain DPO",
    "smoothed 0.3": "DPO, labels smoothed by 0.3",
    "robust 0.3": "robust DPO, 0.3",
    "with likelihood": "DPO with the likelihood of chosen answers",
    "validation only": "DPO of the 32 clean pairs alone",
    "path, above zero": '`estimator="path"`, tokens above zero',
    "best(pairs=True)": "**`best(pairs=True)`**",
}


def by_setting(names: Iterable[str], rate: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Setting -> seed -> run, of those that there are."""
    runs = [run for run in load("path")["results"] if run["lr"] == float(rate)]
    found = {name: {run["seed"]: run for run in runs if run["name"] == name} for name in names}
    return {name: some for name, some in found.items() if some}


def ends(rates: tuple[str, str], titles: dict[str, str], figures: dict[str, str]) -> str:
    """Mean and standard deviation over seeds at the last step."""
    have = [by_setting(titles, rate) for rate in rates]
    header = ["trained on", *(f"{figure}, lr {rate}" for rate in rates for figure in figures.values()), "seeds"]
    first = next(iter(next(iter(have[0].values())).values()))["before"]
    rows = [["before tuning", *[f"{first[figure]:.3f}" for figure in figures] * len(rates), ""]]
    for name, title in titles.items():
        some = [groups.get(name, {}) for groups in have]
        if any(some):
            cells = [spread(run[f] for run in runs.values()) if runs else "" for runs in some for f in figures]
            rows.append([title, *cells, " / ".join(str(len(runs)) for runs in some)])
    return markdown(header, rows, "path")


def against(best: str, rates: tuple[str, str], titles: dict[str, str], figures: tuple[str, ...]) -> str:
    """The best minus each rival, paired by seed, with a 95 % interval."""
    rows = []
    have = [by_setting(titles, rate) for rate in rates]
    for name, title in titles.items():
        cells = [
            paired(groups[best], groups[name], lambda run, figure=figure: run[figure])
            if best in groups and name in groups
            else ""
            for groups in have
            for figure in figures
        ]
        if name != best and any(cells):
            rows.append([title, *cells])
    header = [f"{titles[best]} minus", *(f"{figure}, lr {rate}" for rate in rates for figure in figures)]
    return markdown(header, rows, "path")


@table
def path_runs() -> str:
    return ends((HOT, MILD), PATHS, {"target": "target", "retention": "retention"})


@table
def path_gaps() -> str:
    return against("path, best()", (HOT, MILD), PATHS, ("target", "retention"))


def _pairs(share: str) -> dict[str, str]:
    plain = {"DPO: all tokens": "plain DPO"} if share == "0%" else {}
    clean = {"DPO: validation only": PAIRED["validation only"]}  # the same pairs, whatever the others' labels are
    return {**plain, **clean, **{f"DPO {share} flipped: {name}": title for name, title in PAIRED.items()}}


@table
def path_pairs() -> str:
    figures = {"accuracy": "accuracy", "margin": "margin", "retention": "retention"}
    return ends(("0.001", "0.0003"), _pairs("30%"), figures)


@table
def path_pairs_clean() -> str:
    figures = {"accuracy": "accuracy", "margin": "margin", "retention": "retention"}
    return ends(("0.001", "0.0003"), _pairs("0%"), figures)
