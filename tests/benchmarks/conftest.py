"""Benchmarks are scripts: their folder goes on the path. A stand-in for the real model and data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from alphatoken_loss.directions import follow

sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks"), str(Path(__file__).parent)]


@pytest.fixture(autouse=True)
def _short_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta* of few steps: how far it goes is tested elsewhere, and here it would be most of the time."""
    monkeypatch.setattr(follow, "_RATES", (1e-3,))
    monkeypatch.setattr(follow, "_PAIR_RATES", (1e-3,))
    monkeypatch.setattr(follow, "_STEPS", 2)
    monkeypatch.setattr(follow, "_PAIR_STEPS", 2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a model and of data, see standin.py."""
    from standin import make_data, make_model

    folder = tmp_path_factory.mktemp("standin")
    return make_model(folder / "model"), make_data(folder / "data")
