"""Files that are written whole or not at all, and that say of what kind they are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_UNFINISHED = ".unfinished"


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file, then move it to `path` in one step. If `write` fails, no file is left."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=_UNFINISHED, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        write(unfinished)
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)  # a temporary file is readable by its owner alone
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
    return path


def save_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, with its line ends as they are; whole or not at all."""
    return write_whole(path, lambda file: file.write_bytes(text.encode("utf-8")))


def sweep(folder: Path) -> None:
    """Remove what `write_whole` had to leave directly in a folder when its process was killed."""
    for file in folder.glob(f".*{_UNFINISHED}"):
        if file.is_file():
            file.unlink(missing_ok=True)


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], *, kind: str, about: Mapping[str, str] | None = None
) -> Path:
    """Write tensors, and text about them, as a safetensors file of the given kind; whole or not at all."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": kind, **(about or {})}
    return write_whole(path, lambda file: save_file(held, file, metadata=metadata))


def read_tensors(
    path: str | os.PathLike[str], *, kind: str, what: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote.

    Args:
        what (`str`): what a file of this kind is called in the error.

    Raises:
        ValueError: the file is cut short, no safetensors file, or one of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # safetensors' own errors, and those of the disk
        raise ValueError(f"{path} is no {what}: it is not a safetensors file, or cut short ({error}).") from error
    if about.get("format") != kind:
        raise ValueError(f"{path} is no {what}: its format is {about.get('format')!r}, not {kind!r}.")
    return tensors, about
