"""The tools people train with, each in an environment of its own: what was run, on what machine, with what result.

    make test-tools                                   # all of them; environments in .tools/, 2 to 4 GB each
    make test-tools TOOLS="axolotl llama-factory"     # some
    python benchmarks/tools.py --table                # docs/tools.md from the results alone

An environment is made once, from nothing, and kept. pip takes further options from PIP_FLAGS; where torch for CUDA is
not wanted, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu". Writes benchmarks/results/tools.json and
the table in docs/tools.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "tools.json", ROOT / "docs" / "tools.md"
START, END = "<!-- tools: made by benchmarks/tools.py -->", "<!-- /tools -->"
# Tool -> its packages with what its own metadata pins, those that need CUDA or serve something else left out; packages
# that go in without their dependencies; the tests; the distribution whose version is reported.
TOOLS: dict[str, dict[str, Any]] = {
    "datasets 3": {"with": ["datasets==3.6.0", "numpy", "pytest"], "tests": "test_datasets.py", "name": "datasets"},
    "Axolotl": {
        "with": [
            "torch==2.13.0", "transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "accelerate==1.13.0",
            "datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1", "bitsandbytes==0.50.2",
            "pydantic==2.12.5", "mistral-common==1.11.5", "kernels>=0.16,<0.17", "evaluate==0.4.1", "numba", "scipy",
            "addict", "fire", "requests", "einops", "colorama", "typer==0.25.1", "art", "python-dotenv", "zstandard",
            "fastcore", "langdetect", "immutabledict", "schedulefree==1.4.1", "posthog==6.7.11", "sentencepiece",
            "nvidia-ml-py", "tensorboard", "wandb", "triton", "pytest", "pytest-timeout",
        ],
        "alone": ["axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "torchao==0.17.0",
                  "optimum==1.16.2"],
        "tests": "test_axolotl.py", "name": "axolotl",
    },
    "LLaMA-Factory": {
        "with": [
            "torch==2.13.0", "transformers==5.6.0", "trl==0.24.0", "peft==0.18.1", "accelerate==1.11.0",
            "datasets==4.0.0", "bitsandbytes==0.50.2", "torchdata==0.11.0", "tyro<0.9", "av==16.0.0", "einops", "fire",
            "matplotlib", "modelscope", "omegaconf", "pandas", "protobuf", "pydantic", "scipy", "sentencepiece",
            "tiktoken", "fastapi", "uvicorn", "sse-starlette", "hf-transfer", "pytest", "pytest-timeout",
        ],
        "alone": ["llamafactory==0.9.5"], "tests": "test_llamafactory.py", "name": "llamafactory",
        "stub": "torchaudio",  # imported by it; the registry's builds are for CUDA alone, and text needs none
    },
    "torchtune": {
        "with": [
            "torch==2.13.0", "transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0", "datasets==4.8.4",
            "huggingface_hub", "omegaconf", "kagglehub", "sentencepiece", "tiktoken", "blobfile", "pillow", "psutil",
            "numpy", "safetensors", "tqdm", "tokenizers", "torchdata", "pytest", "pytest-timeout",
        ],
        "alone": ["torchtune==0.6.1", "torchao==0.13.0"], "tests": "test_torchtune.py", "name": "torchtune",
    },
}  # fmt: skip
BESIDE = ("torch", "transformers", "trl", "peft")
NEEDED = 8  # GB
QUIET = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "WANDB_MODE": "disabled",
         "DISABLE_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip


def slug(tool: str) -> str:
    """A tool's name as it is typed."""
    return tool.replace(" ", "-").lower()


def environment(tool: str, folder: Path) -> Path:
    """The Python of a tool's environment, made where there is none."""
    about, home = TOOLS[tool], folder / slug(tool)
    python = home / "bin" / "python"
    if (home / "ready").is_file():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    if free < NEEDED:
        sys.exit(f"{folder}: {free:.0f} GB are free, and an environment takes up to {NEEDED} with what pip unpacks.")
    print(f"{tool}: its environment is made in {home}. This takes minutes.", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *flags]
    subprocess.run([*pip, *about["with"]], check=True)
    if "alone" in about:
        subprocess.run([*pip, "--no-deps", *about["alone"]], check=True)
    if "stub" in about:
        (next(home.glob("lib/python*/site-packages")) / f"{about['stub']}.py").write_text('"""A stand-in."""\n')
    (home / "ready").touch()
    return python


