"""Runs on a real model and public data: `real.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from results import load
from worlds.real_report import chosen_rates
from worlds.settings import OF_DATA, OF_ORACLE, SMOOTHED, SMOOTHED_MORE, UNMASKED
from worlds.tables import Run, Runs, final, paired, run_of, spread

from .base import markdown, table
from .path import MORE, PAIR_FIGURES, PAIRED, PATHS, PLAIN, TOY_RATES, against, by_setting, ends, pairs

RATE, HOT, PAIR_RATES = (5e-4,), (2e-3,), (1.25e-4,)
REAL_MORE = "real_more"  # two more seeds of some settings
BEST, NOISY, EXCHANGED = "path, best()", "nl2bash, boilerplate", "nl2bash, exchanged"
BEFORE = "path, best(), theta* of the lowest loss"  # up to commit 6d269b7; of seed 2 the rule takes the same theta*
ORACLES = {
    "oracle": "the mask that knows the noise",
    OF_ORACLE.name: "`best()` with the mask that knows the noise",
}
TITLES = {
    **PATHS,
    "random half": "a random half of the tokens",
    **ORACLES,
}
OF_EXCHANGED = ("all tokens", "RHO-1 + KL 0.3 to the base", UNMASKED.name, BEST)
FIGURES = {"target": "target", "retention": "WikiText-2", "gsm8k loss": "GSM8K", "tasks": "tasks, mean accuracy"}

IN_PROBLEMS = {
    "target": "target",
    "right answers": "right answers",
    "retention": "WikiText-2",
    "nl2bash loss": "nl2bash",
    "tasks": "tasks, mean accuracy",
}


def kept(world: str, names: Iterable[str]) -> str:
    """Share of each kind of token, mean over seeds."""
    runs, rows = [run for run in load("real")["results"] if run["world"] == world], []
    for name in names:
        shares = [run["kept"] for run in runs if run["name"] == name and run["lr"] in RATE]
        if shares and min(shares[0].values()) < 1:
            means = (statistics.mean(share[kind] for share in shares) for kind in shares[0])
            rows.append([TITLES[name], *(f"{mean:.2f}" for mean in means)])
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
    return ends(RATE, TITLES, FIGURES, "real", NOISY)


@table
def real_boilerplate_seeds() -> str:
    """At the hot rate, each seed's own."""
    groups = by_setting(TITLES, HOT[0], "real", NOISY)
    seeds = sorted({seed for runs in groups.values() for seed in runs})
    shown = {"target": "target", "gsm8k loss": "GSM8K"}
    rows = [
        [TITLES[name], *(f"{runs[seed][f]:.3f}" if seed in runs else "" for f in shown for seed in seeds)]
        for name, runs in groups.items()
    ]
    header = [f"{title}, seed {seed}" for title in shown.values() for seed in seeds]
    return markdown(["trained on, lr 0.002", *header], rows, "real")


@table
def real_which_theta() -> str:
    """The preset by its rule for theta*'s rate, and by the one before, seed by seed."""
    titles = {BEFORE: "the rate of the lowest held-out loss", BEST: "the mildest within a standard error of it"}
    rows = []
    for name, title in titles.items():
        runs = [by_setting([name], rate, "real", NOISY)[name] for rate in (*RATE, *HOT)]
        rows.append([title, *(f"{some[seed]['target']:.3f}" for some in runs for seed in sorted(some))])
    header = [f"target, lr {rate:g}, seed {seed}" for rate in (*RATE, *HOT) for seed in range(3)]
    return markdown(["theta* is made at", *header], rows, "real")


@table
def real_oracle() -> str:
    """What the mask that knows the noise does, alone and with the rest of the preset, beside masks that are made."""
    names = ("all tokens", "RHO-1, clean reference", UNMASKED.name, BEST, SMOOTHED.name, SMOOTHED_MORE.name, *ORACLES)
    return ends(HOT, {name: TITLES[name] for name in names}, FIGURES, "real", NOISY)


@table
def real_boilerplate_smoothed() -> str:
    """The preset with smoothed values and seven tenths kept, minus each other."""
    return against(SMOOTHED_MORE.name, HOT, TITLES, FIGURES, "real", NOISY)


@table
def real_five_seeds() -> str:
    """The preset with smoothed values and seven tenths kept, its strongest rival and itself without a mask, in five
    seeds: each one's target, means, and paired differences."""
    first, *others = SMOOTHED_MORE.name, "RHO-1 + KL 0.3 to its reference", UNMASKED.name
    some, more = (by_setting([first, *others], HOT[0], file, NOISY) for file in ("real", REAL_MORE))
    groups = {name: runs | more.get(name, {}) for name, runs in some.items()}
    seeds, rows = sorted(groups[first]), []
    for name, runs in groups.items():
        cells = [f"{runs[seed]['target']:.3f}" if seed in runs else "" for seed in seeds]
        rows.append([TITLES[name], *cells, *(spread(run[f] for run in runs.values()) for f in FIGURES)])
    for name in others:
        leads = [paired(groups[first], groups[name], lambda run, f=f: run[f]) for f in FIGURES]
        rows.append([f"{TITLES[first]} minus {TITLES[name]}, paired, 95 %", *[""] * len(seeds), *leads])
    header = ["trained on, lr 0.002", *(f"target, seed {seed}" for seed in seeds), *FIGURES.values()]
    return markdown(header, rows, "real", REAL_MORE)


