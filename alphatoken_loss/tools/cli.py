"""What the commands share: help with defaults, kinds of arguments, errors in one line, quiet libraries."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator

Command = Callable[[argparse.Namespace], int]


class UserError(Exception):
    """A mistake in what was asked for; the message says what to do."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, if there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def layers(text: str) -> int | str:
    """A number of blocks, or "all"."""
    return text if text == "all" else int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def first_line(error: BaseException) -> str:
    """The first line of an error, with the first size mismatch that torch lists below it; or the error's type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sizes = [line.strip() for line in lines[1:] if "size mismatch" in line]
    return " ".join([lines[0], *sizes[:1]]) + (f" And {len(sizes) - 1} more of this kind." if sizes[1:] else "")


def as_typed(message: str, args: argparse.Namespace) -> str:
    """A message of the library with arguments named as they are typed: `num_layers is 9` -> `--num-layers is 9`."""
    names = "|".join(re.escape(name) for name in vars(args) if name not in ("run", "command"))
    return re.sub(rf"(?<![-\w'\"])({names})(?= is |=)", lambda found: "--" + found[1].replace("_", "-"), message)


def or_exit(memory: str = "", again: str = "") -> Callable[[Command], Command]:
    """Print errors in a line, with no traceback; ALPHATOKEN_DEBUG=1 in the environment shows it.

    Args:
        memory (`str`): what to do if there was too little memory.
        again (`str`): what to do after an interruption.

    Returns:
        A decorator; the command then returns 2 for a mistake of the user, 1 for too little memory or values that are
        not finite, 130 when interrupted.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def told(args: argparse.Namespace) -> int:
            try:
                with quiet_libraries():
                    return command(args)
            except (UserError, ValueError, OSError, FloatingPointError, RuntimeError) as error:
                short_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported for this
                fault = isinstance(error, RuntimeError) and not short_of_memory
                if fault or os.environ.get("ALPHATOKEN_DEBUG"):
                    raise
                if short_of_memory:
                    print(f"error: {first_line(error)} {memory}".rstrip(), file=sys.stderr)
                else:
                    print(f"error: {as_typed(str(error), args)}", file=sys.stderr)
                return 1 if isinstance(error, (FloatingPointError, RuntimeError)) else 2
            except KeyboardInterrupt:
                print(f"\nInterrupted. {again}".rstrip(), file=sys.stderr)
                return 130

        return told

    return decorate


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence libraries where a user cannot act on what they say: bars for loading weights and tokenising, PEFT's
    warning about a base without a hub page, bitsandbytes' about a CPU. Errors are still shown."""
    import datasets
    from transformers.utils import logging as words

    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "torch.distributed", "torchao", "huggingface_hub")]
    before = words.get_verbosity(), datasets.utils.logging.get_verbosity(), [logger.level for logger in loggers]
    bars = words.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    try:
        words.set_verbosity_error()
        words.disable_progress_bar()
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Could not find a config file in.*")  # peft, of a local base
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\b")
            yield
    finally:
        words.set_verbosity(before[0])
        datasets.utils.logging.set_verbosity(before[1])
        for logger, level in zip(loggers, before[2], strict=True):
            logger.setLevel(level)
        if bars[0]:
            words.enable_progress_bar()
        if bars[1]:
            datasets.enable_progress_bars()
