"""Brings a number per token from the data set to the batch, as a trainer prepares, cuts, packs and collates.

Rows have a column beside their token ids. When TRL has tokenised them, each column is aligned with the ids, and is cut
and packed as they are. To collate, the collator is called twice. The second time each id is replaced by the number of
its token, so that the output says where each token went.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names, pack_dataset

from ..batches.batch import IGNORE
from ..batches.read import COLUMNS, REFERENCE_LOGPS
from .running import Running

# Key of token ids in a row -> prefix of their columns: for preference pairs, KTO and (below) SFT.
_COMPLETIONS = {"chosen_ids": "chosen_", "rejected_ids": "rejected_", "completion_ids": ""}
BRANCHES = {"input_ids": "", **_COMPLETIONS}
_FIRST = 2**40  # above every token id


class TokenColumns(Running):
    """The part of [`AlphaTokenMixin`] that brings columns of the data set to the batches.

    Attributes:
        token_columns (`tuple`): the columns that are brought to the batches, if rows have them.
    """

    token_columns: tuple[str, ...] = COLUMNS

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, *rest: Any) -> Any:
        if isinstance(self, SFTTrainer):
            names = columns_in(dataset, self.token_columns)
            if names:
                return self._prepare_sft(dataset, names, tokenizer, args, *rest)
            return super()._prepare_dataset(dataset, tokenizer, args, *rest)
        if tokenised_pairs(dataset):
            dataset = dataset.map(_ids_of_pair, fn_kwargs={"column": self.token_columns[:1]})
            if args.max_length is not None and args.truncation_mode == "keep_start":  # as TRL does
                dataset = dataset.filter(_completed, fn_kwargs={"length": args.max_length})
        else:
            dataset = super()._prepare_dataset(dataset, tokenizer, args, *rest)
        names = columns_in(dataset, self.token_columns)
        return aligned(dataset, names, args.dataset_num_proc) if names else dataset

    def _prepare_sft(
        self, dataset: Any, names: list[str], tokenizer: Any, args: Any, packing: bool, formatting: Any, about: str
    ) -> Any:
        """Let TRL tokenise, align the columns with the ids, and cut or pack both as TRL does."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        if "response_mask" in get_dataset_column_names(dataset):  # written by `score`: only kept tokens have labels
            dataset = dataset.map(_whole_labels)
        rows = super()._prepare_dataset(dataset, tokenizer, whole, False, formatting, about)
        rows = aligned(rows, names, args.dataset_num_proc)
        if not packing:
            rows = super()._prepare_dataset(rows, tokenizer, args, False, None, about)
            return rows.map(_cut, fn_kwargs={"names": names, "from_start": args.truncation_mode == "keep_start"})
        if args.max_length is None:
            raise ValueError("When packing is enabled, `max_length` can't be `None`.")
        rows = rows.select_columns(["input_ids", "labels", *names])
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        options = {"num_proc": args.dataset_num_proc} if isinstance(rows, Dataset) else {}
        rows = pack_dataset(rows, args.max_length, args.packing_strategy, options)
        return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names = [f"{prefix}{name}" for name in self.token_columns for prefix in ("", "chosen_", "rejected_")]
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    def _collate_columns(self) -> None:
        """When rows are prepared: let the collator lay out the columns that they have."""
        known = isinstance(self.data_collator, ColumnCollator)
        if columns_in(self.train_dataset, self.token_columns) and not known:
            self.data_collator = ColumnCollator(self.data_collator, self.token_columns)

    def _without_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch without the columns, for the trainer's own loss."""
        if not any(name in inputs for name in self.token_columns):
            return inputs
        return {key: value for key, value in inputs.items() if key not in self.token_columns}

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(model, self._without_columns(inputs))


def without_damped_sums(batch: Mapping[str, Any], args: Any) -> Mapping[str, Any]:
    """The batch without TRL's precomputed reference sums if, with `ld_alpha`, they are no log-probabilities of answers:
    TRL damps the end of the longer answer in them."""
    if getattr(args, "ld_alpha", None) is None:
        return batch
    return {name: value for name, value in batch.items() if name not in REFERENCE_LOGPS}


