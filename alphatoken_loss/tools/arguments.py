"""The arguments of the commands and nothing else, so that help, and errors in arguments, need no torch.

To add a command, write its `run(args) -> int` in a module of its own, and here its arguments and a line in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from ..config import AlphaTokenConfig
from ..estimators import ESTIMATORS
from .cli import Help, layers, positive


def add_command(subparsers: Any, name: str) -> None:
    """Add a command of `COMMANDS` to a command line; `args.run(args)` then runs it and returns the exit status."""
    words, arguments, module = COMMANDS[name]
    parser = subparsers.add_parser(name, help=words, formatter_class=Help)
    arguments(parser)
    parser.set_defaults(run=lambda args: importlib.import_module(f"alphatoken_loss.{module}").run(args))


def _score(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Value every response token of a data set and write it tokenised, the labels of low-value tokens set to -100, "
        "for TRL, Axolotl or LLaMA-Factory. Run the same command again to go on after an interruption; `reselect` "
        "makes labels for another --rho from the stored values."
    )
    defaults = AlphaTokenConfig()
    add = parser.add_argument_group("what is read and written").add_argument
    add("--model", help="model folder or hub id (needed)")
    add("--adapter", help="folder or hub id of a LoRA adapter; by default a new one, which has no drift yet")
    add("--tokenizer", help="folder or hub id; by default the one beside --adapter, if any, else the model's")
    add("--dataset", help=".jsonl, .json or .parquet file, folder of `datasets`, or hub id (needed)")
    add("--split", default="train", help="split of a folder or hub data set")
    add("--target", help="examples of the target task, where --dataset may be, in SFT form (path: or pairs; needed)")
    add("--target-split", default="train", help="split of the target")
    add("--output", help="folder to write, or to go on with (needed)")
    add("--max-length", type=positive, default=1024, help="tokens that a sequence is cut to")
    add("--assistant-only-loss", action="store_true", help="of messages, value assistant turns only")
    _selection(parser.add_argument_group("which tokens are kept"))
    add("--reselect", metavar="FOLDER", help="what `alphatoken reselect FOLDER` does")
    add = parser.add_argument_group("values").add_argument
    add("--stability-weight", type=float, default=defaults.stability_weight, help="weight of drift against the target")
    add("--num-layers", type=layers, help='last blocks to score, a number or "all" (3 for ghost, else all)')
    add("--causal-window", type=int, default=defaults.causal_window, help="causal credit in tokens ahead, 0 for none")
    add("--estimator", choices=list(ESTIMATORS), default=defaults.estimator, help="how tokens are valued")
    add("--fisher", metavar="FILE", help="a saved Fisher; by default estimated from prompts of the data set")
    add("--fisher-prompts", type=positive, default=1000, help="prompts to estimate it from")
    add("--fisher-new-tokens", type=positive, default=128, help="tokens sampled after each of them")
    add("--beta", type=float, default=0.1, help="of the DPO loss that values pairs, in 1 / nats")
    add("--lora-r", type=positive, default=16, help="rank of a new adapter, on all linears")
    add("--seed", type=int, default=0, help="of a new adapter and the prompts of the Fisher")
    add = parser.add_argument_group("how it runs").add_argument
    add("--tokens-per-batch", type=positive, default=8192, help="tokens run together, padding included")
    add("--rows-per-part", type=positive, default=1000, help="rows of a part; what an interruption may lose")
    add("--load-in-4bit", action="store_true", help="quantise the model to NF4 (bitsandbytes)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model's weights")
    add("--device", help="where to run; by default CUDA where there is one, else the CPU")


def _reselect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make the labels of a scored data set anew from its stored values, in a folder of its own: tools that have "
        "prepared the old one would not notice a change in place."
    )
    parser.add_argument("folder", metavar="FOLDER", help="output of `alphatoken score`")
    parser.add_argument("--output", help="folder to write; by default FOLDER with the share at its end")
    _selection(parser)


def _selection(group: Any) -> None:
    """Which tokens are kept."""
    group.add_argument("--rho", type=float, default=0.5, help="share of response tokens to keep, in (0, 1]")
    group.add_argument(
        "--threshold-scope",
        choices=("sequence", "dataset"),
        default="sequence",
        help="keep that share of each sequence, or of all tokens of the data set (of each branch, for pairs)",
    )
    group.add_argument(
        "--smoothing", type=int, default=0, help="neighbours on either side by whose values tokens are chosen too"
    )


def _show(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write a page that shows what `alphatoken score` made of some rows."
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="output of `alphatoken score`")
    add("--start", type=positive, default=1, help="first row, counted from 1")
    add("--rows", type=positive, default=20, help="rows to show")
    add("--tokenizer", help="folder or hub id; by default the one that the rows were scored with")
    add("--out", metavar="FILE", help="HTML file to write; by default FOLDER/tokens.html")
    add("--terminal", action="store_true", help="print to the terminal instead")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the report of a training run as one HTML file: how token values were distributed over training, which "
        "positions and which tokens were kept, the logged curves, and some sequences."
    )
    add = parser.add_argument
    add("run_dir", metavar="RUN_DIR", help="output_dir of the run, or the folder of a SampleWriter")
    add("--out", metavar="FILE", help=f"where to write; by default RUN_DIR/{REPORT_FILE}")
    add(
        "--tokenizer", metavar="NAME", help="folder or name; by default the one found in RUN_DIR or its last checkpoint"
    )
    add("--rows", type=int, default=6, help="sequences (or pairs) shown in full")


REPORT_FILE = "_alphatoken_report.html"  # Trainer.push_to_hub leaves out what begins with "_"


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "Load a model, put its adapter (or a new one) on, and run a few steps with each estimator."
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder or hub id")
    add("--adapter", help="folder or hub id of a LoRA adapter; by default a new one on all linears")
    add("--lora-r", type=positive, default=16, help="rank of a new adapter")
    add("--load-in-4bit", action="store_true", help="quantise the model to NF4 (bitsandbytes)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model's weights")
    add("--device", help="where to run; by default CUDA where there is one, else the CPU")
    add("--batch-size", type=positive, default=2, help="sequences of a step")
    add("--length", type=positive, default=128, help="tokens of a sequence")
    add("--steps", type=positive, default=3, help="timed steps")
    add("--gradient-checkpointing", action="store_true", help="with it, as long runs have it")
    add("--seed", type=int, default=0, help="of a new adapter and the tokens")


def _environment(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print what is installed and what it runs on."


# Name -> its line in help, its arguments, and the module with its `run`, in the order in which help lists them.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], str]] = {
    "score": (
        "value a data set and write it tokenised, with low-value tokens masked",
        _score,
        "tools.score.command",
    ),
    "reselect": ("make other labels for a scored data set, without a model", _reselect, "tools.score.reselect"),
    "show": ("show rows of a scored data set, tokens coloured by value", _show, "tools.show.command"),
    "report": ("write the report of a training run as one HTML file", _report, "tools.report.report"),
    "doctor": (
        "which estimators fit a model, what is scored, and what a step costs here",
        _doctor,
        "tools.doctor",
    ),
    "env": ("versions, devices and what is installed, for a report of a fault", _environment, "tools.environment"),
}
