"""Writes the tables of README and docs from benchmarks/results/*.json, between markers that name them.

    python benchmarks/figures.py           # rewrite the pages (make figures)
    python benchmarks/figures.py --check   # only say which pages differ from their results; exit status 1 if any does

A page asks for a table by a pair of comments, and what stands between them is replaced:

    <!-- table: costs -->
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from results import load
from worlds.tables import paired, spread

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
HOT, MILD = "0.003", "0.0006"
NOISY, CLEAN = ("Supervised, noisy answers, learning rate ", "Supervised, clean answers, learning rate ")
PAIRS = "Preferences, noise in both answers, learning rate "
TABLES: dict[str, Callable[[], str]] = {}

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
KINDS = {  # row of step_cost.json -> what the pages call it, what it scores, its name in fidelity.json
    "plain": ("plain step", "", ()),
    "ghost, K=3, W=32": ('`"ghost"` (default), K = 3', "LoRA, trained linears", ("ghost, K=3, W=32",)),
    "ghost, all": ('`"ghost"`, all blocks', "LoRA, trained linears", ("ghost, K=all, W=32",)),
    "difference, all": (
        '`"difference"`, all blocks',
        "all that is trained before the head",
        ("difference, float32, default", "difference, nf4, default"),
    ),
    "difference, bf16": ("the same under bf16 autocast", "", ("difference, bf16 autocast, default",)),
    "exact, K=3": ('`"exact"`, K = 3', "all that is trained in three blocks", ("exact, K=3",)),
    "exact, all": ('`"exact"`, all blocks', "all that is trained in the blocks", ()),
}


def table(register: Callable[[], str]) -> Callable[[], str]:
    """Make a function's text available to pages, by its name."""
    TABLES[register.__name__.replace("_", "-")] = register
    return register


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], source: str | None = None) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + (f"\n\n{caption(source)}" if source else "")


def caption(name: str) -> str:
    """Where figures come from: file, date, machine."""
    found = load(name)
    found = found.get("about", found) if "date" not in found else found
    machine = found["machine"]
    if isinstance(machine, dict):
        where = f"{machine['gpu']}" if "gpu" in machine else f"{machine['cores']} CPU cores, no GPU"
    else:
        where = machine
    old = ", transcribed from the page of that date" if "transcribed" in found.get("source", "") else ""
    return f"*`benchmarks/results/{name}.json`: {found['date']}, {where}, torch {found['versions']['torch']}{old}.*"


def cell(value: Any, digits: int = 3, sign: str = "") -> str:
    """A number, or a mean with its spread."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return f"{value[0]:{sign}.{digits}f} ±{value[1]:.{digits}f}"
    return f"{value:{sign}.{digits}f}"


def mean(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


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
def counterfactual() -> str:
    """Of what masking does after 1, 4 and 16 steps."""
    found = load("counterfactual-toy")["spearman"]
    steps = list(next(iter(found.values())))
    columns = [(step, what) for what in ("objective", "drift") for step in steps]
    rows = [[name, *(f"{at[step][what]['spearman']:.2f}" for step, what in columns)] for name, at in found.items()]
    header = [f"{what}, after {step} step{'s' * (step != '1')}" for step, what in columns]
    return markdown(["rank correlation with what masking did", *header], rows, "counterfactual-toy")


@table
def marks() -> str:
    found = load("marks")
    rows = []
    for name, score in found["types"]["any"]["scores"].items():
        low, high = score["interval"]
        others = (f"{found[what]['scores'][name]['auc']:.2f}" for what in ("equal places", "within answers"))
        rows.append([name, f"{score['auc']:.2f} ({low:.2f} to {high:.2f})", *others])
    header = ["lower value inside a mark", "all tokens (95 %)", "at equal places", "within answers"]
    return markdown(header, rows, "marks")


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


def agreement(names: Iterable[str]) -> tuple[str, str]:
    """Range over moments and learning rates: Spearman's correlation with exact values, share of the same half in %."""
    rates = load("fidelity")["results"].values()
    cells = [c for r in rates for name in names for at, c in r["estimators"][name]["total"].items() if at != "all"]
    if not cells:
        return "", ""
    low, high = (f"{pick(c[0] for c in cells):.3f}" for pick in (min, max))
    least, most = (f"{100 * pick(c[2] for c in cells):.0f}" for pick in (min, max))
    return (low if low == high else f"{low} to {high}"), (f"{least} %" if least == most else f"{least} to {most} %")


