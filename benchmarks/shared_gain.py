"""Do training rows tell before training whether a mask will help? `shared_gain` where the outcome is known.

    python benchmarks/shared_gain.py                                  # the toy world: minutes
    python benchmarks/shared_gain.py --world real --data FOLDER       # the real one, with the extra "real"

Of each world the same clean rows, with training rows of each kind of noise. What came of masking them is in the tables
of tradeoff.py and real.py. Writes benchmarks/results/shared_gain_toy.json (or _real), a row at a time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, write
from worlds.real import Real, load_smollm2
from worlds.real_data import RealPlan
from worlds.rows import chunks
from worlds.settings import Setting
from worlds.toy import BASES, Toy, ToyPlan, cached, make_base, read_texts
from worlds.world import World

from alphatoken_loss import AlphaTokenConfig, shared_gain

NOISY, CLEAN = Setting("noisy"), Setting("clean", noise=False)
EXCHANGED = Setting("exchanged", noise=False, exchanged=0.3)
REAL = AlphaTokenConfig(estimator="path", path_steps=16, path_rate=5e-4)  # a trial would take most of the time


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, World, Setting, AlphaTokenConfig]]:
    """What the rows are called, where they come from, and how theta* is made."""
    if args.world == "toy":
        world = Toy(make_base(read_texts(), BASES["small"], args.device), ToyPlan(), args.device)
        config = AlphaTokenConfig(estimator="path")
        for name, setting in (("noisy", NOISY), ("exchanged", EXCHANGED), ("clean", CLEAN)):
            yield f"toy, {name} answers", world, setting, config
        return
    folder = args.model or load_smollm2(cached)
    for noise in ("boilerplate", "exchanged", ""):
        real = Real(folder, RealPlan(), args.device, noise=noise, data=args.data)
        yield f"nl2bash, {noise or 'clean'}", real, NOISY, REAL


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["toy", "real"], default="toy")
    parser.add_argument("--data", default=os.environ.get("ALPHATOKEN_REAL_DATA"), help="folder of data (default: hub)")
    parser.add_argument("--model", type=Path, help="folder of the real world's model (default SmolLM2-135M)")
    parser.add_argument("--rows", type=int, default=64, help="training rows (default 64)")
    parser.add_argument("--seeds", type=int, default=3, help="of the rows (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for name, world, setting, config in wanted(args):
            target, training = world.validation(setting, seed), world.training(setting, seed)[: args.rows]
            batches = ([world.batch(some) for some in chunks(part, world.plan.batch)] for part in (target, training))
            with world.autocast():
                found = shared_gain(world.model(seed=seed), *batches, config=config)
            told = {"clean": found.clean, "training": found.training, "share": found.share, "interval": found.interval}
            rows.append({"rows": name, "seed": seed, **told})
            print(f"{name}, seed {seed}: {found}")
            settings = {"rows": args.rows, "seeds": args.seeds, "world": args.world, "device": args.device}
            write(args.output / f"shared_gain_{args.world}.json", rows, settings=settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
