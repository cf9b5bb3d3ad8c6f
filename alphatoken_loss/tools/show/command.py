"""`alphatoken show`: rows of a scored data set as a page on which tokens are coloured by value."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..cli import UserError, or_exit
from ..score.parts import SCORED, read_meta
from ..score.scorer import load_tokenizer
from .tokens import TokenMap, show_tokens


@or_exit()
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0, or 2 for a user's mistake."""
    shown = show_scored(args.folder, start=args.start, rows=args.rows, tokenizer=args.tokenizer)
    if args.terminal:
        print(shown)
        return 0
    path = Path(args.out) if args.out else Path(args.folder) / "tokens.html"
    shown.save(path)
    print(f"Written to {path}")
    return 0


def show_scored(folder: str | Path, *, start: int = 1, rows: int = 20, tokenizer: str | None = None) -> TokenMap:
    """Rows of a scored data set, to be looked at.

    Args:
        folder: a finished output of `alphatoken score`.
        start (`int`): the first row, counted from 1.
        rows (`int`): how many.
        tokenizer (`str`, *optional*): where to load it from, by default what the rows were scored with.

    Raises:
        UserError: there are no such rows, or the tokenizer cannot be loaded.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if meta["state"] != "done":
        raise UserError(f"{folder}: is not finished. Run the command that made it again first.")
    if start > meta["rows"]:
        raise UserError(f"--start is {start}, and {folder} has {meta['rows']} rows.")
    names = meta["names"]
    loaded = load_tokenizer(tokenizer or names["tokenizer"], names["adapter"], names["model"])
    found = _rows(folder, start - 1, rows)
    branches = ("chosen_", "rejected_") if meta["form"] == "pairs" else ("",)
    sequences = [(row[f"{b}input_ids"], row[f"{b}labels"], row[f"{b}token_values"], row[f"{b}response_mask"])
                 for b in branches for row in found]  # fmt: skip
    ids, labels, values, response = (
        pad_sequence([torch.tensor(each[part], dtype=torch.tensor(fill).dtype) for each in sequences], True, fill)
        for part, fill in enumerate((0, -100, 0.0, 0))
    )
    real = pad_sequence([torch.ones(len(each[0]), dtype=torch.long) for each in sequences], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": real}
    if len(branches) > 1:
        batch["completion_mask"] = response
    else:
        batch["labels"] = ids.masked_fill(response == 0, -100)
    title = f"{folder.name}: rows {start} to {start + len(found) - 1}, {json.dumps(meta['selection'])}"
    return show_tokens(loaded, batch, values, weights=(labels != -100).float(), title=title)


def _rows(folder: Path, start: int, count: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = []
    for part in sorted((folder / SCORED).glob("part-*.parquet")):
        size = pq.read_metadata(part).num_rows
        if start < size and len(found) < count:
            found += pq.read_table(part).slice(start, count - len(found)).to_pylist()
        start = max(start - size, 0)
    return found
