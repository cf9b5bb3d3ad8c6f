"""`alphatoken score`: value a data set once, and write it tokenised with low-value tokens masked.

The output is a folder. `scored/part-*.parquet` hold every row in the order of the data set, with its token values;
`train/` holds what trainers take, `input_ids`, `attention_mask` and `labels` and no other column, as a folder of
`datasets`; `meta.json` says how all of it was made. Each file appears whole or not at all, so an interrupted run goes
on at the first part that is missing; `alphatoken reselect` makes labels for another `rho` from the stored values.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...config import AlphaTokenConfig
from ...estimators import ESTIMATORS
from ..cli import Help, UserError, layers, or_exit, positive
from .inputs import SETTINGS, inputs_of, open_output
from .parts import SCORED, finish, read_meta, write_part
from .reselect import add_selection, report, reselect
from .rows import form_of, load_rows
from .scorer import Scorer


def add_parser(subparsers: Any) -> None:
    """Add `score` to a command line."""
    parser = subparsers.add_parser(
        "score",
        help="value a data set and write it tokenised, with low-value tokens masked",
        description="Value every response token of a data set and write it tokenised, the labels of low-value tokens "
        "set to -100, for TRL, Axolotl or LLaMA-Factory. Run the same command again to go on after an interruption; "
        "`reselect` makes labels for another --rho from the stored values.",
        formatter_class=Help,
    )
    defaults = AlphaTokenConfig()
    add = parser.add_argument_group("what is read and written").add_argument
    add("--model", help="model folder or hub id (needed)")
    add("--adapter", help="folder or hub id of a LoRA adapter; by default a new one, which has no drift yet")
    add("--tokenizer", help="folder or hub id; by default the one beside --adapter, if any, else the model's")
    add("--dataset", help=".jsonl, .json or .parquet file, folder of `datasets`, or hub id (needed)")
    add("--split", default="train", help="split of a folder or hub data set")
    add("--target", help="examples of the target task in SFT form, where --dataset may be (needed)")
    add("--target-split", default="train", help="split of the target")
    add("--output", help="folder to write, or to go on with (needed)")
    add("--max-length", type=positive, default=1024, help="tokens that a sequence is cut to")
    add("--assistant-only-loss", action="store_true", help="of messages, value assistant turns only")
    add_selection(parser.add_argument_group("which tokens are kept"))
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
    parser.set_defaults(run=run)


@or_exit("Lower --tokens-per-batch, and run the command again.", "Run the same command again to go on.")
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0; 1 for values that are not finite or too little memory; 2 for a user's
    mistake; 130 when interrupted."""
    if args.reselect:
        folder = reselect(args.reselect, rho=args.rho, threshold_scope=args.threshold_scope, output=args.output)
    else:
        folder = score(args)
    print(report(folder, read_meta(folder)))
    return 0


def score(args: argparse.Namespace) -> Path:
    """Score a data set, or go on with one.

    Returns:
        `Path`: the finished output.

    Raises:
        UserError: something that was asked for does not exist or does not fit.
        ValueError: the library refuses the model, the adapter or a setting; the message says why.
    """
    missing = [name for name in ("model", "dataset", "target", "output") if getattr(args, name) is None]
    if missing:
        raise UserError(f"{', '.join('--' + name for name in missing)}: needed (or --reselect). See --help.")
    config = AlphaTokenConfig(rho=args.rho, **{name: getattr(args, name) for name in SETTINGS})
    rows = load_rows(args.dataset, args.split, "--dataset")
    form = form_of(rows, "--dataset")
    target_rows = load_rows(args.target, args.target_split, "--target")
    if form_of(target_rows, "--target") != "sft":
        raise UserError("--target holds preference pairs; it must be in SFT form.")
    if args.fisher is not None and not Path(args.fisher).is_file():
        raise UserError(f"--fisher {args.fisher}: there is no such file.")
    if args.adapter is None:  # W is W_ref, so nothing has drifted and no Fisher is needed
        config = dataclasses.replace(config, stability_weight=0.0)
    folder = Path(args.output)
    names = {name: getattr(args, name) for name in ("model", "adapter", "tokenizer", "dataset", "target", "fisher")}
    meta = open_output(folder, inputs_of(args, config, rows, target_rows), rows=len(rows), form=form, names=names)
    parts = [
        (folder / SCORED / f"part-{number:05d}.parquet", start, min(start + args.rows_per_part, len(rows)))
        for number, start in enumerate(range(0, len(rows), args.rows_per_part))
    ]
    todo = [part for part in parts if not part[0].is_file()]
    if todo:
        scorer = Scorer(args, config, rows, target_rows, folder)
        done = len(rows) - sum(stop - start for _, start, stop in todo)
        with tqdm(total=len(rows), initial=done, desc="Score", unit="row") as bar:
            for path, start, stop in todo:
                write_part(path, scorer.part(start, stop, bar), start, args.rho, form)
    return finish(folder, folder, meta, args.rho, args.threshold_scope)
