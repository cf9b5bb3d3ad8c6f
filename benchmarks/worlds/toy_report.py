"""Tables and curves of tradeoff.py's runs."""

from __future__ import annotations

import math
from pathlib import Path

from results import tables, write

from .tables import Paces, Run, Runs, at_best, differences, draw, ends, kept, quality

SFT = {
    "target": "target loss",
    "retention": "retention loss",
    "prose": "prose",
    "code": "Python",
    "tasks": "tasks loss",
    "tasks rows": "tasks solved",
    "target tokens": "target accuracy",
}
DPO = {
    "accuracy": "accuracy",
    "margin": "margin",
    "target": "loss of chosen",
    "retention": "retention loss",
    "prose": "prose",
    "code": "Python",
    "tasks": "tasks loss",
    "tasks rows": "tasks solved",
}


def grouped(results: list[Run]) -> dict[str, dict[float, dict[str, Runs]]]:
    """Kind of experiment -> learning rate -> setting -> seed -> run."""
    found: dict[str, dict[float, dict[str, Runs]]] = {}
    for run in results:
        kind, colon, _ = run["name"].partition(": ")
        kind = kind if colon else "noise"
        found.setdefault(kind, {}).setdefault(run["lr"], {}).setdefault(run["name"], {})[run["seed"]] = run
    return found


# What settings are compared with beside all tokens.
RIVALS = ("RHO-1, clean reference", "validation only", "DPO: validation only")
TITLES = {
    "noise": "Supervised, noisy answers",
    "no noise": "Supervised, clean answers",
    "exchanged": "Supervised, three in ten answers exchanged",
    "NF4": "Supervised, noisy answers, 4-bit base",
    "DPO": "Preferences, noise in both answers",
    "DPO 0% flipped": "Preferences, right labels",
    "DPO 30% flipped": "Preferences, 30 % of the training labels exchanged",
}


HEAD = """# Trade-off of adapting and forgetting

Written by `python benchmarks/tradeoff.py`: {about}.

Losses are in nats a token, lower is better. Target: clean C++ answers. Retention: the mean of the losses on held-out
prose and Python, 48 pieces of 96 tokens each, drawn from all held-out documents, without those that share 12 tokens in
a row with what was trained on. Tasks: the little tasks of pretraining. ± is the standard deviation over seeds or, in
differences paired by seed, the half-width of a 95 % interval (Student's t) over training seeds alone: the test texts
are the same for all runs. Time is that of a step, measured apart. Equal time is that of the whole run of all tokens: of
it a setting spends what it needs once (RHO-1's reference, theta*, a first target; not the Fisher, which is kept) and
takes fewer steps, which by itself retains more: read its two columns together.
"""


def report(results: list[Run], paces: Paces, about: str) -> str:
    parts, found = [HEAD.format(about=about)], grouped(results)
    for kind, rates in found.items():
        for lr, groups in rates.items():
            base = next((name for name in groups if name.endswith("all tokens")), None)
            if base is None:
                continue
            figures = DPO if kind.startswith("DPO") else SFT
            parts += [f"## {TITLES[kind]}, learning rate {lr:g}\n", quality(groups, base, figures, paces)]
            pair = ("accuracy", "retention") if kind.startswith("DPO") else ("target", "retention")
            for rival in (base, *(name for name in RIVALS if name in groups)):
                if len(groups) > 1:
                    parts.append(differences(groups, rival, pair, paces))
            if not kind.startswith("DPO"):
                parts += [at_best(groups), kept(groups)]
    return "\n".join(parts)


# Curves drawn: name -> colour, line. (Log-ratio selection of pairs diverges, and would set the scale.)
def plot(results: list[Run], path: Path) -> None:
    """Along training, target against retention: down and to the left is better (for pairs, up and to the left)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = grouped(results)
    panels = [(kind, lr) for kind in ("noise", "no noise", "DPO") for lr in found.get(kind, {})]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.5 * columns, 4.6 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (kind, lr) in zip(axes.flat, panels, strict=False):
        y = "accuracy" if kind == "DPO" else "target"
        for name, runs in found[kind][lr].items():
            draw(axis, name.removeprefix(f"{kind}: "), runs.values(), y)
        axis.set(title=f"{TITLES[kind]}, lr {lr:g}", xlabel="loss on held-out prose and Python (forgetting →)")
        axis.set_ylabel("held-out accuracy" if kind == "DPO" else "loss on clean target answers")
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves, not on them
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: list[Run], paces: Paces, folder: Path, about: str) -> None:
    """Print the tables, and write them as `report.md`, their figures as `tradeoff.json`, and the curves."""
    if not results:
        print("There are no runs to report yet.")
        return
    text = report(results, paces, about)
    print("\n" + text)
    (folder / "report.md").write_text(text, encoding="utf-8")
    write(folder / "tradeoff.json", tables(text), settings={"runs": about})
    write(folder / "runs.json", ends(results), settings={"runs": about})
    plot(results, folder / "tradeoff.png")
    print(f"Written: {folder / 'report.md'}, {folder / 'tradeoff.png'}")
