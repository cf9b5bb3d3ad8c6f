"""The notebook, its code cells run one after the other in one process, as a kernel would, on a model of a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = "PRETRAINING, STEPS, TRAIN_ROWS, CLEAN_ROWS = Pretraining(vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=3, steps=2, seq_len=32), 2, 24, 4"  # noqa: E501


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = json.loads((RECIPES / "alphatoken.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    (line,) = [line for line in cells[0].splitlines() if line.startswith("PRETRAINING, ")]
    cells[0] = cells[0].replace(line, SMALL)
    shown = "assert '<style>' in shown._repr_html_() and 'kept' in str(shown)"
    (tmp_path / "cells.py").write_text("\n\n".join([*cells, shown]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(RECIPES), str(RECIPES.parent)]), "OMP_NUM_THREADS": "1",
           "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout[done.stdout.index("loss on clean answers") :].splitlines()[1:]
    found = {line[:16].strip(): float(line[16:]) for line in lines if line}
    assert list(found) == ["before", "all tokens", "tokens of value"] and all(0 < loss < 20 for loss in found.values())
