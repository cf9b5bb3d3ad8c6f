"""Runs of the path estimator and its rivals: `tradeoff.py`, one base, the same data of a seed for all settings."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from results import load
from worlds.tables import Paces, at_equal_time, paired, run_of, spread, steps_in_time, times

from .base import markdown, table

TOY_RATES, PAIR_RATES = (3e-3, 6e-4), (1e-3, 3e-4, 1e-4)
TOY_FIGURES = {"target": "target", "retention": "retention"}
MORE = "path_more"  # runs on a second base

# Setting of runs.json -> what the pages call it.
PATHS = {
    "all tokens": "all tokens",
    "validation mixed in": "validation examples mixed into the batches",
    "validation only": "the 32 validation examples alone",
    "KL 0.1": "all tokens with KL 0.1 to the base",
    "KL 0.3": "all tokens with KL 0.3 to the base",
    "KL 1.0": "all tokens with KL 1 to the base",
    "RHO-1, clean reference": "RHO-1, reference tuned on the validation examples",
    "RHO-1 + KL 0.3 to the base": "RHO-1 with KL 0.3 to the base",
    "RHO-1 + KL 0.3 to its reference": "RHO-1 with KL 0.3 to its own reference",
    "EAFT": "EAFT",
    "STM": "STM",
    "DFT": "DFT",
    "path": '`estimator="path"`, nothing else',
    "all tokens, from theta*, KL to it": "`best()` without the mask",
    "all tokens, theta* renewed, KL to it": "`best(path_every=20)` without the mask",
    "path, theta* renewed": "path, begun at theta*, KL 0.3 to it, renewed every 20 steps",
    "path, no drift, best() else": "`best()` with lambda 0",
    "path, three blocks, best() else": "`best()` with theta* in the last three blocks alone",
    "path, by sequence, best() else": "`best()` with the upper half of each sequence",
    "path, theta* renewed, best() else": "`best(path_every=20)`, theta* renewed every 20 steps",
    "path, smoothed, best() else": "`best(smoothing=3)`, by values of neighbours too",
    "path, smoothed, rho 0.7, best() else": "`best(smoothing=3, rho=0.7)`",
    "path, rho 0.7, best() else": "`best(rho=0.7)`",
    "path, from the base, best() else": '`best()` with `path_from="reference"`',
    "path, KL 1.2, best() else": "`best()` with KL 1.2 to theta*",
    "path, KL 0.3, best() else": "`best()` with KL 0.3 to theta*",
    "path, best(), KL 0.3 to the base": "`best()` and KL 0.3 to the base",
    "path, best()": "**`best()`**: path, begun at theta*, KL 0.6 to it",
    "path, best(), rho of the data": "**`best(rho=...)`**, rho as `shared_gain` tells",
    "path, best(), rho of the share": "`best(rho=...)`, rho by the share alone, whatever its interval",
}
PAIRED = {
    "all tokens": "plain DPO",
    "smoothed 0.3": "DPO, labels smoothed by 0.3",
    "robust 0.3": "robust DPO, 0.3",
    "with likelihood": "DPO with the likelihood of chosen answers",
    "validation only": "DPO of the 32 clean pairs alone",
    "validation only, with likelihood": "the same, with the likelihood of chosen answers",
    "path, above zero": '`estimator="path"`, tokens above zero',
    "best(pairs=True)": "**`best(pairs=True)`**",
}


def by_setting(
    names: Iterable[str], rate: float, file: str = "path", world: str = "toy"
) -> dict[str, dict[int, dict[str, Any]]]:
    """Setting -> seed -> run, of those that there are."""
    runs = [run for run in load(file)["results"] if run["lr"] == rate and run["world"] == world]
    found = {name: {run["seed"]: run for run in runs if run["name"] == name} for name in names}
    return {name: some for name, some in found.items() if some}


def ends(
    rates: Sequence[float], titles: dict[str, str], figures: dict[str, str], file: str = "path", world: str = "toy"
) -> str:
    """Mean and standard deviation over seeds at the last step."""
    have = [by_setting(titles, rate, file, world) for rate in rates]
    header = ["trained on", *(f"{figure}, lr {rate:g}" for rate in rates for figure in figures.values()), "seeds"]
    first = next(iter(next(iter(have[0].values())).values()))["before"]
    rows = [["before tuning", *[f"{first[figure]:.3f}" for figure in figures] * len(rates), ""]]
    for name, title in titles.items():
        some = [groups.get(name, {}) for groups in have]
        if any(some):
            cells = [spread(run[f] for run in runs.values()) if runs else "" for runs in some for f in figures]
            rows.append([title, *cells, " / ".join(str(len(runs)) for runs in some)])
    return markdown(header, rows, file)


def against(
    best: str,
    rates: Sequence[float],
    titles: dict[str, str],
    figures: dict[str, str],
    file: str = "path",
    world: str = "toy",
) -> str:
    """The best minus each rival, paired by seed, with a 95 % interval."""
    rows = []
    have = [by_setting(titles, rate, file, world) for rate in rates]
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
    header = [f"{titles[best]} minus", *(f"{figure}, lr {rate:g}" for rate in rates for figure in figures.values())]
    return markdown(header, rows, file)


@table
def path_runs() -> str:
    return ends(TOY_RATES, PATHS, TOY_FIGURES)


@table
def path_gaps() -> str:
    return against("path, best()", TOY_RATES, PATHS, TOY_FIGURES)


@table
def path_more() -> str:
    """Rivals that need no validation examples, on another base."""
    return ends(TOY_RATES, PATHS, TOY_FIGURES, MORE)


@table
def path_more_gaps() -> str:
    return against("path, best()", TOY_RATES, PATHS, TOY_FIGURES, MORE)


@table
def path_more_kept() -> str:
    """What masks keep at the hot rate, by values of single tokens and of neighbours; mean over seeds."""
    names = ("path, smoothed, best() else", "path, smoothed, rho 0.7, best() else", "path, rho 0.7, best() else",
             "path, best()")  # fmt: skip
    groups, rows = by_setting(names, TOY_RATES[0], MORE), []
    kinds = list(next(iter(groups["path, best()"].values()))["kept"])
    for name, runs in groups.items():
        shares = (statistics.mean(run["kept"][kind] for run in runs.values()) for kind in kinds)
        rows.append([PATHS[name], *(f"{share:.2f}" for share in shares), str(len(runs))])
    return markdown([f"share kept, lr {TOY_RATES[0]:g}", *kinds, "seeds"], rows, MORE)


EQUAL_TIME = ("KL 0.3", "RHO-1, clean reference", "RHO-1 + KL 0.3 to the base", "all tokens, from theta*, KL to it",
              "path, best()", "path, best(), rho of the data")  # fmt: skip


@table
def path_equal_time() -> str:
    """In the time of all tokens' whole run: fewer steps, without and with what is spent once taken off."""
    paces: Paces = load("tradeoff_paces")["results"]
    steps_alone = {name: {**pace, "once": 0.0} for name, pace in paces.items()}
    header = ["minus all tokens, in the time of 80 plain steps", "time a step", "steps"]
    header += [f"{figure}, lr {rate:g}" for rate in TOY_RATES for figure in TOY_FIGURES]
    groups = [by_setting(["all tokens", *EQUAL_TIME], rate, MORE) for rate in TOY_RATES]
    whole = [{name: {s: run_of(run) for s, run in runs.items()} for name, runs in some.items()} for some in groups]
    rows = []
    for name in EQUAL_TIME:
        once = (paces[name]["once"] - paces["all tokens"]["once"]) / paces["all tokens"]["step"]
        counted = {PATHS[name]: steps_alone}
        if once >= 1:
            counted[f"the same, and {once:.0f} plain steps' time once"] = paces
        for told, known in counted.items():
            steps = steps_in_time(name, "all tokens", 80, known)
            line = [told, times(name, "all tokens", known), f"{steps:.0f}"]
            for some in whole:
                line += [at_equal_time(some[name], some["all tokens"], f, known) for f in TOY_FIGURES]
            rows.append(line)
    return markdown(header, rows, MORE, "tradeoff_paces")


