"""Tables and curves of real.py's runs. The learning rate of each setting is the one of the lowest mean loss on dev rows
(preferences: of the lowest pair loss), which nothing is trained on and no figure is taken from."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from results import write

from .tables import Paces, Run, Runs, draw, ends, final, kept, paired, spread, table, times

SFT = {
    "target": "target loss",
    "right answers": "right answers",
    "retention": "WikiText-2",
    "tasks": "tasks (mean)",
    "lambada_openai": "LAMBADA",
    "arc_easy": "ARC-easy",
    "piqa": "PIQA",
    "winogrande": "Winogrande",
    "triviaqa": "TriviaQA",
    "gsm8k loss": "GSM8K loss",
    "nl2bash loss": "nl2bash loss",
}
DPO = {"accuracy": "accuracy", "margin": "margin", "target": "loss of chosen", **{k: SFT[k] for k in list(SFT)[2:]}}
BASE = "all tokens"
RIVALS = ("RHO-1, clean reference", "RHO-1 + KL 0.3 to the base", "KL 0.3", "DPO: robust 0.3")

HEAD = """# SmolLM2-135M-Instruct on public data

Written by `python benchmarks/real.py`: {about}.

Losses are in nats a token. Target: the loss on clean answers of test prompts that are in no other part. Right
answers: share of greedy answers equal to the one wanted (GSM8K: by the final number). WikiText-2: the loss on {heldout}
pieces of its test part. Tasks: lm-evaluation-harness on a fixed sample of {harness} items of each, accuracy (TriviaQA:
exact match). The learning rate of each setting is chosen on dev rows, not on the test. ± is the standard deviation over
seeds or, in differences paired by seed, the half-width of a 95 % interval (Student's t) over training seeds alone.
"""


def chosen_rates(runs: list[Run]) -> dict[str, tuple[float, Runs]]:
    """Setting -> its best rate on dev rows, of those that most seeds have been run at, and the runs there by seed."""
    groups: dict[str, dict[float, Runs]] = {}
    for run in runs:
        groups.setdefault(run["name"], {}).setdefault(run["lr"], {})[run["seed"]] = run
    found = {}
    for name, rates in groups.items():
        most = max(map(len, rates.values()))
        full = {lr: some for lr, some in rates.items() if len(some) == most}
        best = min(full, key=lambda lr: statistics.mean(dev_loss(run) for run in full[lr].values()))
        found[name] = best, full[best]
    return found


def dev_loss(run: Run) -> float:
    last = run["curve"][-1]
    return last.get("dev pair loss", last["dev"])


def quality(best: dict[str, tuple[float, Runs]], base: str, figures: dict[str, str], paces: Paces) -> str:
    first = next(iter(next(iter(best.values()))[1].values()))["curve"][0]
    figures = {k: v for k, v in figures.items() if k in first}
    rows = [["before tuning", "", *(f"{first[name]:.3f}" for name in figures), "", ""]]
    for name, (lr, runs) in best.items():
        cells = [spread(final(run, figure) for run in runs.values()) for figure in figures]
        rows.append([name, f"{lr:g}", *cells, times(name, base, paces), str(len(runs))])
    return table(["at its best rate", "rate", *figures.values(), "time a step", "seeds"], rows)


def differences(best: dict[str, tuple[float, Runs]], base: str, figures: tuple[str, ...]) -> str:
    rows = []
    for name, (_, runs) in best.items():
        if name != base:
            rows.append([name, *(paired(runs, best[base][1], lambda run, f=f: final(run, f)) for f in figures)])
    return table([f"minus {base}, 95 % interval", *figures], rows)


def report(results: list[Run], paces: Paces, about: str, plan: Any) -> str:
    parts = [HEAD.format(about=about, heldout=plan.heldout, harness=plan.harness)]
    for world in dict.fromkeys(run["world"] for run in results):
        best = chosen_rates([run for run in results if run["world"] == world])
        pairs = any(name.startswith("DPO") for name in best)
        base = f"DPO: {BASE}" if pairs else BASE
        parts += [f"## {world}\n", quality(best, base, DPO if pairs else SFT, paces)]
        several = len(best) > 1 and max(len(runs) for _, runs in best.values()) > 1
        for rival in (base, *RIVALS) if several else ():
            if rival in best:
                figures = ("accuracy", "margin", "target", "retention") if pairs else ("target", "retention", "tasks")
                there = tuple(f for f in figures if f in next(iter(best[rival][1].values()))["curve"][-1])
                parts.append(differences(best, rival, there))
        if not pairs:
            parts.append(kept({name: runs for name, (_, runs) in best.items()}))
    return "\n".join(parts)


def plot(results: list[Run], path: Path) -> None:
    """By world, along training at each setting's best rate, target against retention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    worlds = list(dict.fromkeys(run["world"] for run in results))
    columns = min(len(worlds), 2)
    rows = math.ceil(len(worlds) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(8 * columns, 4.4 * rows), squeeze=False)
    for axis in axes.flat[len(worlds) :]:
        axis.remove()
    for axis, world in zip(axes.flat, worlds, strict=False):
        best = chosen_rates([run for run in results if run["world"] == world])
        y = "accuracy" if any(name.startswith("DPO") for name in best) else "target"
        for name, (lr, runs) in best.items():
            draw(axis, name.removeprefix("DPO: "), runs.values(), y, f", lr {lr:g}")
        axis.set(title=world, xlabel="loss on WikiText-2 (forgetting →)")
        axis.set_ylabel("held-out accuracy" if y == "accuracy" else "loss on clean test answers")
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(results: list[Run], paces: Paces, folder: Path, about: str, plan: Any) -> None:
    """Print the tables; write them as `real.md`, what the runs ended with as `real.json`, the curves as `real.png`."""
    if not results:
        print("There are no runs to report yet.")
        return
    text = report(results, paces, about, plan)
    print("\n" + text)
    (folder / "real.md").write_text(text, encoding="utf-8")
    write(folder / "real.json", ends(results), settings={"runs": about})
    plot(results, folder / "real.png")
    print(f"Written: {folder / 'real.md'}, {folder / 'real.png'}")
