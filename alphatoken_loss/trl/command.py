"""`alphatoken sft` and `alphatoken dpo`: the trainers with TRL's arguments, on the command line or in a YAML file.

They take what `trl sft` and `trl dpo` take (`--config file.yaml` too), the fields of `AlphaTokenArguments`, and
`--target`, the clean examples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..tools.cli import UserError, or_exit

KINDS = {"sft": "train a model on prompts and answers", "dpo": "train a model on preference pairs"}


@dataclass
class TargetArguments:
    """Where the examples of the target task are."""

    target: str | None = field(
        default=None,
        metadata={
            "help": "Examples of the target task in SFT form: .jsonl, .json or .parquet file, folder of `datasets`, or "
            "hub id; for dpo with --estimator path also preference pairs. By default training rows are held out."
        },
    )
    target_split: str = field(default="train", metadata={"help": "Split of the target."})


@or_exit("Lower --per_device_train_batch_size, or use --gradient_checkpointing.", "--resume_from_checkpoint goes on.")
def _run(args: argparse.Namespace) -> int:
    trainer = build(args.kind, args.argv)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"Saved in {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return 0


def train(kind: str, argv: Sequence[str]) -> int:
    """Train as the arguments say. Returns the exit status."""
    return _run(argparse.Namespace(kind=kind, argv=list(argv)))


def build(kind: str, argv: Sequence[str]) -> Any:
    """The trainer that the arguments describe.

    Args:
        kind (`str`): `"sft"` or `"dpo"`.
        argv: arguments of the command line.

    Raises:
        UserError: no model or no data set is named.
        SystemExit: the arguments cannot be read, or ask for help.
    """
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

    from ..tools.score.rows import load_rows
    from .arguments import AlphaTokenArguments, AlphaTokenDPOConfig, AlphaTokenSFTConfig

    settings = AlphaTokenDPOConfig if kind == "dpo" else AlphaTokenSFTConfig
    types = (TargetArguments, settings, ScriptArguments, ModelConfig, DatasetMixtureConfig)
    parser = TrlParser(types, prog=f"alphatoken {kind}", description=f"{KINDS[kind].capitalize()}, on tokens of value.")
    _group(parser, {"token values": (AlphaTokenArguments, TargetArguments), "data": (ScriptArguments, types[-1]),
                    "model and adapter": (ModelConfig,), "training": (settings,)})  # fmt: skip
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    target, args, script, model, mixture = parser.parse_args_and_config(list(argv), fail_with_unknown_args=True)
    if model.model_name_or_path is None:
        raise UserError("--model_name_or_path: needed.")
    if not mixture.datasets and script.dataset_name is None:
        raise UserError("--dataset_name, or datasets in the file of --config: needed.")
    mixed = get_dataset(mixture) if mixture.datasets else None
    splits = [script.dataset_train_split, *([script.dataset_test_split] if args.eval_strategy != "no" else [])]
    rows = [_rows(script, split) if mixed is None else _split(mixed, split) for split in splits]
    for some, split in zip(rows, splits, strict=True):
        where = f"{'--dataset_name' if mixed is None else 'datasets'}, split {split!r}"
        _check_columns(kind, some, where, getattr(args, "dataset_text_field", "text"))
    clean = None if target.target is None else load_rows(target.target, target.target_split, "--target")
    return _trainer(kind, args, model, rows[0], clean, *rows[1:])


def _check_columns(kind: str, rows: Any, where: str, text: str) -> None:
    """See that rows are in a form that the trainer takes, whole.

    Args:
        where (`str`): what an error calls them.
        text (`str`): the column of plain texts.

    Raises:
        UserError: they are not.
    """
    columns = rows.column_names or ()  # of a stream they may not be known
    forms = (("chosen", "rejected"),) if kind == "dpo" else (
        ("prompt", "completion"), ("messages",), ("conversations",), (text,), ("input_ids",)
    )  # fmt: skip
    there = [form for form in forms if {*form} <= {*columns}]
    if columns and not there:
        allowed = "; ".join(" and ".join(form) for form in forms)
        raise UserError(f"{where}: the columns are {', '.join(sorted(columns))}. They must hold {allowed}.")
    gaps = [gap for form in there if (gap := _first_gap(rows, form))]
    if there and len(gaps) == len(there):
        number, name = gaps[0]
        raise UserError(
            f"{where}: row {number + 1} has nothing in its column {name}. Leave the row out, or put rows of other "
            "forms in files of their own."
        )


def _first_gap(rows: Any, names: Sequence[str]) -> tuple[int, str] | None:
    """The first row that has nothing in one of these columns, and the column; of a stream none is looked for."""
    from datasets import Dataset

    for name in names if isinstance(rows, Dataset) else ():
        column = rows.select_columns([name]).with_format("arrow")[:].column(name)
        if column.null_count:
            return column.is_null().to_pylist().index(True), name
    return None


def _split(mixed: Any, split: str) -> Any:
    if split not in mixed:
        raise UserError(
            f"datasets: there is no split {split!r}; there are {', '.join(mixed)}. Training rows are those of "
            "--dataset_train_split, and with --eval_strategy those of --dataset_test_split are evaluated "
            "(test_split_size makes some)."
        )
    return mixed[split]


def _rows(script: Any, split: str) -> Any:
    """A split of a local file, or of a data set that `datasets` loads by its name."""
    from datasets import load_dataset

    from ..tools.score.rows import load_rows

    place = Path(script.dataset_name)
    file = place.is_file()
    if (file or (place / "state.json").is_file()) and split != script.dataset_train_split:
        raise UserError(
            f"--dataset_name {script.dataset_name}: is one data set, which has no split {split!r} to evaluate. "
            "Give a folder of splits or a hub id that has one, or leave --eval_strategy out."
        )
    if (script.dataset_config is None and not script.dataset_streaming) or file:
        return load_rows(script.dataset_name, split, "--dataset_name")
    options = {"name": script.dataset_config, "streaming": script.dataset_streaming}
    return load_dataset(script.dataset_name, split=split, **options)


def _trainer(kind: str, args: Any, model: Any, rows: Any, target: Any, judged: Any = None) -> Any:
    from trl import get_peft_config, get_quantization_config

    from .trainers import AlphaTokenDPOTrainer, AlphaTokenSFTTrainer

    init = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    args.model_init_kwargs = {**init, **(args.model_init_kwargs or {})}
    cls = AlphaTokenDPOTrainer if kind == "dpo" else AlphaTokenSFTTrainer
    return cls(
        model.model_name_or_path,
        args=args,
        train_dataset=rows,
        eval_dataset=judged,
        target_dataset=target,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def _group(parser: argparse.ArgumentParser, groups: dict[str, tuple[type, ...]]) -> None:
    """Show the options of a parser in groups: each in the first group with a dataclass that has it."""
    actions = [action for action in parser._actions if action.dest != "help"]
    for title, types in groups.items():
        names = {each.name for cls in types for each in fields(cls)}
        group = parser.add_argument_group(title)
        for action in [action for action in actions if action.dest in names]:
            actions.remove(action)
            for other in parser._action_groups:
                if action in other._group_actions:
                    other._group_actions.remove(action)
            group._group_actions.append(action)
