"""What masking does (`counterfactual.py`), and what people marked as wrong (`marks.py`)."""

from __future__ import annotations

from results import load

from .base import markdown, table


def foretold(file: str, *, interval: bool) -> str:
    """Of what masking does after some steps."""
    found = load(file)["spearman"]
    columns = [(step, what) for what in ("objective", "drift") for step in next(iter(found.values()))]
    rows = []
    for name, at in found.items():
        cells = []
        for step, what in columns:
            cell = f"{at[step][what]['spearman']:.2f}"
            low, high = at[step][what]["interval"]
            cells.append(f"{cell} ({low:.2f} to {high:.2f})" if interval else cell)
        rows.append([name, *cells])
    header = [f"{what}, after {step} step{'s' * (step != '1')}" for step, what in columns]
    return markdown(["rank correlation with what masking did" + ", 95 %" * interval, *header], rows, file)


@table
def counterfactual() -> str:
    return foretold("counterfactual-toy", interval=False)


@table
def counterfactual_real() -> str:
    return foretold("counterfactual-real", interval=True)


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
