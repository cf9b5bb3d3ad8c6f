"""The folder that trainers load, written so that `datasets` 3, 4 and 5 read it, in either way.

`load_from_disk(folder)` (Axolotl, LLaMA-Factory) finds the files of `save_to_disk`, with list columns named as they
were before `datasets` 4 ("Sequence"), which later releases read too. `load_dataset(folder)` (TRL's command line, the
hub) finds a card whose configuration names the data files and nothing else, so not the cache files that `datasets`
leaves beside them. The configuration bears a fingerprint of the labels: without it, `datasets` would take what it has
cached of another folder of the same name for this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import save_text

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN = "train"
_LOADABLE, _CARD = "dataset_dict.json", "README.md"  # what makes the folder one that loads; written last
_CARD_TEXT = """---
configs:
- config_name: labels-{fingerprint}
  data_files:
  - split: train
    path: {train}/data-*.arrow
tags:
- alphatoken
---
Tokenised by `alphatoken score`; the labels of response tokens of low value are -100. `meta.json` says how it was made.
"""


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The columns, lists of integers, as `datasets` names them."""
    return {
        field.name: {"feature": {"dtype": str(field.type.value_type), "_type": "Value"}, "_type": "Sequence"}
        for field in schema
    }


def write_arrow(path: Path, columns: dict[str, list[Any]], schema: pa.Schema) -> None:
    """Write rows as an Arrow stream that says what `datasets` wants to know of its columns."""
    import pyarrow as pa

    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": _features(schema)}})})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


def close_folder(folder: Path) -> None:
    """Let the folder no longer load."""
    for name in (_LOADABLE, _CARD):
        (folder / name).unlink(missing_ok=True)


def save_folder(temporary: Path, folder: Path, schema: pa.Schema) -> None:
    """Put Arrow files in a temporary folder in the place of `folder`'s training data, and let it load."""
    files = sorted(temporary.glob("data-*.arrow"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    fingerprint = digest.hexdigest()[:16]  # of the content, so that what is cached of other labels does not fit
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": TRAIN,
    }
    info = {"citation": "", "description": "", "features": _features(schema), "homepage": "", "license": ""}
    for name, content in (("state.json", state), ("dataset_info.json", info)):
        (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder / TRAIN, ignore_errors=True)
    os.replace(temporary, folder / TRAIN)
    card, loadable = _CARD_TEXT.format(train=TRAIN, fingerprint=fingerprint), json.dumps({"splits": [TRAIN]})
    for name, text in ((_CARD, card), (_LOADABLE, loadable)):
        save_text(folder / name, text)