def scored(folder: Path) -> Path:
    """A data set scored in this environment, for tools whose own cannot."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers'); import tiny; from pathlib import Path; f = Path(sys.argv[1]);"
        "tiny.base().save_pretrained(f / 'model'); tiny.tokenizer(chat=True).save_pretrained(f / 'model');"
        "tiny.sft_data(count=24).to_json(f / 'rows.jsonl'); tiny.sft_data('chat', 8, 50).to_json(f / 'target.jsonl')"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=ROOT)
    argv = ["--model", "model", "--dataset", "rows.jsonl", "--target", "target.jsonl", "--output", "scored"]
    argv += ["--num-layers", "2", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "alphatoken_loss", "score", *argv], check=True, cwd=folder, env=env)
    return folder / "scored"


def run(tool: str, python: Path, data: Path) -> dict[str, Any]:
    """Run a tool's tests. Returns its version, the machine, and each test's result."""
    about = TOOLS[tool]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        env = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "ALPHATOKEN_SCORED": str(data)}
        argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-o", "addopts="]
        argv += [f"--junitxml={report}", f"tests/integrations/{about['tests']}"]
        subprocess.run([python, *argv], cwd=ROOT, env=env)  # its failures are in the report
        if not report.is_file():
            sys.exit(f"{tool}: the tests did not run.")
        cases = list(ElementTree.parse(report).iter("testcase"))
    names = [about["name"], *BESIDE]
    code = "import json, sys, importlib.metadata as m; has = {d.name: d.version for d in m.distributions()};"
    code += "print(json.dumps({name: has[name] for name in sys.argv[1:] if name in has}))"
    found = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    versions = json.loads(found.stdout)
    return {
        "version": versions.pop(about["name"]),
        "beside": versions,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} CPU, Python {platform.python_version()}",
        "command": f"python benchmarks/tools.py {slug(tool)}",
        "tests": {case.get("name"): _result(case) for case in cases},
    }


def _result(case: ElementTree.Element) -> str:
    for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if case.find(kind) is not None:
            return word
    return "passed"


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, one line a test."""
    lines = ["| tool | version | machine | what was run | result |", "|---|---|---|---|---|"]
    for tool, about in results.items():
        beside = [f"{name} {version}" for name, version in about.get("beside", {}).items()]
        first = [tool, about["version"], ", ".join([about["machine"], *beside, about["date"]])]
        for test, result in about["tests"].items():
            name, _, case = test.removeprefix("test_").removesuffix("]").partition("[")
            words = name.replace("_", " ") + (f": {case}" if case else "")
            lines.append(f"| {' | '.join([*first, words, result])} |")
            first = [""] * 3  # said once
    return "\n".join(lines)


def write_page(results: dict[str, Any]) -> None:
    """Put the table between its marks in docs/tools.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(f"{before}{START}\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _known() -> dict[str, Any]:
    """What earlier runs have found, in the order of the table."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {tool: found[tool] for tool in TOOLS if tool in found}


def _tool(text: str) -> str:
    """A key of `TOOLS` from what was typed."""
    found = [tool for tool in TOOLS if slug(tool) == slug(text)]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(slug, TOOLS))}")
    return found[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tools", nargs="*", type=_tool, metavar="TOOL", help=f"{', '.join(map(slug, TOOLS))}; by default all"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".tools", help="where the environments are")
    parser.add_argument("--table", action="store_true", help="run nothing, write the page from the results")
    args = parser.parse_args(argv)
    if not args.table:
        chosen = args.tools or list(TOOLS)
        with tempfile.TemporaryDirectory() as folder:
            data = scored(Path(folder))
            for tool in chosen:
                found = run(tool, environment(tool, args.folder), data)
                RESULTS.write_text(json.dumps({**_known(), tool: found}, indent=1) + "\n")
    results = _known()
    write_page(results)
    failed = [f"{tool}: {test}" for tool in results for test, r in results[tool]["tests"].items() if r == "failed"]
    if failed:
        sys.exit("Failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
