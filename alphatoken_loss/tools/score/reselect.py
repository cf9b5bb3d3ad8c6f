"""`alphatoken reselect`: other labels for a scored data set, from its stored values and without a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ...config import AlphaTokenConfig
from ..cli import UserError, or_exit
from .parts import META, Labelling, finish, read_meta


@or_exit()
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0, or 2 for a user's mistake."""
    folder = reselect(args.folder, **labelling_of(args), output=args.output)
    print(report(folder, read_meta(folder)))
    return 0


def labelling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of a `Labelling`."""
    return {name: getattr(args, name) for name in Labelling.__dataclass_fields__}


def reselect(
    path: str | os.PathLike[str],
    *,
    rho: float,
    threshold_scope: str = "sequence",
    smoothing: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Make the labels of a scored data set anew from its stored values, without a model.

    Args:
        path: a finished output of `alphatoken score`.
        rho, threshold_scope, smoothing: see `Labelling`.
        output: folder to write; by default `path` with `-rho`, the share and what else is asked
            for at its end.

    Returns:
        `Path`: the folder that was written.

    Raises:
        UserError: `path` is no finished output; `output` is `path` and has other labels; or it is not empty.
        ValueError: `rho`, `threshold_scope` or `smoothing` is not allowed.

    Example:
        >>> reselect("scored", rho=0.3)
        PosixPath('scored-rho0.3')
    """
    AlphaTokenConfig(rho=rho, smoothing=smoothing)
    if threshold_scope not in ("sequence", "dataset"):
        raise ValueError(f"threshold_scope is {threshold_scope!r}; it must be 'sequence' or 'dataset'.")
    chosen = Labelling(rho, threshold_scope, smoothing)
    source = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
    meta = read_meta(source)
    if meta["state"] == "scoring":
        raise UserError(f"{source}: scoring was interrupted. Run its command again first.")
    end = f"-rho{rho:g}" + ("-dataset" if threshold_scope == "dataset" else "")
    end += f"-smoothing{smoothing}" if smoothing else ""
    folder = source.with_name(source.resolve().name + end) if output is None else Path(output)
    if folder.resolve() == source.resolve():
        folder = source
    elif _made_from(folder, meta, chosen):
        return folder
    elif folder.exists() and any(folder.iterdir()) and not _begun_from(folder, source):
        raise UserError(f"--output {folder}: the folder exists and is not empty.")
    return finish(source, folder, meta, chosen)


def _made_from(folder: Path, meta: dict[str, Any], chosen: Labelling) -> bool:
    """Whether this folder has that selection of the same values already."""
    there = read_meta(folder) if (folder / META).is_file() else {}
    done = there.get("state") == "done" and there.get("inputs") == meta["inputs"]
    return done and Labelling(**there["selection"]) == chosen


def _begun_from(folder: Path, source: Path) -> bool:
    """Whether a selection that was interrupted has left this folder."""
    if not (folder / META).is_file():
        return False
    meta = read_meta(folder)
    return meta["state"] == "selecting" and meta.get("of") == str(source)


def report(folder: Path, meta: dict[str, Any]) -> str:
    """What was kept and what was dropped, in words."""
    kept, tokens = meta["kept_tokens"], meta["response_tokens"]
    lines = [f"{folder}: {meta['rows']} rows, {kept} of {tokens} response tokens kept ({kept / max(tokens, 1):.1%})."]
    if meta["sequences_cut"]:
        lines.append(f"{meta['sequences_cut']} sequences were cut by --max-length, {meta['tokens_cut']} tokens in all.")
    if meta["rows_without_labels"]:
        lines.append(f"{meta['rows_without_labels']} rows have no label left and are not in {folder / 'train'}.")
    return "\n".join(lines)
