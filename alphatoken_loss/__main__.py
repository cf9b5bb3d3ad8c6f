"""The command line: `python -m alphatoken_loss COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from . import __version__

_COMMANDS = (
    "tools.score.command",
    "tools.score.reselect",
    "tools.report.report",
)  # modules of this package with an `add_parser`


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for a mistake in what was asked for, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m alphatoken_loss", description="Token values of data sets.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"alphatoken_loss.{name}").add_parser(subparsers)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console without a letter (cp1252) shows "?" for it
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
