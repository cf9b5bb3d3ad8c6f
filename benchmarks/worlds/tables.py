"""Tables of runs: means, standard deviations, and differences paired by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from scipy.stats import t as student

Run = dict[str, Any]
Runs = dict[int, Run]  # by seed
TIMED = ("step", "pace", "once")  # of a measured moment: when it was, and seconds
Paces = dict[str, dict[str, float]]  # seconds of a "step" and those spent "once", by setting


# What is drawn of a setting, the same in all plots: colour, and dashes where a KL is added.
STYLES = {
    "all tokens": ("#222222", "-"),
    "KL 0.3": ("#222222", "--"),
    "random half": ("#999999", "-"),
    "validation mixed in": ("#cc8800", "-"),
    "validation only": ("#cc8800", ":"),
    "RHO-1, clean reference": ("#cc3311", "-"),
    "RHO-1 + KL 0.3 to its reference": ("#cc3311", "--"),
    "RHO-1 + KL 0.3 to the base": ("#cc3311", "-."),
    "oracle": ("#aa44aa", ":"),
    "ghost K=3": ("#66aadd", "-"),
    "ghost all, W=0": ("#4477aa", "-"),
    "difference": ("#117733", "-"),
    "difference, Adam's step, all 32": ("#44bb99", "-"),
    "KL 0.3 + difference": ("#117733", "--"),
    "all tokens, from theta*, KL to it": ("#7755dd", ":"),
    "all tokens, theta* renewed, KL to it": ("#bb99ee", ":"),
    "path, theta* renewed, best() else": ("#7755dd", "--"),
    "path, smoothed, best() else": ("#3322aa", ":"),
    "path, smoothed, rho 0.7, best() else": ("#009988", "-"),
    "path, best()": ("#3311bb", "-"),
    "best(pairs=True)": ("#3311bb", "-"),
}
LABELS = {
    "all tokens, from theta*, KL to it": "best() without the mask",
    "all tokens, theta* renewed, KL to it": "best(path_every=20) without the mask",
    "path, theta* renewed, best() else": "best(path_every=20)",
    "path, smoothed, best() else": "best(smoothing=3)",
    "path, smoothed, rho 0.7, best() else": "best(smoothing=3, rho=0.7)",
    "path, best()": "best()",
}


def final(run: Run, name: str) -> float:
    return run["curve"][-1][name]


def at_step(run: Run, step: float, name: str) -> float:
    """A figure after so many steps, between the moments that were measured; at most the last one."""
    curve = run["curve"]
    for before, after in itertools.pairwise(curve):
        if after["step"] >= step:
            share = (step - before["step"]) / (after["step"] - before["step"])
            return before[name] + share * (after[name] - before[name])
    return curve[-1][name]


def spread(values: Iterable[float], digits: int = 3) -> str:
    found = list(values)
    deviation = f" ±{statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}"


def paired(runs: Runs, base: Runs, of: Callable[[Run], float], digits: int = 3) -> str:
    """Mean difference to the base over the seeds that both have, and its 95 % confidence interval (Student's t)."""
    found = [of(run) - of(base[seed]) for seed, run in runs.items() if seed in base]
    if len(found) < 2:
        return ""
    half = student.ppf(0.975, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.mean(found):+.{digits}f} ±{half:.{digits}f}"


def draw(axis: Any, name: str, runs: Iterable[Run], y: str, more: str = "") -> None:
    """A setting's curve of a figure against retention, in its style; one that has none is left out."""
    if name not in STYLES:
        return
    xs, ys = curves(runs, "retention", y)
    colour, line = STYLES[name]
    label = LABELS.get(name, name) + more
    axis.plot(xs, ys, line, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    axis.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=7)


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def steps_in_time(name: str, base: str, steps: float, paces: Paces) -> float:
    """Steps of a setting in the time of so many of the base, less what it spends once."""
    left = steps * paces[base]["step"] + paces[base]["once"] - paces[name]["once"]
    return max(left / paces[name]["step"], 0.0)


def times(name: str, base: str, paces: Paces) -> str:
    return f"{paces[name]['step'] / paces[base]['step']:.2f}" if {name, base} <= paces.keys() else ""


def quality(groups: dict[str, Runs], base: str, figures: dict[str, str], paces: Paces) -> str:
    """One line for the untuned model and one for each setting, at its last step."""
    first = next(iter(groups[base].values()))["curve"][0]
    before = ["before tuning", *(f"{first[name]:.3f}" for name in figures), "", ""]
    rows = [before]
    for name, runs in groups.items():
        cells = [spread(final(run, figure) for run in runs.values()) for figure in figures]
        rows.append([name, *cells, times(name, base, paces), str(len(runs))])
    return table(["at equal steps", *figures.values(), "time a step", "seeds"], rows)


def differences(groups: dict[str, Runs], base: str, figures: tuple[str, str], paces: Paces) -> str:
    """Each setting minus the base, two figures at equal steps, and at equal time: in the time of the base's run, a
    slower setting has taken fewer steps (a faster one no more than its own)."""
    rows = []
    for name, runs in groups.items():
        if name == base:
            continue
        cells = [paired(runs, groups[base], lambda run, figure=figure: final(run, figure)) for figure in figures]
        cells += [at_equal_time(runs, groups[base], figure, paces) for figure in figures]
        rows.append([name, *cells])
    names = [f"{figure}, equal {what}" for what in ("steps", "time") for figure in figures]
    return table([f"minus {base}, 95 % interval", *names], rows)


def at_equal_time(runs: Runs, base: Runs, figure: str, paces: Paces) -> str:
    """Each run when the time of its base's whole run is over, minus the base; empty where a pace is not known."""
    first = next(iter(base.values()))
    name = next(iter(runs.values()))["name"]
    if not {name, first["name"]} <= paces.keys():
        return ""
    steps = steps_in_time(name, first["name"], final(first, "step"), paces)

    def of(run: Run) -> float:
        return final(run, figure) if run["name"] == first["name"] else at_step(run, steps, figure)

    return paired(runs, base, of)


def at_best(groups: dict[str, Runs]) -> str:
    """Each run at its measured moment of lowest target loss: as if one had known when to stop."""
    rows = []
    for name, runs in groups.items():
        # (Of a run out of an earlier table not all is known at each moment.)
        best = [min((p for p in run["curve"] if "tasks" in p), key=lambda p: p["target"]) for run in runs.values()]
        cells = [spread(point[figure] for point in best) for figure in ("target", "retention", "tasks")]
        rows.append([name, *cells, f"{statistics.mean(point['step'] for point in best):.0f}"])
    return table(["stopped at its best", "target loss", "retention loss", "tasks loss", "after steps"], rows)


def kept(groups: dict[str, Runs]) -> str:
    """Mean share kept of each kind of token; empty where a setting has met none of a kind."""
    runs = [run for some in groups.values() for run in some.values()]
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["kept"]))
    rows = []
    for name, some in groups.items():
        shares = [[run["kept"][kind] for run in some.values() if kind in run["kept"]] for kind in kinds]
        if any(shares):
            rows.append([name, *(f"{statistics.mean(found):.2f}" if found else "" for found in shares)])
    return table(["share kept", *kinds], rows)


