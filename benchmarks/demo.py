"""What the recipes print without arguments, and at other learning rates, for the tables of docs/quick-start.md.

    python benchmarks/demo.py                # all; a few minutes each on two cores
    python benchmarks/demo.py sft_qlora

Writes benchmarks/results/dpo_qlora.json and sft_qlora.json, a run at a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from results import FOLDER, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
import dpo_qlora
import sft_qlora

RECIPES = {"dpo_qlora": dpo_qlora, "sft_qlora": sft_qlora}
RATES = {"dpo_qlora": ("1e-3", "3e-4", "3e-3"), "sft_qlora": ("1e-3",)}  # the recipes' own first


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"{', '.join(RECIPES)}; by default all")
    args = parser.parse_args(argv)
    if unknown := set(args.recipes) - set(RECIPES):
        parser.error(f"{', '.join(sorted(unknown))}: no recipe; choose from {', '.join(RECIPES)}.")
    for name in args.recipes or RECIPES:
        found = {}
        for rate in RATES[name]:
            with tempfile.TemporaryDirectory() as folder:
                found[rate] = RECIPES[name].main(["--learning_rate", rate, "--output_dir", folder])
            write(FOLDER / f"{name}.json", found, settings=args)


if __name__ == "__main__":
    main()
