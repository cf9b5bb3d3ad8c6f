"""The output of `score`: parts with token values, and the folder that trainers load; no file is ever half-written."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...batches.batch import IGNORE
from ...files import save_text, write_whole
from ...selection.thresholds import keep_mask, smoothed
from ..cli import UserError, first_line
from .rows import Row
from .train import close_folder, save_folder, write_arrow

if TYPE_CHECKING:
    import pyarrow as pa

META, SCORED = "meta.json", "scored"
_AGAIN = "Delete it and run the command that made it again, which makes this part alone."

_COUNTS = ("response_tokens", "kept_tokens", "rows_without_labels", "sequences_cut", "tokens_cut")
_OTHER_LABELS = (
    "{folder}: has labels for rho {rho} by {threshold_scope} and smoothing {smoothing} already. They are not changed "
    "in place: Axolotl and other tools keep what they have prepared under a hash of the configuration, in which the "
    "folder's name stands and not its content, and would train on the old labels. Write another folder: alphatoken "
    "reselect {folder}{options}."
)


@dataclass(frozen=True)
class Labelling:
    """Which tokens keep their labels, by their values.

    Args:
        rho (`float`): share of response tokens to keep, in (0, 1].
        threshold_scope (`str`): `"sequence"`, that share of each sequence, or `"dataset"`, of all tokens (of each
            branch, for pairs).
        smoothing (`int`): neighbours on either side whose values count too, see `AlphaTokenConfig`.
    """

    rho: float
    threshold_scope: str = "sequence"
    smoothing: int = 0


def read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        _ = [meta[name] for name in ("state", "inputs", "form", "rows")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: is no output of `alphatoken score`.") from error
    return meta


def write_part(
    path: Path, rows: list[tuple[Row, list[torch.Tensor]]], start: int, chosen: Labelling, form: str
) -> None:
    columns: dict[str, list[Any]] = {"row": list(range(start, start + len(rows)))}
    for branch, prefix in enumerate(_prefixes(form)):
        sequences = [row[branch] for row, _ in rows]
        values = [value[branch] for _, value in rows]
        columns[f"{prefix}input_ids"] = [s.ids for s in sequences]
        columns[f"{prefix}attention_mask"] = [[1] * len(s.ids) for s in sequences]
        columns[f"{prefix}token_values"] = [value.tolist() for value in values]
        columns[f"{prefix}response_mask"] = [[int(inside) for inside in s.response] for s in sequences]
        columns[f"{prefix}cut_tokens"] = [s.cut for s in sequences]
    _relabel(columns, form, chosen, {}, Counter())
    _write_table(path, columns, form)


def _prefixes(form: str) -> tuple[str, ...]:
    return ("chosen_", "rejected_") if form == "pairs" else ("",)


def _valued(response: torch.Tensor) -> torch.Tensor:
    """Which tokens have a value: those of the response that something predicts."""
    valued = response.clone()
    valued[:1] = False
    return valued


def _judged(
    values: torch.Tensor, response: torch.Tensor, reach: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`(T,)`: what the tokens of a sequence are chosen by."""
    if not reach:
        return values
    groups = torch.where(_valued(response), 0, -1)[None]
    return smoothed(values[None], groups, torch.zeros_like(groups), reach=reach, scale=scale)[0]


def _kept(judged: torch.Tensor, response: torch.Tensor, rho: float) -> torch.Tensor:
    groups = torch.where(_valued(response), 0, -1)
    return keep_mask(judged[None], groups[None], rho=rho)[0]


def _labels(ids: torch.Tensor, response: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(~(response & kept), IGNORE)


def finish(source: Path, folder: Path, meta: dict[str, Any], chosen: Labelling) -> Path:
    """Labels of the tokens chosen so in every part, the folder that trainers load, and `meta.json`.

    Raises:
        UserError: `folder` has other labels already, or parts are missing, or no label is left.
    """
    if folder == source and meta["state"] == "done":
        there = Labelling(**meta["selection"])
        if there == chosen:
            return folder
        options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in asdict(chosen).items())
        raise UserError(_OTHER_LABELS.format(folder=folder, **asdict(there), options=options))
    (folder / SCORED).mkdir(parents=True, exist_ok=True)
    write_json(folder / META, {**meta, "state": "selecting", "of": str(source)})
    close_folder(folder)  # while labels change, the folder does not load
    parts = sorted((source / SCORED).glob("part-*.parquet"))
    by_all = chosen.threshold_scope == "dataset"
    thresholds = {p: _threshold(parts, p, chosen) for p in _prefixes(meta["form"])} if by_all else {}
    counts = Counter(dict.fromkeys(_COUNTS, 0))  # zeros stay, to be reported
    temporary = folder / ".train.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for number, part in enumerate(parts):
        columns = _read_columns(part, _schema(meta["form"], scored=True).names)
        counts["rows"] += len(columns["row"])
        _relabel(columns, meta["form"], chosen, thresholds, counts)
        _write_table(folder / SCORED / part.name, columns, meta["form"])
        rows = _with_labels(columns, meta["form"], counts)
        name = f"data-{number:05d}-of-{len(parts):05d}.arrow"
        write_arrow(temporary / name, rows, _schema(meta["form"], scored=False))
    if counts.pop("rows") != meta["rows"]:
        raise UserError(f"{source}: parts are missing in {SCORED}. Run the command that made it again.")
    if not counts["kept_tokens"]:
        raise UserError(f"{source}: no row has a response token left, so there is nothing to train on (--max-length?).")
    save_folder(temporary, folder, _schema(meta["form"], scored=False))
    write_json(folder / META, {**meta, "state": "done", "selection": asdict(chosen), **counts})
    return folder


