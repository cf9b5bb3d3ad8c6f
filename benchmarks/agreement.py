"""Agreement of token values, collected over seeds: tables, JSON and a plot."""

from __future__ import annotations

import statistics
from typing import Any

import torch

COLUMNS = ["Spearman", "its standard deviation", "share of tokens on the same side of the median", "samples"]
Key = tuple[str, str, str]  # section, what was compared, which part of the value
Results = dict[str, Any]  # learning rate -> section -> name -> part -> optimizer step, or "all" -> COLUMNS


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def same_half(a: torch.Tensor, b: torch.Tensor) -> float:
    kept, wanted = (values >= values.median() for values in (a, b))
    return (kept == wanted).double().mean().item()


class Figures:
    """Samples at one learning rate, or merged from several."""

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate
        self.samples: dict[tuple[float, Key], dict[int, list[tuple[float, float]]]] = {}

    def add(
        self, key: Key, step: int, found: torch.Tensor | None, wanted: torch.Tensor | None, counted: torch.Tensor
    ) -> None:
        """One comparison of values `(B, T)`; nothing where the wanted ones do not differ (no drift yet)."""
        assert found is not None and wanted is not None
        found, wanted = found[counted], wanted[counted]
        if bool((wanted != wanted[0]).any()):
            at = self.samples.setdefault((self.rate, key), {})
            at.setdefault(step, []).append((spearman(found, wanted), same_half(found, wanted)))

    def merge(self, other: Figures) -> None:
        for key, at in other.samples.items():
            for step, found in at.items():
                self.samples.setdefault(key, {}).setdefault(step, []).extend(found)

    def results(self) -> Results:
        results: Results = {}
        for (rate, (section, name, part)), at in self.samples.items():
            every = {str(step): found for step, found in sorted(at.items())}
            every["all"] = [sample for found in at.values() for sample in found]
            names = results.setdefault(f"{rate:g}", {}).setdefault(section, {}).setdefault(name, {})
            names[part] = {step: _summary(found) for step, found in every.items()}
        return results


def _summary(samples: list[tuple[float, float]]) -> list[float]:
    ranks, halves = zip(*samples, strict=True)
    spread = statistics.stdev(ranks) if len(ranks) > 1 else 0.0
    return [round(x, 4) for x in (statistics.mean(ranks), spread, statistics.mean(halves))] + [len(samples)]


def print_section(results: Results, section: str) -> None:
    for rate, sections in results.items():
        found = sections.get(section, {})
        rows = {f"{name}, {part}": at for name, parts in found.items() for part, at in parts.items()}
        steps = list(dict.fromkeys(step for at in rows.values() for step in at if step != "all"))
        steps = [*sorted(steps, key=int), "all"] if section != "refresh" else ["all"]
        print(f"\n{section}, learning rate {rate}: Spearman +- sd, same half in %, by optimizer step")
        print(f"{'':52}" + "".join(f"{step:>20}" for step in steps))
        for name, at in rows.items():
            cells = [at.get(step) for step in steps]
            shown = [f"{c[0]:.3f} +-{c[1]:.3f} {100 * c[2]:3.0f}" if c else "" for c in cells]
            print(f"{name:52}" + "".join(f"{text:>20}" for text in shown), flush=True)


SHOWN = {
    "difference, float32, default": "difference, float32",
    "difference, bf16 autocast, default": "difference, bf16",
    "ghost, K=all, W=32": "ghost, all blocks",
    "ghost, K=3, W=32": "ghost, K = 3",
    "exact, K=3": "exact, K = 3",
}


def plot(results: Results, path: str) -> None:
    """Agreement by estimator and moment, by target age, and by validation size, of what there is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    left, middle, right = axes
    for sections, style in zip(results.values(), ("-", "--", ":"), strict=False):
        for number, (name, label) in enumerate(SHOWN.items()):
            at = sections.get("estimators", {}).get(name, {}).get("total", {})
            steps = [step for step in at if step != "all"]
            spearmans = [at[step][0] for step in steps]
            options = {"color": f"C{number}", "marker": "o", "ms": 4, "label": label if style == "-" else None}
            left.plot(steps, spearmans, style, **options)
        for axis, section, color in ((middle, "age", "C5"), (right, "validation", "C6")):
            at = {name.split()[0]: parts["adaptation"]["all"] for name, parts in sections.get(section, {}).items()}
            means, spreads = ([cell[i] for cell in at.values()] for i in (0, 1))
            axis.errorbar(list(at), means, spreads, ls=style, color=color, marker="o", ms=4, capsize=3)
    left.set(title="Total, by estimator", xlabel="optimizer steps", ylabel="Spearman")
    middle.set(title="Adaptation, by age of the target", xlabel="age in optimizer steps")
    right.set(title="Adaptation, by validation set", xlabel="validation sequences")
    left.set_ylim(0, 1.02)
    left.legend(loc="lower right", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_ylim(top=1.02)
    kinds = zip(results, ("solid", "dashed", "dotted"), strict=False)
    figure.suptitle("Learning rate " + ", ".join(f"{rate} {kind}" for rate, kind in kinds), fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
