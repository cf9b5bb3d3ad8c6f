"""`alphatoken show`: rows of a scored data set as a page on which tokens are coloured by value."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..cli import UserError, or_exit
from ..score.parts import SCORED, read_meta
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
    from transformers import AutoTokenizer

    folder = Path(folder)
    meta = read_meta(folder)
    if meta["state"] != "done":
        raise UserError(f"{folder}: is not finished. Run the command that made it again first.")
    if start > meta["rows"]:
        raise UserError(f"--start is {start}, and {folder} has {meta['rows']} rows.")
    names = meta["names"]
    adapter = names["adapter"]
    beside = adapter if adapter and (Path(adapter) / "tokenizer_config.json").is_file() else None
    source = tokenizer or names["tokenizer"] or beside or names["model"]
    try:
        loaded = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"No tokenizer could be loaded from {source}. Name one with --tokenizer.") from error
    found = _rows(folder, start - 1, rows)
    branches = ("chosen_", "rejected_") if meta["form"] == "pairs" else ("",)
    sequences = [(row[f"{b}input_ids"], row[f"{b}labels"], row[f"{b}token_values"], row[f"{b}response_mask"])
                 for b in branches for row in found]  # fmt: skip
    longest = max(len(ids) for ids, *_ in sequences)
    ids, labels, values, response = (
        torch.tensor([list(each[part]) + [fill] * (longest - len(each[part])) for each in sequences])
        for part, fill in enumerate((0, -100, 0.0, 0))
    )
    batch = {"input_ids": ids, "attention_mask": _lengths(sequences, longest)}
    if len(branches) > 1:
        batch["completion_mask"] = response
    else:
        batch["labels"] = ids.masked_fill(response == 0, -100)
    title = f"{folder.name}: rows {start} to {start + len(found) - 1}, {json.dumps(meta['selection'])}"
    return show_tokens(loaded, batch, values, weights=(labels != -100).float(), title=title)


def _lengths(sequences: list[tuple[Any, ...]], longest: int) -> torch.Tensor:
    return torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, *_ in sequences])


def _rows(folder: Path, start: int, count: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = []
    for part in sorted((folder / SCORED).glob("part-*.parquet")):
        size = pq.read_metadata(part).num_rows
        if start < size and len(found) < count:
            found += pq.read_table(part).slice(start, count - len(found)).to_pylist()
        start = max(start - size, 0)
    return found
