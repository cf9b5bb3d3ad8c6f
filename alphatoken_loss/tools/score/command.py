"""`python -m alphatoken_loss score`: value a data set once, and write it tokenised with low-value tokens masked.

The output is a folder. `scored/part-*.parquet` hold every row in the order of the data set, with its token values;
`train/` holds what trainers take, `input_ids`, `attention_mask` and `labels` and no other column, as a folder of
`datasets`; `meta.json` says how all of it was made. Each file appears whole or not at all, so an interrupted run goes
on at the first part that is missing, and labels for another `rho` are made from the stored values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...config import AlphaTokenConfig
from ...directions.estimate import estimate_fisher
from ...directions.fisher import Fisher
from ...directions.target import Target, target_gradient
from ...weights import alphatoken_weights
from .parts import META, SCORED, finish, read_meta, whole, write_json, write_part
from .rows import Row, UserError, by_length, collate, first_line, form_of, load_rows, tokenised

FISHER = "fisher.safetensors"
_SETTINGS = ("stability_weight", "num_layers", "causal_window", "estimator")


def add_parser(subparsers: Any) -> None:
    """Add `score` to a command line."""
    parser = subparsers.add_parser(
        "score",
        help="value a data set and write it tokenised, with low-value tokens masked",
        description="Value every response token of a data set and write it tokenised, the labels of low-value tokens "
        "set to -100, for TRL, Axolotl or LLaMA-Factory. Run the same command again to go on after an interruption, "
        "or with another --rho to make new labels from the stored values, which takes no model.",
        formatter_class=_Defaults,
    )
    defaults = AlphaTokenConfig()
    add = parser.add_argument
    add("--model", help="model folder or hub id (needed)")
    add("--adapter", help="folder or hub id of a LoRA adapter; by default a new one, which has no drift yet")
    add("--dataset", help=".jsonl, .json or .parquet file, folder of `datasets`, or hub id (needed)")
    add("--split", default="train", help="split of a folder or hub data set")
    add("--target", help="examples of the target task in SFT form, where --dataset may be (needed)")
    add("--target-split", default="train", help="split of the target")
    add("--output", help="folder to write, or to go on with (needed)")
    add("--rho", type=float, default=defaults.rho, help="share of response tokens to keep, in (0, 1]")
    add(
        "--threshold-scope",
        choices=("sequence", "dataset"),
        default="sequence",
        help="keep that share of each sequence, or of all tokens of the data set (of each branch, for pairs)",
    )
    add("--reselect", metavar="FOLDER", help="make new labels of a finished output and exit; into --output, if given")
    add("--stability-weight", type=float, default=defaults.stability_weight, help="weight of drift against the target")
    add("--num-layers", type=_layers, help='last blocks to score, a number or "all" (3 for ghost, else all)')
    add("--causal-window", type=int, default=defaults.causal_window, help="causal credit in tokens ahead, 0 for none")
    add(
        "--estimator",
        choices=("ghost", "difference", "exact"),
        default=defaults.estimator,
        help="how tokens are valued, see README",
    )
    add("--fisher", metavar="FILE", help="a saved Fisher; by default estimated from prompts of the data set")
    add("--fisher-prompts", type=_positive, default=1000, help="prompts to estimate it from")
    add("--fisher-new-tokens", type=_positive, default=128, help="tokens sampled after each of them")
    add("--beta", type=float, default=0.1, help="of the DPO loss that values pairs, in 1 / nats")
    add("--max-length", type=_positive, default=1024, help="tokens that a sequence is cut to")
    add("--assistant-only-loss", action="store_true", help="of messages, value assistant turns only")
    add("--tokens-per-batch", type=_positive, default=8192, help="tokens run together, padding included")
    add("--rows-per-part", type=_positive, default=1000, help="rows of a part; what an interruption may lose")
    add("--load-in-4bit", action="store_true", help="quantise the model to NF4 (bitsandbytes)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the model's weights")
    add("--device", help="where to run; by default CUDA where there is one, else the CPU")
    add("--lora-r", type=_positive, default=16, help="rank of a new adapter, on all linears")
    add("--seed", type=int, default=0, help="of a new adapter and the prompts of the Fisher")
    parser.set_defaults(run=run)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _layers(text: str) -> int | str:
    return text if text == "all" else int(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0; 1 for values that are not finite or too little memory; 2 for a user's
    mistake; 130 when interrupted."""
    try:
        if args.reselect:
            folder = reselect(args.reselect, rho=args.rho, threshold_scope=args.threshold_scope, output=args.output)
        else:
            folder = score(args)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: {first_line(error)} Lower --tokens-per-batch, and run the command again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        return 130
    meta = read_meta(folder)
    kept, tokens = meta["kept_tokens"], meta["response_tokens"]
    print(f"{folder}: {meta['rows']} rows, {kept} of {tokens} response tokens kept ({kept / max(tokens, 1):.1%}).")
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
    config = AlphaTokenConfig(rho=args.rho, **{name: getattr(args, name) for name in _SETTINGS})
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
    meta = _open(folder, _inputs(args, config, rows, target_rows), rows=len(rows), form=form)
    parts = [
        (folder / SCORED / f"part-{number:05d}.parquet", start, min(start + args.rows_per_part, len(rows)))
        for number, start in enumerate(range(0, len(rows), args.rows_per_part))
    ]
    todo = [part for part in parts if not part[0].is_file()]
    if todo:
        scorer = _Scorer(args, config, rows, target_rows, folder)
        done = len(rows) - sum(stop - start for _, start, stop in todo)
        with tqdm(total=len(rows), initial=done, desc="Score", unit="row") as bar:
            for path, start, stop in todo:
                write_part(path, scorer.part(start, stop, bar), start, args.rho, form)
    return finish(folder, folder, meta, args.rho, args.threshold_scope)


