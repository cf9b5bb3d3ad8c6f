"""A scored folder in the installed release of `datasets`, which need not be the one that wrote it."""

from __future__ import annotations

import os

import pytest
from datasets import load_dataset, load_from_disk

SCORED = os.environ.get("ALPHATOKEN_SCORED")


@pytest.mark.skipif(SCORED is None, reason="ALPHATOKEN_SCORED names no scored folder; `make test-tools` makes one")
def test_a_scored_folder_loads_in_either_way(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    saved, loaded = load_from_disk(SCORED)["train"], load_dataset(SCORED, split="train")
    assert saved.column_names == ["input_ids", "attention_mask", "labels"] and len(saved)
    assert saved.to_list() == loaded.to_list() and saved.features == loaded.features
    saved.map(lambda row: {"length": len(row["labels"])})  # leaves a cache file beside the data
    assert load_dataset(SCORED, split="train").to_list() == load_from_disk(SCORED)["train"].to_list()
