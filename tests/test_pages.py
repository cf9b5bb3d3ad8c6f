"""The pages: their code runs, what they say it prints it prints, and their figures are those of the benchmarks."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import figures
import pytest
import torch
import tuning
from datasets import Dataset

import alphatoken_loss
from alphatoken_loss import __main__ as command
from alphatoken_loss.estimators import ESTIMATORS

ROOT = Path(__file__).parents[1]
PAGES = [*figures.pages(), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
RUN, SHOWN = "python", {"text", "bibtex"}  # what is run; what is not code
LISTS = [(range(3, 18), 5), (range(40, 58), 7), (range(70, 83), 4), (range(90, 106), 6)]  # ids, tokens of the prompt
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def runs(block: re.Match[str]) -> bool:
    return block["language"] == RUN and not (block["mark"] or "").startswith("not run")


def batch_of(rows: list[tuple[range, int]]) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {name: torch.full((len(rows), width), fill) for name, fill in fills.items()}
    for row, (ids, prompt) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


def names_of(page: Path) -> types.ModuleType:
    """A module with the names that pages take as given; blocks of a page run in it one after the other."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    model = tuning.with_adapter()
    batch, validation_batches = batch_of(LISTS[:2]), [batch_of(LISTS[2:])]
    answer = (batch["labels"] != -100).long()
    pairs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": answer}
    module.__dict__.update(
        model=model,
        tokenizer=tuning.tokenizer(),
        prompts=[[5, 6, 7], [8, 9]],
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        batch=batch,
        pairs=pairs,
        loader=[batch, validation_batches[0]],
        validation_batches=validation_batches,
        target=alphatoken_loss.target_gradient(model, validation_batches),
        fisher=alphatoken_loss.estimate_fisher(model, [[5, 6], [7]], max_new_tokens=4, progress=False),
        train=Dataset.from_list(tuning.rows(4)),
        clean=Dataset.from_list(tuning.rows(6)[4:]),
    )
    return module


def prepared(page: Path, folder: Path) -> None:
    """Put what the blocks of a page read into a folder."""
    (folder / "path/to").mkdir(parents=True)
    tuning.base().save_pretrained(folder / "path/to/model")
    tuning.tokenizer().save_pretrained(folder / "path/to/model")
    if page.stem == "scoring":
        for name, rows in (("rows", tuning.rows(4)), ("clean", tuning.rows(6)[4:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = "score --model path/to/model --dataset rows.jsonl --target clean.jsonl --output scored --lora-r 2"
        assert command.main(shlex.split(arguments)) == 0


@names
@pytest.mark.filterwarnings("ignore")
def test_code_runs(page, tmp_path, monkeypatch):
    if not any(runs(block) for block in blocks(page)):
        return
    monkeypatch.chdir(tmp_path)
    prepared(page, tmp_path)
    module = names_of(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = dict(ESTIMATORS)
    text = page.read_text(encoding="utf-8")
    try:
        for block in blocks(page):
            if runs(block):
                printed = io.StringIO()
                above = "\n" * text.count("\n", 0, block.start("code"))
                with contextlib.redirect_stdout(printed):
                    exec(compile(above + block["code"], str(page), "exec"), module.__dict__)
            elif block["mark"] == "output":
                assert printed.getvalue() == block["code"]
    finally:
        ESTIMATORS.clear()
        ESTIMATORS.update(known)


@names
def test_what_does_not_run_says_why(page):
    for block in blocks(page):
        reason = (block["mark"] or "").removeprefix("not run:")
        assert block["language"] in {RUN, *SHOWN} or len(reason.split()) > 2, block[0]
    assert len(blocks(page)) == page.read_text(encoding="utf-8").count("\n```") / 2, "a fence that is not closed"


@names
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    code = "".join(block["code"] for block in blocks(page) if block["language"] == "bash")
    for line in code.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            target = next(word for word in words[1:] if "=" not in word)
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        elif words[:1] == ["python"] and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("page", figures.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert figures.filled(text) == text, f"{page.name}: run `make figures`"


@names
def test_no_figure_is_typed(page):
    """What was measured stands in tables that are written; settings and versions stand in code."""
    text = figures.MARKED.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"<!-- tools: .*?<!-- /tools -->", "", text, flags=re.DOTALL)  # written by benchmarks/tools.py
    text = BLOCK.sub("", text)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", "", text)
    text = re.sub(r"Apache-2\.0|\d+\.\d+\.\d+|Python 3\.\d+( to 3\.\d+)?", "", text)
    text = re.sub(r"95 %( confidence)? interval|30 % of the training labels", "", text)  # settings
    assert not re.findall(r"[^\n]*(?:\b\d+\.\d+\b|\d %)[^\n]*", text)


@pytest.mark.parametrize("name", alphatoken_loss.__all__)
def test_no_figure_is_typed_in_a_docstring(name):
    """Beside defaults, examples and what stands in code: what was measured is in the pages."""
    thing = getattr(alphatoken_loss, name)
    members = [v for k, v in vars(thing).items() if not k.startswith("_")] if isinstance(thing, type) else []
    for each in (thing, *members):
        text = (inspect.getdoc(each) or "") if callable(each) or isinstance(each, (classmethod, property)) else ""
        text = re.sub(
            r"`[^`]*`|defaults to [\d.e-]+|arXiv:? ?\d+\.\d+|^ *(>>>|\.\.\.).*$", "", text, flags=re.MULTILINE
        )
        assert not re.findall(r"[^\n]*(?:\b\d+\.\d+\b|\d %)[^\n]*", text)


@names
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).is_file(), link


def test_the_readme_is_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in alphatoken_loss.__all__:
        assert f"::: alphatoken_loss.{name}\n" in reference, name


@pytest.mark.parametrize(
    "name", [name for name in alphatoken_loss.__all__ if inspect.isfunction(getattr(alphatoken_loss, name))]
)
def test_every_argument_of_a_public_function_is_described(name):
    function = getattr(alphatoken_loss, name)
    told = inspect.getdoc(function)
    _, _, described = told.partition("Args:")
    for argument in inspect.signature(function).parameters:
        assert "See `" in told or re.search(rf"\b{argument}\b[^\n]*:", described), argument


def test_a_stale_page_is_found(monkeypatch, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: demo -->\n| old |\n<!-- /table -->\nbehind\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        figures.main(["--check"])
    assert "README.md: differs" in capsys.readouterr().out and "| old |" in page.read_text()
    figures.main([])
    assert "| old |" not in page.read_text() and "| share of answer tokens kept |" in page.read_text()
    figures.main(["--check"])
    page.write_text("<!-- table: no-such -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit, match=r"no table 'no-such'; there are .*costs, "):
        figures.main([])


@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="no mkdocstrings: pip install '.[docs]'")
def test_the_site_builds_and_fetches_nothing(tmp_path):
    built = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(built, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?://[^"]*)"', page.read_text()
        )
        assert not fetched, page.name