def reselect(
    path: str | os.PathLike[str],
    *,
    rho: float,
    threshold_scope: str = "sequence",
    output: str | os.PathLike[str] | None = None,
) -> Path:
    """Make the labels of a scored data set anew from its stored values, without a model.

    Args:
        path: a finished output of `python -m alphatoken_loss score`.
        rho (`float`): share of response tokens to keep, in (0, 1].
        threshold_scope (`str`): `"sequence"`, that share of each sequence, or `"dataset"`, of all tokens (of each
            branch, for pairs).
        output: folder to write instead of changing `path`.

    Returns:
        `Path`: the folder that was written.

    Raises:
        UserError: `path` is no finished output, or `output` exists and is not empty.
        ValueError: `rho` or `threshold_scope` is not allowed.

    Example:
        >>> reselect("scored", rho=0.3, output="scored-0.3")
    """
    AlphaTokenConfig(rho=rho)
    if threshold_scope not in ("sequence", "dataset"):
        raise ValueError(f"threshold_scope is {threshold_scope!r}; it must be 'sequence' or 'dataset'.")
    source = Path(path)
    meta = read_meta(source)
    if meta["state"] == "scoring":
        raise UserError(f"{source}: scoring was interrupted. Run its command again first.")
    folder = source if output is None else Path(output)
    if folder.resolve() != source.resolve() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output {folder}: the folder exists and is not empty.")
    return finish(source, folder, meta, rho, threshold_scope)


class _Scorer:
    """The model and what its values need, loaded when there is something left to score."""

    def __init__(
        self, args: argparse.Namespace, config: AlphaTokenConfig, rows: Any, target_rows: Any, folder: Path
    ) -> None:
        self.args, self.config, self.rows = args, config, rows
        try:
            self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device}: cannot be used ({first_line(error)}).") from error
        self.tokenizer = _load_tokenizer(args.model)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.options = {"max_length": args.max_length, "assistant_only": args.assistant_only_loss}
        self.tokenised(rows, [0], "--dataset")  # a chat template that is missing, before a model is loaded
        target = self.tokenised(target_rows, range(len(target_rows)), "--target")
        self.model = load_model(args, self.device)
        self.target: Target = target_gradient(self.model, self._batches(target), config=config)
        self.fisher = self._fisher(folder) if config.stability_weight > 0 else None

    def tokenised(self, rows: Any, places: Any, option: str) -> list[Row]:
        return tokenised(rows, places, self.tokenizer, option=option, **self.options)

    def part(self, start: int, stop: int, bar: Any) -> list[tuple[Row, list[torch.Tensor]]]:
        """Rows start to stop with the values of each of their sequences, in the data set's order."""
        rows = self.tokenised(self.rows, range(start, stop), "--dataset")
        values: list[list[torch.Tensor]] = [[] for _ in rows]
        for places in by_length(rows, self.args.tokens_per_batch):
            try:
                found = self._values([rows[i] for i in places])
            except FloatingPointError as error:
                raise FloatingPointError(f"rows {sorted(start + i for i in places)}: {error}") from error
            for i, value in zip(places, found, strict=True):
                values[i] = value
            bar.update(len(places))
        return list(zip(rows, values, strict=True))

    def _values(self, rows: list[Row]) -> list[list[torch.Tensor]]:
        batch = collate(rows, self.pad, self.device)
        given: dict[str, Any] = {"target": self.target, "fisher": self.fisher, "config": self.config}
        _, values = alphatoken_weights(self.model, None, batch, beta=self.args.beta, return_values=True, **given)
        total = values.total.float().cpu()
        branches = total.split(len(rows))  # pairs are stacked, chosen first
        return [
            [branch[i, : len(sequence.ids)] for branch, sequence in zip(branches, row, strict=True)]
            for i, row in enumerate(rows)
        ]

    def _batches(self, rows: list[Row]) -> Iterator[dict[str, torch.Tensor]]:
        for places in by_length(rows, self.args.tokens_per_batch):
            yield collate([rows[i] for i in places], self.pad, self.device)

    def _fisher(self, folder: Path) -> Fisher:
        """The Fisher that was given, that an interrupted run has left, or a new one."""
        args, path = self.args, folder / FISHER
        if args.fisher is not None or path.is_file():
            return Fisher.load(args.fisher or path)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(args.seed))
        chosen = self.tokenised(self.rows, order[: args.fisher_prompts].tolist(), "--dataset")
        fisher = estimate_fisher(
            self.model,
            [row[0].prompt for row in chosen if row[0].prompt],
            tokenizer=self.tokenizer,
            config=self.config,
            max_new_tokens=args.fisher_new_tokens,
            seed=args.seed,
        )
        with whole(path) as temporary:
            fisher.save(temporary)
        return fisher