def ends(results: Iterable[Run]) -> list[Run]:
    """For the pages: each run's figures before its first step and behind its last, target and retention between (as
    step, target, retention), and the share kept of each kind."""
    found = []
    for run in sorted(results, key=lambda run: (run["world"], run["name"], -run["lr"], run["seed"])):
        before, after = ({k: v for k, v in run["curve"][at].items() if k not in TIMED} for at in (0, -1))
        told = {name: run[name] for name in ("world", "name", "lr", "seed", "kept")}
        way = [[point[name] for name in ("step", "target", "retention")] for point in run["curve"]]
        found.append({**told, "before": before, **after, "way": way})
    return found


def run_of(end: Run) -> Run:
    """The run behind a row of `ends`: all figures of its first and last moment, target and retention between."""
    told = {name: end[name] for name in ("world", "name", "lr", "seed", "kept")}
    figures = {k: v for k, v in end.items() if k not in (*told, "before", "way")}
    curve = [dict(zip(("step", "target", "retention"), point, strict=True)) for point in end["way"]]
    curve[0] |= end["before"]
    curve[-1] |= figures
    return {**told, "curve": curve}


def joined(results: Iterable[Run], earlier: Iterable[Run], close: float = 0.01) -> list[Run]:
    """Runs, and those of an earlier table that are not among them.

    Args:
        close (`float`): nats that target and retention may differ by before the first step (bf16 against float32).

    Raises:
        ValueError: a world's runs began from another model, or were measured on other text.
    """

    def key(run: Run) -> tuple[Any, ...]:
        return run["world"], run["name"], run["lr"], run["seed"]

    found, firsts = {key(run): run for run in results}, dict[str, Run]()
    for run in found.values():
        firsts.setdefault(run["world"], run["curve"][0])
    for run in earlier:
        first = run["curve"][0]
        gaps = {name: first[name] - firsts.get(run["world"], first)[name] for name in ("target", "retention")}
        if any(abs(gap) > close for gap in gaps.values()):
            told = ", ".join(f"{name} {gap:+.3f}" for name, gap in gaps.items())
            raise ValueError(
                f"Before tuning the model scores otherwise in the table to join ({run['world']}: {told}), so its runs "
                "are not of this base. Begin another table."
            )
        found.setdefault(key(run), run)
    return list(found.values())


def curves(runs: Iterable[Run], *names: str) -> list[tuple[float, ...]]:
    """Means of figures over runs, at the moments at which all have them."""
    points = [{point["step"]: point for point in run["curve"] if all(n in point for n in names)} for run in runs]
    steps = sorted(set.intersection(*map(set, points)))
    return [tuple(statistics.mean(run[step][name] for run in points) for step in steps) for name in names]
