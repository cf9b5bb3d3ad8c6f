"""benchmarks/results.py: what a file of figures says, and figures read out of a report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import results
from page_tables import base, tradeoff

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REPORT = """# A report

| before any heading | a |
| --- | --- |
| one | 0.500 |

## Noisy, learning rate 0.001

| at equal steps | loss | seeds | note |
| --- | --- | --- | --- |
| before | 5.330 |  | - |
| all tokens | 4.416 ±0.032 | 5 | nan |

| minus all tokens | loss |
|---|---|
| half | -0.153 ±0.058 |
"""


def test_figures_of_a_report():
    found = results.tables(REPORT)
    assert found == {
        "": {"before any heading": {"one": {"a": 0.5}}},
        "Noisy, learning rate 0.001": {
            "at equal steps": {
                "before": {"loss": 5.33, "seeds": None, "note": "-"},
                "all tokens": {"loss": [4.416, 0.032], "seeds": 5, "note": None},
            },
            "minus all tokens": {"half": {"loss": [-0.153, 0.058]}},
        },
    }


def test_a_file_says_how_it_was_made(tmp_path):
    """As a script writes it, with its command from the root of the repository."""
    script = tmp_path / "benchmarks" / "some.py"
    script.parent.mkdir()
    (script.parent / "results.py").write_text((BENCHMARKS / "results.py").read_text())
    script.write_text(
        "from pathlib import Path\nfrom results import write\n"
        "write('f.json', {'x': [1.5, None]}, settings={'path': Path('p')}, more='±')\n"
    )
    command = [sys.executable, str(script), "--note", "a b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["command"] == "python benchmarks/some.py --note 'a b'"
    assert found["results"] == {"x": [1.5, None]} and found["settings"] == {"path": "p"} and found["more"] == "±"
    assert set(found["versions"]) >= {"python", "torch", "transformers", "peft"}
    assert found["machine"]["cores"] == os.cpu_count() and len(found["date"]) == 10


def test_every_file_says_when_where_and_how():
    """At its top, under "about", or (tools.json) in each of its entries."""
    for path in (BENCHMARKS / "results").glob("*.json"):
        found = json.loads(path.read_text())
        entries = [found] if "date" in found else [found["about"]] if "about" in found else list(found.values())
        for entry in entries:
            assert entry["date"] and entry["command"] and entry["machine"], path.name
            assert "torch" in entry.get("versions", {}) or entry.get("version"), path.name


def test_cells():
    assert base.cell([4.416, 0.0321]) == "4.416 ±0.032" and base.cell([-0.1532, 0.058], 2, "+") == "-0.15 ±0.06"
    assert base.cell(None) == "" and base.cell(1.0, 2) == "1.00"


def test_gaps_are_differences_of_the_table():
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in tradeoff.gaps().splitlines()}
    found = results.load("tradeoff")["results"]["Supervised, noisy answers, learning rate 0.003"]["at equal steps"]
    gap = found["difference"]["target loss"][0] - found["RHO-1, clean reference"]["target loss"][0]
    assert math.isclose(float(rows["difference minus RHO-1"][0]), gap, abs_tol=0.005)
    assert float(rows["difference minus all tokens"][1]) < 0, "retention is better"


def test_a_caption_names_every_file_with_its_machine_and_what_was_transcribed():
    text = base.caption("straightforward", "path")
    first, second = text.split("; ")
    found = results.load("straightforward")
    assert first.startswith(f"*`benchmarks/results/straightforward.json`: {found['date']}, 2 CPU cores, no GPU, torch ")
    assert first.endswith(", transcribed from the page of that date") and second.endswith(".*")
    assert second.startswith("`benchmarks/results/path.json`: ") and "transcribed" not in second
    gpu = base.caption("gpu_budget")
    assert "NVIDIA H200" in gpu and "transcribed" in gpu