def _load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: no tokenizer could be loaded ({first_line(error)}).") from error


def load_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The base model with its adapter, or with a new one, in training mode."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if args.load_in_4bit:
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {args.model}: could not be loaded ({first_line(error)}).") from error
    if not args.load_in_4bit:
        model = model.to(device)
    if args.adapter is None:
        torch.manual_seed(args.seed)
        new = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, new).train()  # 4-bit linears in evaluation mode lose their backward on a CPU
    try:
        with warnings.catch_warnings():
            # PEFT only warns where an adapter lacks weights, and would leave them as they were initialised.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, args.adapter, is_trainable=True).train()
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UserError(
            f"--adapter {args.adapter}: does not fit --model {args.model} ({first_line(error)})."
        ) from error


def _inputs(args: argparse.Namespace, config: AlphaTokenConfig, rows: Any, target_rows: Any) -> dict[str, Any]:
    """All that decides the values and the parts, so that a run only goes on with what it began."""
    adapter = None if args.adapter is None else [args.adapter, _digest(Path(args.adapter))]
    new = {"lora_r": args.lora_r} if args.adapter is None else {}
    return {
        "model": args.model,
        "adapter": adapter,
        **new,
        "dataset": [args.dataset, args.split, len(rows), _digest(Path(args.dataset)) or rows._fingerprint],
        "target": [
            args.target,
            args.target_split,
            len(target_rows),
            _digest(Path(args.target)) or target_rows._fingerprint,
        ],
        **{name: getattr(config, name) for name in _SETTINGS},
        "fisher": args.fisher and [args.fisher, _digest(Path(args.fisher))],
        **{name: getattr(args, name) for name in ("fisher_prompts", "fisher_new_tokens", "beta", "max_length")},
        **{name: getattr(args, name) for name in ("assistant_only_loss", "rows_per_part", "load_in_4bit", "dtype")},
        "seed": args.seed,
    }


def _digest(path: Path) -> str | None:
    """Of a file's content, or a folder's files; None of what is not here."""
    if not path.exists():
        return None
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _open(folder: Path, inputs: dict[str, Any], **about: Any) -> dict[str, Any]:
    """Begin an output, or see that the one there was begun in the same way."""
    if (folder / META).is_file():
        meta = read_meta(folder)
        names = dict.fromkeys([*meta["inputs"], *inputs])
        differ = [name for name in names if meta["inputs"].get(name) != inputs.get(name)]
        if not differ:
            return meta
        if any((folder / SCORED).iterdir()):
            raise UserError(
                f"--output {folder} was begun with other arguments or files ({', '.join(differ)}). Give another "
                "folder, or the arguments it was begun with."
            )
        (folder / FISHER).unlink(missing_ok=True)  # of a run that ended before it wrote a part, by a mistake say
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} exists and is no output of this command. Give another folder.")
    packages = ("alphatoken-loss", "torch", "transformers", "peft", "trl")
    meta = {"state": "scoring", "inputs": inputs, **about, "versions": {}}
    for name in packages:
        with contextlib.suppress(Exception):  # not installed as a package
            meta["versions"][name] = version(name)
    (folder / SCORED).mkdir(parents=True, exist_ok=True)
    write_json(folder / META, meta)
    return meta
