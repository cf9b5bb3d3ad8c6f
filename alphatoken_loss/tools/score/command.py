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

from tqdm.auto import tqdm

from ...config import AlphaTokenConfig
from ..cli import UserError, or_exit
from .inputs import SETTINGS, inputs_of, open_output
from .parts import SCORED, Labelling, finish, read_meta, write_part
from .reselect import labelling_of, report, reselect
from .rows import form_of, load_rows
from .scorer import Scorer


@or_exit("Lower --tokens-per-batch, and run the command again.", "Run the same command again to go on.")
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0; 1 for values that are not finite or too little memory; 2 for a user's
    mistake; 130 when interrupted."""
    if args.reselect:
        folder = reselect(args.reselect, **labelling_of(args), output=args.output)
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
    beta = {"path_beta": args.beta} if args.estimator == "path" else {}
    chosen = Labelling(**labelling_of(args))
    values = {name: getattr(args, name) for name in SETTINGS}
    config = AlphaTokenConfig(rho=chosen.rho, smoothing=chosen.smoothing, **beta, **values)
    rows = load_rows(args.dataset, args.split, "--dataset")
    form = form_of(rows, "--dataset")
    target_rows = load_rows(args.target, args.target_split, "--target")
    if form_of(target_rows, "--target") != "sft" and args.estimator != "path":
        raise UserError("--target holds preference pairs; it must be in SFT form, but for --estimator path.")
    if args.fisher is not None and not Path(args.fisher).is_file():
        raise UserError(f"--fisher {args.fisher}: there is no such file.")
    if args.adapter is None and args.estimator != "path":  # W is W_ref: nothing has drifted, and no Fisher is needed
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
                write_part(path, scorer.part(start, stop, bar), start, chosen, form)
    return finish(folder, folder, meta, chosen)