@table
def costs() -> str:
    found = load("step_cost")["results"]
    off, on = found["plain graph"], found["checkpointing"]
    rows = []
    for name, (title, scores, known) in KINDS.items():
        ranks, halves = ("1", "100 %") if name == "exact, all" else agreement(known)
        pairs = [
            " / ".join(f"{kind[name][what]:.2f}" for kind in (off, on) if what in kind.get(name, {}))
            for what in ("time ratio", "with refresh")
        ]
        rows.append([title, scores, *pairs, ranks, halves])
    header = ["", "scores", "step, without / with checkpointing", "with the target's refresh",
              "rank correlation with exact values", "same half kept"]  # fmt: skip
    return markdown(header, rows) + f"\n\n{caption('step_cost')[:-2]}; `fidelity.json`: {load('fidelity')['date']}.*"


@table
def costs_more() -> str:
    """What the pages say of step_cost beside its table of estimators."""
    deep, cost = load("step_cost_32_blocks"), load("step_cost")
    naive = load("straightforward")["results"]["plain graph"]["straightforward"]
    rows = []
    for name, title in (("ghost, K=3, W=32", "ghost, K = 3"), ("difference, all", "difference, all blocks")):
        pairs = " / ".join(
            f"{deep['results'][kind][name]['with refresh']:.2f}" for kind in ("plain graph", "checkpointing")
        )
        rows.append([f"32 blocks, {title}: step with refresh, without / with checkpointing", pairs])
        again = cost["results"]["plain graph"][f"target of {name}"]["time ratio"]
        rows.append([f"12 blocks, {title}: a new target from as many sequences as a step has", f"{again:.2f}"])
    for kind, found in cost["results"].items():
        steps = [row["peak ratio"] for name, row in found.items() if name in KINDS and "peak ratio" in row]
        low, high = (min(steps), max(steps)) if steps else cost["peak ratio, all kinds of step"][kind]
        rows.append([f"peak memory of a step, {kind}", f"{low:.3f} to {high:.3f}"])
    if "ghost's time ratio at other hours" in cost:
        low, high = cost["ghost's time ratio at other hours"]
        rows.append(["ghost step without checkpointing, in rounds of other hours", f"{low} to {high}"])
    rows.append(["the method as first written down (`straightforward.py`): time", f"{naive['time ratio']}"])
    rows.append(["the same: peak memory", f"{naive['peak ratio']}"])
    return markdown(["beside a plain step of the same model", "ratio"], rows, "step_cost")


def gpu(title: str) -> str:
    columns = {"seconds": "s/step", "time ratio": "time", "with refresh": "with refresh", "peak GiB": "peak GiB",
               "reserved GiB": "reserved GiB", "memory ratio": "memory"}  # fmt: skip
    rows = [
        [name, *(f"{row[key]:.3f}" if key in row else "" for key in columns)]
        for name, row in load("gpu_budget")["results"][title].items()
    ]
    return markdown([title, *columns.values()], rows)


@table
def gpu_steps() -> str:
    return "\n\n".join([*map(gpu, load("gpu_budget")["results"]), caption("gpu_budget")])


@table
def gpu_host() -> str:
    """Where the time of a GPU step goes: kernels, and operations that the host dispatches."""
    found = load("gpu_host")["results"]
    rows = [[name, *(f"{row[key]}" if key in row else "" for key in found["columns"])] for name, row in found["rows"].items()]  # noqa: E501  # fmt: skip
    return markdown(["", *found["columns"]], rows, "gpu_host")


@table
def arithmetic() -> str:
    from arithmetic import budget  # needs transformers

    return budget("8b", "dpo")


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


def runs(name: str, titles: dict[str, str]) -> str:
    found = load(name)["results"]
    rows = [[title, *(cell(run.get(key)) for run in found.values())] for key, title in titles.items()]
    return markdown(["", *found], rows, name)


@table
def demo() -> str:
    return runs("dpo_qlora", {
        "accuracy": "held-out preference accuracy",
        "margin": "held-out reward margin",
        "chosen": "loss on held-out chosen answers, nats/token",
        "prose": "loss on held-out prose, nats/token",
        "kept": "share of answer tokens kept",
        "seconds": "seconds per step",
    })  # fmt: skip


@table
def demo_others() -> str:
    rows = [
        [f"{setting}: {run}", *(f"{figures[key]:.3f}" for key in ("accuracy", "margin", "chosen", "prose"))]
        for setting, found in load("dpo_qlora_others")["results"].items()
        for run, figures in found.items()
    ]
    return markdown(["", "accuracy", "margin", "chosen answers", "prose"], rows, "dpo_qlora_others")


@table
def demo_sft() -> str:
    return runs("sft_qlora", {
        "answers": "loss on held-out answers, nats/token",
        "prose": "loss on held-out prose, nats/token",
        "seconds": "seconds per step",
    })  # fmt: skip


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


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables written anew."""

    def write(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"There is no table '{found[2]}'; there are {', '.join(TABLES)}.")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return MARKED.sub(write, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    args = parser.parse_args(argv)
    stale = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from its results: make figures' if args.check else 'written'}")
        if not args.check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if args.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
