"""What masking does (`counterfactual.py`), and what people marked as wrong (`marks.py`)."""

from __future__ import annotations

from results import load

from .base import markdown, table


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
