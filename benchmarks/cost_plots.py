"""Plots of what `step_cost.py` measures."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Table = dict[str, dict[str, float]]
COLOURS = {"ghost": "#4477aa", "difference": "#ee6677"}


def plot_bars(results: dict[str, Table], path: str) -> None:
    """Bars of time, per kind of step, with the floors as lines."""
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), sharex=True, squeeze=False)
    for axis, (name, table) in zip(axes[0], results.items(), strict=True):
        shown = {k: row for k, row in table.items() if not k.startswith(("target of", "straightforward"))}
        axis.barh(list(shown), [row["time ratio"] for row in shown.values()], color="#4477aa")
        for place, row in enumerate(shown.values()):
            if "floor" in row:
                axis.plot([row["floor"]] * 2, [place - 0.4, place + 0.4], color="#cc3311")
        axis.invert_yaxis()
        axis.set(title=name, xlabel="time / plain step (red: floor)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_sweep(points: list[dict[str, Any]], path: str) -> None:
    """One panel per axis: time of a gated step over a plain one, alone and with the target's refresh, and its floor."""
    names = list(dict.fromkeys(point["axis"] for point in points))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.2 * rows), sharey=True, squeeze=False)
    for spare in axes.flat[len(names) :]:
        spare.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        here = [point for point in points if point["axis"] == name]
        places = [str(point["at"]) for point in here]
        for kind, colour in COLOURS.items():
            for figure_of, style in (("time ratio", "o-"), ("with refresh", "o:"), ("floor", "_--")):
                label = f"{kind}, {figure_of.removesuffix(' ratio')}"
                axis.plot(places, [point[kind][figure_of] for point in here], style, color=colour, label=label, ms=4)
        axis.set(title=name)
        axis.grid(axis="y", alpha=0.3)
    for first in axes[:, 0]:
        first.set_ylabel("time / plain step")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
