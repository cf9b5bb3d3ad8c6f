"""`alphatoken reselect`: other labels for a scored data set, from its stored values and without a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ...config import AlphaTokenConfig
from ..cli import UserError, or_exit
from .parts import META, finish, read_meta


@or_exit()
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0, or 2 for a user's mistake."""
    folder = reselect(args.folder, rho=args.rho, threshold_scope=args.threshold_scope, output=args.output)
    print(report(folder, read_meta(folder)))
    return 0


def reselect(
    path: str | os.PathLike[str],
    *,
    rho: float,
    threshold_scope: str = "sequence",
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Make the labels of a scored data set anew from its stored values, without a model.

    Args:
        path: a finished output of `alphatoken score`.
        rho (`float`): share of response tokens to keep, in (0, 1].
        threshold_scope (`str`): `"sequence"`, that share of each sequence, or `"dataset"`, of all tokens (of each
            branch, for pairs).
        output: folder to write; by default `path` with `-rho` and the share at its end.

    Returns:
        `Path`: the folder that was written.

    Raises:
        UserError: `path` is no finished output; `output` is `path` and has other labels; or it is not empty.
        ValueError: `rho` or `threshold_scope` is not allowed.

    Example:
        >>> reselect("scored", rho=0.3)
        PosixPath('scored-rho0.3')
    """
    AlphaTokenConfig(rho=rho)
    if threshold_scope not in ("sequence", "dataset"):
        raise ValueError(f"threshold_scope is {threshold_scope!r}; it must be 'sequence' or 'dataset'.")
    source = Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()
    meta = read_meta(source)
    if meta["state"] == "scoring":
        raise UserError(f"{source}: scoring was interrupted. Run its command again first.")
    end = f"-rho{rho:g}" + ("-dataset" if threshold_scope == "dataset" else "")
    folder = source.with_name(source.resolve().name + end) if output is None else Path(output)
    if folder.resolve() == source.resolve():
        folder = source
    elif _made_from(folder, meta, {"rho": rho, "threshold_scope": threshold_scope}):
        return folder
    elif folder.exists() and any(folder.iterdir()) and not _begun_from(folder, source):
        raise UserError(f"--output {folder}: the folder exists and is not empty.")
    return finish(source, folder, meta, rho, threshold_scope)


def _made_from(folder: Path, meta: dict[str, Any], selection: dict[str, Any]) -> bool:
    """Whether this folder has that selection of the same values already."""
    there = read_meta(folder) if (folder / META).is_file() else {}
    expected = {"state": "done", "selection": selection, "inputs": meta["inputs"]}
    return all(there.get(name) == value for name, value in expected.items())


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
