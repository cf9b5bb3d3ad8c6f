"""The command line: `alphatoken COMMAND`, or `python -m alphatoken_loss COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from . import __version__

# Modules of this package with an `add_parser`, in the order in which help lists their commands.
_COMMANDS = (
    "tools.score.command",
    "tools.score.reselect",
    "tools.show.command",
    "trl.command",
    "tools.report.report",
    "tools.doctor",
    "tools.environment",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for a mistake in what was asked for, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="alphatoken",
        description="Token values for fine-tuning that forgets less.",
        epilog="ALPHATOKEN_DEBUG=1 in the environment shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"alphatoken_loss.{name}").add_parser(subparsers)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console without a letter (cp1252) shows "?" for it
    from .trl.command import KINDS, train

    try:
        if argv and argv[0] in KINDS:  # TRL's own parser reads the rest
            return train(argv[0], argv[1:])
        args = parser.parse_args(argv)
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
