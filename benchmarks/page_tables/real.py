"""Runs on a real model and public data: `real.py`."""

from __future__ import annotations

import statistics

from results import load
from worlds.real_report import chosen_rates
from worlds.settings import RENEWED
from worlds.tables import final, paired, run_of, spread

from .base import markdown, table
from .path import PAIR_FIGURES, PAIRED, PATHS, PLAIN, against, ends, pairs

RATE, HOT, PAIR_RATES = (5e-4,), (2e-3,), (1.25e-4,)
TITLES = {**PATHS, "path, from theta*": "path, begun at theta*, no KL"}
FIGURES = {"target": "target", "retention": "WikiText-2", "gsm8k loss": "GSM8K", "tasks": "tasks, mean accuracy"}

IN_PROBLEMS = {
    "target": "target",
    "right answers": "right answers",
    "retention": "WikiText-2",
    "nl2bash loss": "nl2bash",
    "tasks": "tasks, mean accuracy",
}


def kept(world: str) -> str:
    """Share of each kind of token, mean over seeds."""
    runs, rows = [run for run in load("real")["results"] if run["world"] == world], []
    for name, title in TITLES.items():
        shares = [run["kept"] for run in runs if run["name"] == name and run["lr"] in RATE]
        if shares and min(shares[0].values()) < 1:
            rows.append([title, *(f"{statistics.mean(share[kind] for share in shares):.2f}" for kind in shares[0])])
    kinds = next(run["kept"] for run in runs)
    return markdown(["share kept of", *kinds], rows, "real")


@table
def real_clean() -> str:
    return ends(RATE, TITLES, FIGURES, "real", "nl2bash")


@table
def real_gsm8k() -> str:
    return ends(RATE, TITLES, IN_PROBLEMS, "real", "gsm8k")


@table
def real_boilerplate() -> str:
    return ends(RATE, TITLES, FIGURES, "real", "nl2bash, boilerplate")


@table
def real_boilerplate_hot() -> str:
    return ends(HOT, TITLES, FIGURES, "real", "nl2bash, boilerplate")


@table
def real_boilerplate_renewed() -> str:
    """The preset with theta* renewed on the way, minus each other."""
    return against(RENEWED.name, HOT, TITLES, tuple(FIGURES), "real", "nl2bash, boilerplate")


@table
def real_clean_hot() -> str:
    return ends(HOT, TITLES, FIGURES, "real", "nl2bash")


@table
def real_boilerplate_gaps() -> str:
    return against("path, best()", RATE, TITLES, tuple(FIGURES), "real", "nl2bash, boilerplate")


@table
def real_boilerplate_chosen() -> str:
    """Each setting at the rate that dev rows choose, of those that were run at more than one; and the preset's lead."""
    world, best = "nl2bash, boilerplate", "path, best()"
    runs = [run_of(run) for run in load("real")["results"] if run["world"] == world]
    tried = {name: sorted({run["lr"] for run in runs if run["name"] == name}) for name in TITLES}
    chosen = chosen_rates([run for run in runs if len(tried.get(run["name"], ())) > 1])
    rows = []
    for name, title in TITLES.items():
        if name in chosen:
            rate, some = chosen[name]
            cells = [spread(final(run, figure) for run in some.values()) for figure in FIGURES]
            rows.append([title, f"{rate:g} of {', '.join(f'{lr:g}' for lr in tried[name])}", *cells, str(len(some))])
    for name in chosen:
        if name != best:
            leads = [paired(chosen[best][1], chosen[name][1], lambda run, f=f: final(run, f)) for f in FIGURES]
            rows.append([f"`best()` minus {name.partition(',')[0]}, paired, 95 %", "", *leads, ""])
    return markdown(["trained on", "lr, chosen on dev rows", *FIGURES.values(), "seeds"], rows, "real")


@table
def real_boilerplate_kept() -> str:
    return kept("nl2bash, boilerplate")


@table
def real_exchanged() -> str:
    return ends(RATE, TITLES, FIGURES, "real", "nl2bash, exchanged")


@table
def real_exchanged_kept() -> str:
    return kept("nl2bash, exchanged")


def flipped(source: str) -> str:
    """Preferences, three in ten of the training labels exchanged."""
    titles = {PLAIN + name: title for name, title in PAIRED.items()}
    figures = {**PAIR_FIGURES, "retention": "WikiText-2", "nl2bash loss": "nl2bash", "tasks": "tasks, mean accuracy"}
    return pairs(titles, PAIR_RATES, figures, "real", f"{source}, flipped")


@table
def real_pairs() -> str:
    return flipped("pandalm")


@table
def real_solutions() -> str:
    return flipped("solutions")