PAIR_FIGURES = {"accuracy": "accuracy", "margin": "margin", "target": "loss of chosen", "retention": "retention"}
PLAIN, ALL_RIGHT, FLIPPED = "DPO: ", "DPO 0% flipped: ", "DPO 30% flipped: "


def pair_titles(prefix: str) -> dict[str, str]:
    """Setting -> what the pages call it. The clean pairs alone, and plain DPO of right labels, are the same in all."""
    alike = {name for name in PAIRED if "validation" in name or (name == "all tokens" and prefix == ALL_RIGHT)}
    return {(PLAIN if name in alike else prefix) + name: title for name, title in PAIRED.items()}


def pairs(
    titles: dict[str, str],
    rates: Sequence[float] = PAIR_RATES,
    figures: dict[str, str] = PAIR_FIGURES,
    file: str = "path",
    world: str = "toy",
) -> str:
    """A row for each setting and rate."""
    rows = []
    for name, title in titles.items():
        for rate in rates:
            runs = by_setting([name], rate, file, world).get(name, {})
            if runs:
                before = next(iter(runs.values()))["before"]
                cells = [spread(run[f] for run in runs.values()) for f in figures]
                rows.append([title, f"{rate:g}", *cells, str(len(runs))])
    first = ["before tuning", "", *(f"{before[f]:.3f}" for f in figures), ""]
    return markdown(["trained on", "lr", *figures.values(), "seeds"], [first, *rows], file)