def _threshold(parts: list[Path], prefix: str, chosen: Labelling) -> tuple[float, torch.Tensor]:
    """Of all response tokens of a branch: the smallest value that is kept, and the mean of |value|."""
    sequences = []
    for part in parts:
        columns = _read_columns(part, [f"{prefix}token_values", f"{prefix}response_mask"])
        for values, response in zip(*columns.values(), strict=True):
            sequences.append((torch.tensor(values), torch.tensor(response, dtype=torch.bool)))
    scale = torch.cat([values[_valued(response)] for values, response in sequences]).abs().mean()
    found = [_judged(values, response, chosen.smoothing, scale)[_valued(response)] for values, response in sequences]
    judged = torch.cat(found)
    kept = keep_mask(judged[None], torch.zeros(1, len(judged), dtype=torch.long), rho=chosen.rho)[0]
    return float(judged[kept].min()) if len(judged) else math.inf, scale


def _relabel(
    columns: dict[str, list[Any]],
    form: str,
    chosen: Labelling,
    thresholds: dict[str, tuple[float, torch.Tensor]],
    counts: Counter[str],
) -> None:
    for prefix in _prefixes(form):
        labels = []
        names = (f"{prefix}input_ids", f"{prefix}token_values", f"{prefix}response_mask")
        for ids, values, mask in zip(*(columns[name] for name in names), strict=True):
            response, value = torch.tensor(mask, dtype=torch.bool), torch.tensor(values)
            if prefix in thresholds:
                least, scale = thresholds[prefix]
                kept = _valued(response) & (_judged(value, response, chosen.smoothing, scale) >= least)
            else:
                kept = _kept(_judged(value, response, chosen.smoothing), response, chosen.rho)
            counts["response_tokens"] += int(_valued(response).sum())
            counts["kept_tokens"] += int(kept.sum())
            labels.append(_labels(torch.tensor(ids), response, kept).tolist())
        columns[f"{prefix}labels"] = labels
        cut = columns[f"{prefix}cut_tokens"]
        counts["sequences_cut"] += sum(number > 0 for number in cut)
        counts["tokens_cut"] += sum(cut)


def _schema(form: str, *, scored: bool) -> pa.Schema:
    import pyarrow as pa

    kinds = {"input_ids": pa.int32(), "attention_mask": pa.int8(), "labels": pa.int32()}
    if scored:
        kinds |= {"token_values": pa.float32(), "response_mask": pa.int8()}
    fields = [(f"{prefix}{name}", pa.list_(kind)) for prefix in _prefixes(form) for name, kind in kinds.items()]
    cut = [(f"{prefix}cut_tokens", pa.int32()) for prefix in _prefixes(form)]
    return pa.schema([("row", pa.int64()), *fields, *cut] if scored else fields)


def _read_columns(path: Path, names: list[str]) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    try:
        columns: dict[str, list[Any]] = pq.read_table(path, columns=names).to_pydict()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}). {_AGAIN}") from error
    return columns


def _write_table(path: Path, columns: dict[str, list[Any]], form: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns, schema=_schema(form, scored=True))
    write_whole(path, lambda file: pq.write_table(table, file))


def _with_labels(columns: dict[str, list[Any]], form: str, counts: Counter[str]) -> dict[str, list[Any]]:
    """The rows that trainers take: those with a label, since a batch of others has no mean loss."""
    labels = zip(*(columns[f"{prefix}labels"] for prefix in _prefixes(form)), strict=True)
    rows = [i for i, each in enumerate(labels) if any(label != IGNORE for one in each for label in one)]
    counts["rows_without_labels"] += len(columns["row"]) - len(rows)
    return {name: [columns[name][i] for i in rows] for name in _schema(form, scored=False).names}


def write_json(path: Path, content: dict[str, Any]) -> None:
    save_text(path, json.dumps(content, indent=2) + "\n")
