"""Benchmarks are scripts: their folder goes on the path. A stand-in for the real model and data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a model and of data, see standin.py."""
    from standin import make_data, make_model

    folder = tmp_path_factory.mktemp("standin")
    return make_model(folder / "model"), make_data(folder / "data")
