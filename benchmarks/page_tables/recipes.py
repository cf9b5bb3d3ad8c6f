"""What the recipes printed."""

from __future__ import annotations

from results import load

from .base import cell, markdown, table

TITLES = {
    "accuracy": "held-out preference accuracy",
    "margin": "held-out reward margin",
    "chosen": "loss on held-out chosen answers, nats/token",
    "answers": "loss on held-out answers, nats/token",
    "prose": "loss on held-out prose, nats/token",
    "kept": "share of answer tokens kept",
}


def runs(name: str) -> str:
    """One recipe without arguments: a column a run."""
    found = next(iter(load(name)["results"].values()))
    titles = {key: title for key, title in TITLES.items() if any(key in run for run in found.values())}
    rows = [[title, *(cell(run.get(key)) for run in found.values())] for key, title in titles.items()]
    return markdown(["", *found], rows, name)


def rates(name: str, titles: dict[str, str]) -> str:
    """At every learning rate: a row a run."""
    rows = [
        [f"learning rate {rate}: {run}", *(cell(figures[key]) for key in titles)]
        for rate, found in load(name)["results"].items()
        for run, figures in found.items()
        if run != "before"
    ]
    return markdown(["", *titles.values()], rows, name)


@table
def demo() -> str:
    return runs("dpo_qlora")


@table
def demo_rates() -> str:
    titles = {"accuracy": "accuracy", "margin": "margin", "chosen": "chosen answers", "prose": "prose"}
    return rates("dpo_qlora", titles)


@table
def demo_sft() -> str:
    return runs("sft_qlora")