def columns_in(dataset: Any, names: Sequence[str]) -> list[str]:
    """Those columns that a data set has, by their names there (`chosen_*` and `rejected_*` too)."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return []
    present = set(get_dataset_column_names(dataset))
    return [
        f"{prefix}{name}" for name in names for prefix in ("", "chosen_", "rejected_") if f"{prefix}{name}" in present
    ]


def aligned(rows: Any, names: list[str], num_proc: int | None = None) -> Any:
    """Tokenised rows with each column aligned with their ids: a number per id, 0 for prompts.

    Raises:
        ValueError: a column has neither the length of the row nor that of its completion, has a number that is not
            finite, is not 0 where there is no label, or is 0 in every row.
    """
    options: dict[str, Any] = {"num_proc": num_proc} if isinstance(rows, Dataset) else {}
    rows = rows.map(_align, with_indices=True, fn_kwargs={"names": names}, **options)
    if isinstance(rows, Dataset) and len(rows) and not any(_something(rows, name) for name in names):
        raise ValueError(
            f"{' and '.join(names)}: 0 for every token of all {len(rows)} rows, so there is nothing to train on."
        )
    return rows


def _something(rows: Dataset, name: str) -> bool:
    parts = rows.select_columns([name]).with_format("arrow").iter(batch_size=1000)
    return any(pc.any(pc.not_equal(pc.list_flatten(part[name]), 0)).as_py() for part in parts)


def _align(row: dict[str, Any], index: int, names: list[str]) -> dict[str, Any]:
    return {name: _along(row, index, name) for name in names}


def _along(row: dict[str, Any], index: int, name: str) -> list[float]:
    numbers = row[name]
    branch = next((ids for ids, prefix in _COMPLETIONS.items() if ids in row and name.startswith(prefix)), None)
    if branch is not None:
        prompt, completion = len(row["prompt_ids"]), len(row[branch])
        length, labelled = prompt + completion, [False] * prompt + [True] * completion
    elif "input_ids" in row:
        labels = row["labels"]
        length, labelled = len(labels), [label != IGNORE for label in labels]
        completion = sum(row["completion_mask"]) if "completion_mask" in row else sum(labelled)
    else:
        raise ValueError(f"Row {index} has a column {name}, but no token ids that belong to it: {sorted(row)}.")
    if numbers is None or len(numbers) not in (length, completion):
        found = "nothing" if numbers is None else f"{len(numbers)} numbers"
        raise ValueError(
            f"Row {index}: {name} holds {found}, but the row has {length} tokens, {completion} of them in its "
            "completion (with the end-of-sequence token that TRL adds). Give one number per token of either."
        )
    numbers = [float(number) for number in numbers]
    if len(numbers) != length:
        places = row.get("completion_mask", labelled) if branch is None else labelled
        following = iter(numbers)
        numbers = [next(following) if inside else 0.0 for inside in places]
    if not all(abs(number) < float("inf") for number in numbers):
        raise ValueError(f"Row {index}: {name} holds a number that is not finite. A token to be left out has weight 0.")
    beside = next(
        (i for i, (number, inside) in enumerate(zip(numbers, labelled, strict=True)) if number and not inside), None
    )
    if beside is not None:
        raise ValueError(
            f"Row {index}: {name} is {numbers[beside]:g} for token {beside}, which is part of the prompt and is not "
            "trained on. Set it to 0 there, or give one number per token of the completion."
        )
    return numbers


def _whole_labels(row: dict[str, Any]) -> dict[str, Any]:
    ids = zip(row["input_ids"], row["response_mask"], strict=True)
    return {"labels": [token if inside else IGNORE for token, inside in ids]}


def tokenised_pairs(dataset: Any) -> bool:
    columns = set(get_dataset_column_names(dataset))
    return {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns or {"chosen_input_ids", "chosen_labels"} <= columns


def _completed(row: dict[str, Any], length: int) -> bool:
    return len(row["prompt_ids"]) < length


def _ids_of_pair(row: dict[str, Any], column: Sequence[str]) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of a row that has whole sequences with labels, as `score` writes.

    Without weights, a token with a label gets 1, another 0.
    """
    if "prompt_ids" in row:
        return {}
    branches = ("chosen", "rejected")
    first, second = (row[f"{branch}_input_ids"] for branch in branches)
    inside = {branch: row.get(f"{branch}_response_mask") for branch in branches}
    labelled = {branch: [label != IGNORE for label in row[f"{branch}_labels"]] for branch in branches}
    starts = [
        next((i for i, is_in in enumerate(inside[b] or labelled[b]) if is_in), len(labelled[b])) for b in branches
    ]
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    prompt = min(common, *starts)
    found: dict[str, Any] = {"prompt_ids": first[:prompt]}
    for branch, ids in zip(branches, (first, second), strict=True):
        found[f"{branch}_ids"] = ids[prompt:]
        for name in column:
            if f"{branch}_{name}" not in row:
                found[f"{branch}_{name}"] = [float(is_in) for is_in in labelled[branch][prompt:]]
    return found