def hardest(file: str) -> str:
    """The preset at its worst rate minus each rival at its best, by accuracy on the test pairs."""
    have: dict[str, list[dict[int, dict[str, Any]]]] = {}
    for name in pair_titles(FLIPPED):
        have[name] = [runs for rate in PAIR_RATES if (runs := by_setting([name], rate, file).get(name))]

    def accuracy(runs: dict[int, dict[str, Any]]) -> float:
        return statistics.mean(run["accuracy"] for run in runs.values())

    worst, rows = min(have.pop(f"{FLIPPED}best(pairs=True)"), key=accuracy), []
    for name, groups in have.items():
        if groups:
            best = max(groups, key=accuracy)
            leads = [paired(worst, best, lambda run, f=f: run[f]) for f in PAIR_FIGURES]
            lr, both = next(iter(best.values()))["lr"], worst.keys() & best.keys()
            rows.append([pair_titles(FLIPPED)[name], f"{lr:g}", *leads, str(len(both))])
    header = ["`best(pairs=True)` at its worst rate minus", "at its best lr", *PAIR_FIGURES.values(), "seeds"]
    return markdown(header, rows, file)


@table
def path_pairs_gaps() -> str:
    return hardest("path")


@table
def more_pairs_hardest() -> str:
    return hardest(MORE)


@table
def more_pairs_gaps() -> str:
    """The preset minus the clean pairs alone, rate by rate."""
    best, alone = f"{FLIPPED}best(pairs=True)", "DPO: validation only"
    rows = []
    for own, other in itertools.product(PAIR_RATES, repeat=2):
        runs, rival = (by_setting([name], rate, MORE).get(name, {}) for name, rate in ((best, own), (alone, other)))
        if runs and rival:
            leads = [paired(runs, rival, lambda run, f=f: run[f]) for f in PAIR_FIGURES]
            rows.append([f"{own:g}", f"{other:g}", *leads, str(len(runs.keys() & rival.keys()))])
    header = ["`best(pairs=True)`, lr", "minus the 32 clean pairs alone, lr", *PAIR_FIGURES.values(), "seeds"]
    return markdown(header, rows, MORE)


@table
def path_pairs() -> str:
    return pairs(pair_titles(FLIPPED))


@table
def more_pairs() -> str:
    return pairs(pair_titles(FLIPPED), file=MORE)


@table
def right_pairs() -> str:
    return pairs(pair_titles(ALL_RIGHT), file=MORE)


def of_kind(kind: str) -> dict[str, str]:
    return {f"{kind}: {name}": title for name, title in PATHS.items()}


@table
def path_clean() -> str:
    """Answers without noise."""
    return ends(TOY_RATES, of_kind("no noise"), TOY_FIGURES, MORE)


@table
def path_clean_gaps() -> str:
    best = "no noise: all tokens, from theta*, KL to it"  # as shared_gain tells
    return against(best, TOY_RATES, of_kind("no noise"), TOY_FIGURES, MORE)


@table
def path_exchanged() -> str:
    """Three in ten answers are those of other rows."""
    return ends(TOY_RATES, of_kind("exchanged"), TOY_FIGURES, MORE)


@table
def path_exchanged_gaps() -> str:
    best = "exchanged: all tokens, from theta*, KL to it"
    return against(best, TOY_RATES, of_kind("exchanged"), TOY_FIGURES, MORE)


def at_target(way: Sequence[Sequence[float]], target: float) -> float | None:
    """Retention where a run first comes to this target loss, on a straight line between the moments measured; None
    where it does not."""
    for (_, before, own), (_, after, then) in itertools.pairwise(way):
        if after <= target:
            return own + (before - target) / (before - after) * (then - own) if before > after else then
    return None


@table
def path_clean_curve() -> str:
    """Answers without noise: the end of each setting against the curve of all tokens, at the rate that retains more."""
    clean, rows = "no noise: ", []
    curves = [by_setting([f"{clean}all tokens"], rate, MORE)[f"{clean}all tokens"] for rate in TOY_RATES]
    for rate in TOY_RATES:
        for name, title in PATHS.items():
            own, there = by_setting([clean + name], rate, MORE).get(clean + name, {}), {}
            for seed, run in own.items():
                found = [at_target(runs[seed]["way"], run["target"]) for runs in curves if seed in runs]
                if reached := [retention for retention in found if retention is not None]:
                    there[seed] = {"retention": min(reached)}
            if there and name != "all tokens":
                means = [statistics.mean(own[seed][f] for seed in there) for f in TOY_FIGURES]
                curve = statistics.mean(run["retention"] for run in there.values())
                gap = paired(own, there, lambda run: run["retention"])
                seeds = f"{len(there)}" + f" of {len(own)}" * (len(there) < len(own))
                rows.append([title, f"{rate:g}", *(f"{x:.3f}" for x in (*means, curve)), gap, seeds])
    header = ["clean answers", "lr", "target", "retention", "all tokens' retention there", "difference", "seeds"]
    return markdown(header, rows, MORE)
