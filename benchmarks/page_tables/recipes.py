"""What the recipes printed."""

from __future__ import annotations

from results import load

from .base import cell, markdown, table


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