def _cut(row: dict[str, Any], names: list[str], from_start: bool) -> dict[str, Any]:
    """Cut columns to the ids that TRL left."""
    length = len(row["input_ids"])
    return {name: row[name][:length] if from_start else row[name][len(row[name]) - length :] for name in names}


def numbered(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, range]], int]:
    """Rows with token numbers in the place of ids; each row's numbers, by the key of these ids; and their count."""
    count, renumbered, ranges = 0, [], []
    for row in rows:
        row, where = dict(row), {}
        for ids in ("prompt_ids", *BRANCHES):
            if ids in row:
                where[ids] = range(count, count + len(row[ids]))
                row[ids] = [_FIRST + number for number in where[ids]]
                count += len(row[ids])
        if "KL_completion_ids" in row:  # KTO's other completions, which have no weights
            row["KL_completion_ids"] = [_FIRST] * len(row["KL_completion_ids"])
        renumbered.append(row)
        ranges.append(where)
    return renumbered, ranges, count


def places_of(batch: dict[str, Any]) -> torch.Tensor:
    """The token number at each place of a batch of such rows, below 0 where there is no token."""
    return batch["input_ids"] - _FIRST


class ColumnCollator:
    """A collator that lays columns out as it lays out token ids, whatever it does with these.

    Args:
        collator (`Callable`): the trainer's own, which puts `input_ids` into its batches.
        names (`Sequence[str]`): columns; in a batch they have the shape of `input_ids`, and are 0 without a token.
    """

    def __init__(self, collator: Callable[..., Any], names: Sequence[str]) -> None:
        self.collator, self.names = collator, tuple(names)

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "names"):  # while it is being unpickled by a worker
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        prefixes = ("", "chosen_", "rejected_")
        carried = [name for name in self.names if any(f"{prefix}{name}" in examples[0] for prefix in prefixes)]
        if not carried:
            return self.collator(examples, *args, **kwargs)
        beside = {f"{prefix}{name}" for name in carried for prefix in prefixes}
        plain = [{key: value for key, value in row.items() if key not in beside} for row in examples]
        batch = self.collator(plain, *args, **kwargs)
        renumbered, ranges, _ = numbered(plain)
        places = places_of(self.collator(renumbered, *args, **kwargs))
        for name in carried:
            numbers: list[float] = []
            for example, where in zip(examples, ranges, strict=True):
                for ids, span in where.items():
                    column = example.get(f"{BRANCHES[ids]}{name}") if ids in BRANCHES else None
                    numbers += self._behind(name, len(span), column)
            flat = torch.tensor(numbers, dtype=torch.float32)
            batch[name] = flat[places.clamp(min=0)].masked_fill(places < 0, 0)
        return batch

    @staticmethod
    def _behind(name: str, length: int, column: Sequence[float] | None) -> list[float]:
        """The part of a column for the ids at the end of a row; 0s without a column."""
        if column is None:
            return [0.0] * length
        if len(column) < length:
            raise ValueError(
                f"A row has {length} tokens and {len(column)} numbers in its column {name}. Give one number per token "
                "of input_ids; a trainer that prepares its rows itself also takes one per token of the completion."
            )
        return list(column[len(column) - length :])
