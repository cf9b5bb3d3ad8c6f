"""Does it adapt better and forget less? Token selections side by side, on a laptop, offline.

    python benchmarks/tradeoff.py --quick      # five selections, one seed: under five minutes once the base is cached
    python benchmarks/tradeoff.py              # the full table: hours on two cores; goes on where it stopped
    python benchmarks/tradeoff.py --pace       # seconds a step of each setting, one after the other, on a quiet machine
    python benchmarks/tradeoff.py --report     # only the tables and the plot, of the runs there are

A Llama of 2.2M parameters, trained here on Python, English prose and little tasks (about ten minutes, cached), is tuned
by LoRA to continue C++ code, from answers with boilerplate, a junk tail and corrupted tokens; 32 clean examples from
other files say what the target is. Measured along the way: the loss on clean C++ of yet other files (target), the loss
on held-out Python and prose and on the little tasks (retention), tokens kept by kind, and time. See worlds/toy.py for
the text, worlds/training.py for a run, worlds/settings.py for the settings; real.py does the same on a real model.
"""

from __future__ import annotations

import argparse
import platform
from datetime import date
from pathlib import Path

import torch
from worlds import runner
from worlds.settings import toy_runs
from worlds.toy import BASES, Toy, ToyPlan, make_base, read_texts
from worlds.toy_report import write_report

PLAN = ToyPlan()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five selections, one seed, one learning rate")
    parser.add_argument("--size", choices=list(BASES), default="small", help="of the base model (default small)")
    runner.add_options(parser, Path("outputs/tradeoff"))
    args = parser.parse_args(argv)

    world = Toy(make_base(read_texts(), BASES[args.size], args.device), PLAN, args.device)
    wanted = [(world, *r) for r in toy_runs(args.quick)]
    results, paces = runner.take_and_read(wanted, args.output / "results.jsonl", args)
    about = f"{date.today()}, {platform.machine()}, {args.device}, torch {torch.__version__}"
    write_report(results, paces, args.output, about)


if __name__ == "__main__":
    main()
