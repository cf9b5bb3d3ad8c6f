"""Writes the tables of README and docs from benchmarks/results/*.json, between markers that name them.

    python benchmarks/figures.py           # rewrite the pages (make figures)
    python benchmarks/figures.py --check   # only say which pages differ from their results; exit status 1 if any does

A page asks for a table by a pair of comments, and what stands between them is replaced:

    <!-- table: costs -->
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from page_tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables written anew."""

    def write(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise SystemExit(f"There is no table '{found[2]}'; there are {', '.join(TABLES)}.")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return MARKED.sub(write, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    args = parser.parse_args(argv)
    stale = [page for page in pages() if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from its results: make figures' if args.check else 'written'}")
        if not args.check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if args.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
