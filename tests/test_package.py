"""What is installed: the wheel and the source distribution hold the whole package, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import alphatoken_loss

ROOT = Path(__file__).parents[1]
PACKAGE = Path(alphatoken_loss.__file__).parent
BUILD = "import setuptools.build_meta as b; print(b.build_sdist({0!r}), b.build_wheel({0!r}))"
IMPORT = """
import sys
import alphatoken_loss
from importlib.metadata import entry_points, version
assert version("alphatoken-loss") == alphatoken_loss.__version__
assert not {"trl", "bitsandbytes"} & sys.modules.keys(), "importing the package imports neither"
(command,) = (e for e in entry_points(group="console_scripts") if e.name == "alphatoken")
try:
    command.load()(["--version"])
except SystemExit:
    print(alphatoken_loss.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The two archives, built from a copy of what they are made of."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(PACKAGE, source / "alphatoken_loss", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(str(out))], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sdist, wheel = done.stdout.split()[-2:]
    return out / sdist, out / wheel


def test_the_wheel_is_imported_from_a_clean_folder(built, tmp_path):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, version, path = done.stdout.split()
    assert version == alphatoken_loss.__version__
    assert Path(path).is_relative_to(tmp_path), "another copy was imported"


def test_both_hold_every_module(built):
    sdist, wheel = built
    wanted = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")}
    wanted |= {"alphatoken_loss/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert files == wanted
    assert "License-Expression: Apache-2.0" in metadata and "## What it costs" in metadata
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"LICENSE", "README.md", "pyproject.toml"} <= held


def test_versions_agree():
    assert f"version: {alphatoken_loss.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {alphatoken_loss.__version__}" in (ROOT / "CHANGELOG.md").read_text()
