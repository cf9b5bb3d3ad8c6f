"""The command line: `alphatoken COMMAND`, or `python -m alphatoken_loss COMMAND`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from . import __version__
from .tools.arguments import COMMANDS, add_command
from .trl.command import KINDS, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for too little memory or values that
    are not finite, 2 for a mistake in what was asked for, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="alphatoken",
        description="Token values for fine-tuning that forgets less.",
        epilog="ALPHATOKEN_DEBUG=1 in the environment shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        add_command(subparsers, name)
    for name, words in KINDS.items():
        subparsers.add_parser(name, help=f"{words}, with TRL's arguments", add_help=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console without a letter (cp1252) shows "?" for it
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