@table
def real_smoothed_kept() -> str:
    """What the mask keeps at the hot rate, with values smoothed and as they are."""
    runs = [run for run in load("real")["results"] if run["world"] == NOISY and run["lr"] in HOT]
    rows = []
    for name in (SMOOTHED_MORE.name, SMOOTHED.name, BEST):
        for seed, run in sorted((run["seed"], run) for run in runs if run["name"] == name):
            rows.append([TITLES[name], str(seed), *(f"{share:.2f}" for share in run["kept"].values())])
    return markdown(["share kept of", "seed", *runs[0]["kept"]], rows, "real")


@table
def real_clean_hot() -> str:
    return ends(HOT, TITLES, FIGURES, "real", "nl2bash")


@table
def real_boilerplate_gaps() -> str:
    return against(BEST, RATE, TITLES, FIGURES, "real", NOISY)


def runs_of(world: str) -> list[Run]:
    return [run_of(run) for run in load("real")["results"] if run["world"] == world]


@table
def real_boilerplate_chosen() -> str:
    """Each setting at the rate that dev rows choose, of those that it was run at; and the preset's lead."""
    runs = [run for run in runs_of(NOISY) if run["name"] in TITLES and run["name"] not in ORACLES]
    chosen, rows = chosen_rates(runs), []
    for name in filter(chosen.get, TITLES):
        rate, some = chosen[name]
        tried = sorted({run["lr"] for run in runs if run["name"] == name})
        of = f"of {', '.join(f'{lr:g}' for lr in tried)}" if len(tried) > 1 else "alone"
        cells = [spread(final(run, figure) for run in some.values()) for figure in FIGURES]
        rows.append([TITLES[name], f"{rate:g} {of}", *cells, str(len(some))])
    best = chosen[BEST][1]
    for name in filter(chosen.get, TITLES):
        if name != BEST:
            leads = [paired(best, chosen[name][1], lambda run, f=f: final(run, f)) for f in FIGURES]
            if any(leads):  # of several seeds
                rows.append([f"`best()` minus {TITLES[name]}, paired, 95 %", "", *leads, ""])
    return markdown(["trained on", "lr, chosen on dev rows", *FIGURES.values(), "seeds"], rows, "real")


@table
def evidence_short() -> str:
    """The real model with noise and without, each at the rate that dev rows choose, and the toy at its hot rate."""
    noisy, clean = ({name: some for name, (_, some) in chosen_rates(runs_of(w)).items()} for w in (NOISY, "nl2bash"))
    toy = {
        name: {seed: run_of(run) for seed, run in some.items()}
        for name, some in by_setting(PATHS, TOY_RATES[0], MORE).items()
    }
    own = "RHO-1 + KL 0.3 to its reference"
    rivals = ("all tokens", "KL 0.3", "validation only", "RHO-1, clean reference", own)
    lines = [(TITLES[name], (name, name, name)) for name in rivals]
    lines.append(("**`best(rho=...)`**, rho as `shared_gain` tells", (BEST, UNMASKED.name, OF_DATA.name)))
    lines.append((TITLES[SMOOTHED_MORE.name], (SMOOTHED_MORE.name, "", SMOOTHED_MORE.name)))
    worlds = ((noisy, ("target", "gsm8k loss")), (clean, ("target", "gsm8k loss")), (toy, ("target", "retention")))

    def row(title: str, of: tuple[Runs, ...], at: int) -> list[str]:
        cells = []
        for runs, (_, figures) in zip(of, worlds, strict=True):
            cells += [spread(run["curve"][at][f] for run in runs.values()) if runs else "" for f in figures]
        seeds = [len(runs) for runs in of]
        return [title, *cells, " / ".join(map(str, seeds))]

    before = [{0: next(iter(world["all tokens"].values()))} for world, _ in worlds]
    rows = [[*row("before tuning", tuple(before), 0)[:-1], ""]]
    for title, names in lines:
        of = tuple(world.get(name, {}) for (world, _), name in zip(worlds, names, strict=True))
        if any(of):
            rows.append(row(title, of, -1))
    header = ["trained on", "real, noisy: target", "GSM8K", "real, clean: target", "GSM8K", "toy, noisy: target",
              "retention", "seeds"]  # fmt: skip
    return markdown(header, rows, "real", MORE)


@table
def real_boilerplate_kept() -> str:
    return kept(NOISY, TITLES)


@table
def real_exchanged() -> str:
    return ends(RATE, {name: TITLES[name] for name in OF_EXCHANGED}, FIGURES, "real", EXCHANGED)


@table
def real_exchanged_gaps() -> str:
    titles = {name: TITLES[name] for name in ("all tokens", UNMASKED.name)}
    return against(UNMASKED.name, RATE, titles, FIGURES, "real", EXCHANGED)


@table
def real_exchanged_kept() -> str:
    return kept(EXCHANGED, OF_EXCHANGED)


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
