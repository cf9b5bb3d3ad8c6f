"""What a scoring run was begun with, by content, so that it only goes on with the same."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...config import AlphaTokenConfig
from ...files import sweep
from ..cli import UserError
from .parts import META, SCORED, read_meta, write_json
from .scorer import FISHER, PATH

SETTINGS = ("stability_weight", "num_layers", "causal_window", "estimator")
_OPTIONS = ("fisher_prompts", "fisher_new_tokens", "beta", "max_length", "assistant_only_loss", "rows_per_part")


def inputs_of(args: argparse.Namespace, config: AlphaTokenConfig, rows: Any, target_rows: Any) -> dict[str, Any]:
    """All that decides the values and the parts: settings, and files by what they hold and not by where they lie. The
    output may lie in one of these folders, and is no part of it."""
    output = Path(args.output)
    digest, content = partial(digest_of, without=output), partial(content_of, without=output)
    return {
        "model": content(args.model),
        "tokenizer": args.tokenizer and content(args.tokenizer),
        "adapter": args.adapter and content(args.adapter),
        **({"lora_r": args.lora_r} if args.adapter is None else {}),
        "dataset": [args.split, len(rows), digest(Path(args.dataset)) or rows._fingerprint],
        "target": [args.target_split, len(target_rows), digest(Path(args.target)) or target_rows._fingerprint],
        **{name: getattr(config, name) for name in SETTINGS},
        "fisher": args.fisher and digest_of(Path(args.fisher)),
        **{name: getattr(args, name) for name in (*_OPTIONS, "load_in_4bit", "dtype", "seed")},
    }


def content_of(source: str, without: Path | None = None) -> str:
    """A folder's digest, or the commit of the hub that a name stands for here; the name itself where neither is known.

    A branch of the hub moves: the same name is another model on another day.
    """
    digest = digest_of(Path(source), without)
    if digest is not None:
        return digest
    from transformers.utils.hub import cached_file, extract_commit_hash

    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        with contextlib.suppress(Exception):  # no network, no such name: loading says so
            found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            commit = found and extract_commit_hash(str(found), None)
            if commit:
                return f"{source}@{commit}"
    return source


def digest_of(path: Path, without: Path | None = None) -> str | None:
    """Of a file's content, or of a folder's files by their places in it, without what `datasets` caches among them or
    what lies in the folder `without`; None of what is not here."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    apart = without and without.resolve()
    inside = (file for file in path.rglob("*") if file.is_file() and apart not in file.resolve().parents)
    files = [path] if path.is_file() else sorted(inside)
    for file in files:
        if path.is_dir():
            if file.name.startswith(("cache-", "tmp")) and (file.parent / "state.json").is_file():
                continue
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def open_output(folder: Path, inputs: dict[str, Any], **about: Any) -> dict[str, Any]:
    """Begin an output, or see that the one there was begun in the same way.

    Raises:
        UserError: it was begun otherwise, or is no output of this command.
    """
    if (folder / META).is_file():
        meta = read_meta(folder)
        names = dict.fromkeys([*meta["inputs"], *inputs])
        differ = [typed(name) for name in names if meta["inputs"].get(name) != inputs.get(name)]
        if not differ:
            for place in (folder, folder / SCORED):
                sweep(place)
            return meta
        if any((folder / SCORED).glob("part-*.parquet")):
            raise UserError(
                f"--output {folder} was begun with other arguments or files ({', '.join(differ)}). Give another "
                "folder, or the arguments it was begun with."
            )
        for name in (FISHER, PATH):
            (folder / name).unlink(missing_ok=True)  # of a run that ended before it wrote a part, by a mistake say
    elif folder.exists() and (not folder.is_dir() or any(map(_is_users, folder.rglob("*")))):
        raise UserError(f"--output {folder} exists and is no output of this command. Give another folder.")
    packages = ("alphatoken-loss", "torch", "transformers", "peft", "trl")
    meta = {"state": "scoring", "inputs": inputs, **about, "versions": {}}
    for name in packages:
        with contextlib.suppress(Exception):  # not installed as a package
            meta["versions"][name] = version(name)
    (folder / SCORED).mkdir(parents=True, exist_ok=True)
    write_json(folder / META, meta)
    return meta


def _is_users(file: Path) -> bool:
    """Whether it is no file of this command: one that was killed before its first has left a part of that alone."""
    return file.is_file() and not file.name.startswith(f".{META}-")


def typed(name: str) -> str:
    """An option as it is typed on the command line."""
    return "--" + name.replace("_", "-")
