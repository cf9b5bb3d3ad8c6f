"""The README's quick start prints what the README says it prints."""

import contextlib
import io
import re
from pathlib import Path

import alphatoken_loss

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_quick_start_prints_what_the_readme_says():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (expected,) = re.findall(r"prints\n\n```\n(.*?)```", section, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_every_public_name_is_in_the_readme():
    for name in alphatoken_loss.__all__:
        assert name in README or name == "Target", name
