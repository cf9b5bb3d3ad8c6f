"""The folder is the architecture: rooms know only rooms before them, and each can be read in one sitting."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import alphatoken_loss

ROOT = Path(alphatoken_loss.__file__).parent
ROOMS = [
    "files", "checks", "values", "batches", "models", "losses", "config", "directions", "estimators", "selection",
    "weights", "gate", "tools", "trl", "integrations", "__main__",
]  # fmt: skip
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
# What looks back, each with its reason.
ALLOWED = {
    ("config", "estimators"): "a name is checked where it is set, against the table, which imports no estimator",
}
LONGEST_MODULE, LONGEST_CLASS = 350, 200
# What is longer, each with its reason.
LONG = {
    "config.py:AlphaTokenConfig": "half of it says what each setting does",
    "gate/alphatoken.py:AlphaToken": "the user's surface: a third of it is docstrings",
}


def _imports(path: Path) -> set[str]:
    """The rooms that a module imports, as it is read; what only type checkers see, or a command loads, is left out."""
    depth = len(path.relative_to(ROOT).parts)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names if name}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_only_rooms_before_them(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in _imports(path) - {room, "__version__"}:
        before = ROOMS.index(other) < ROOMS.index(room)
        assert before or (room, other) in ALLOWED, f"{room} imports {other}, which comes after it"


EACH = """
import os, sys
import bitsandbytes, datasets, peft, transformers.modeling_layers
from trl import DPOTrainer, SFTTrainer
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            os.write(2, f"{name}: {error!r}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_each_module_can_be_the_first_to_be_imported():
    """The package imports none by itself, so a circle would show in whichever is asked for first."""
    paths = [path.relative_to(ROOT.parent).with_suffix("") for path in MODULES]
    names = [".".join(path.parts) for path in paths if path.stem != "axolotl"]  # needs Axolotl
    done = subprocess.run([sys.executable, "-c", EACH, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "alphatoken_loss." not in done.stderr, done.stderr
    assert len(names) > 60


def test_no_estimator_imports_another():
    estimators = {"ghost", "difference", "exact", "path"}
    for path in (ROOT / "estimators").glob("*.py"):
        if path.stem in estimators:
            imported = {
                node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
            }
            assert not imported & estimators, path.name


@pytest.mark.parametrize(
    "name", ["gate/alphatoken.py", "gate/step.py", "gate/weighers.py", "weights.py", "selection/thresholds.py"]
)
def test_the_ways_in_know_no_estimator_by_name_or_setting(name):
    text = (ROOT / name).read_text()
    code = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert not code & {"ghost", "difference", "exact", "path"}
    assert not {"Ghost", "Difference", "Exact", "AlongPath"} & {
        node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)
    }
    read = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert not {name for name in read if name.startswith(("path_", "difference_", "causal_window"))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    name = str(path.relative_to(ROOT))
    assert len(text.splitlines()) <= LONGEST_MODULE or name in LONG
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and f"{name}:{node.name}" not in LONG:
            assert node.end_lineno - node.lineno < LONGEST_CLASS, node.name
