"""A scored folder in torchtune's recipes (0.6): a data set component of its own.

    PYTHONPATH=recipes tune run lora_finetune_single_device --config config.yaml

where the configuration says

    dataset:
      _component_: with_torchtune.scored_rows
      source: /path/to/scored    # what `alphatoken score` wrote, with this model's weights and tokenizer
"""

from __future__ import annotations

from typing import Any

from datasets import load_from_disk
from torchtune.datasets import PackedDataset


def scored_rows(tokenizer: Any, *, source: str, packed: bool = False) -> Any:
    """The rows of a scored folder, tokens and labels as they were written; packed up to the tokenizer's length."""
    rows = load_from_disk(source)["train"].rename_column("input_ids", "tokens").remove_columns("attention_mask")
    if not packed:
        return rows
    return PackedDataset(rows, max_seq_len=tokenizer.max_seq_len)
