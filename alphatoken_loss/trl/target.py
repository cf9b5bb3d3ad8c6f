"""The target of a trainer: rows held out of the training data, or a data set of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import Subset
from trl import DPOTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..tools.score.rows import prepared_by_trl
from .columns import tokenised_pairs
from .running import Running

logger = get_logger(__name__)


class TargetRows(Running):
    """The part of [`AlphaTokenMixin`] that makes batches of the target."""

    def _target_batches(self, dataset: Dataset | None) -> Iterator[Mapping[str, Any]]:
        """The target, as this process' share of collated batches."""
        collate: Any
        if dataset is None:
            rows, collate = self._held_out_rows(), self.data_collator
        elif isinstance(dataset, Dataset) and len(dataset) and _holds_pairs(dataset):
            rows, collate = self._pair_rows(dataset), self.data_collator
        else:
            rows, collate = self._sft_rows(dataset)
        share = self._share(range(len(rows)))
        size = self.alphatoken_args.target_batch_size or self.args.per_device_train_batch_size
        for start in range(0, len(share), size):
            yield self.alphatoken_batch(collate([rows[i] for i in share[start : start + size]]))

    def _held_out_rows(self) -> Any:
        """Take rows out of the training data, the same ones for the same seed; both parts keep their order."""
        size = self.alphatoken_args.target_size
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"train_dataset is a {type(self.train_dataset).__name__}, a stream, of which no slice can be held out "
                "as the target. Pass target_dataset, a Dataset of clean examples of the target task."
            )
        count = len(self.train_dataset)
        if count <= size:
            raise ValueError(
                f"train_dataset has {count} rows and target_size is {size}, which leaves none to train on. Lower "
                "target_size, or pass target_dataset."
            )
        logger.warning(
            f"{size} of {count} training rows are held out as the target of token values. Pass target_dataset, "
            "clean examples of the target task, to train on all rows."
        )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        held_out, rest = sorted(order[:size]), sorted(order[size:])
        if not isinstance(self.train_dataset, Dataset):
            held, self.train_dataset = Subset(self.train_dataset, held_out), Subset(self.train_dataset, rest)
            return held
        held, self.train_dataset = self.train_dataset.select(held_out), self.train_dataset.select(rest)
        return self._remove_unused_columns(held, "target") if self.args.remove_unused_columns else held

    def _read_as(self, dataset: Dataset) -> tuple[Any, str]:
        """The training data's formatting function, if the target has its columns, and the name of the text column.

        Raises:
            ValueError: the target is empty, or has no columns that can be read.
        """
        columns = set(dataset.column_names)
        if not len(dataset):
            raise ValueError("target_dataset has no rows. Pass some, or None to hold training rows out.")
        formatting = getattr(self, "_formatting_func", None)
        raw = self._raw_rows  # of the training data, before the trainer prepared it
        if formatting is not None and raw is not None and set(get_dataset_column_names(raw)) <= columns:
            return formatting, "text"
        for known in ({"input_ids"}, {"prompt", "completion"}, {"messages"}, {"conversations"}):
            if known <= columns:
                return None, "text"
        for field in (getattr(self.args, "dataset_text_field", "text"), "text"):
            if field in columns:
                return None, field
        raise ValueError(
            f"target_dataset has the columns {', '.join(sorted(columns))}. They must hold prompt and completion; "
            "messages; text (or dataset_text_field); input_ids and labels; or, with a formatting_func, all columns of "
            "the training data."
        )

    def _pair_rows(self, dataset: Dataset) -> Dataset:
        """Preference pairs, prepared by TRL as for training.

        Raises:
            ValueError: the trainer or its estimator has no use for pairs, or none is left within `max_length`.
        """
        pairs, answers = "target_dataset holds preference pairs", "the answers that are to be learned, as prompt and "
        if not isinstance(self, DPOTrainer):
            raise ValueError(
                f"{pairs}, and {type(self).__name__} has no loss for them. Pass {answers}completion or as messages, or "
                'use AlphaTokenDPOTrainer with estimator="path".'
            )
        estimator = self.alphatoken_args.estimator
        if estimator != "path":
            raise ValueError(
                f'{pairs}, of which estimator="{estimator}" would see the chosen answers alone. Pass {answers}'
                'completion or as messages, or set estimator="path".'
            )
        rows = self._prepare_dataset(dataset, self.processing_class, self.args, "target")
        if len(rows) < len(dataset):
            self._tell_cut(dataset, rows, "pairs")
        return self._remove_unused_columns(rows, "target") if self.args.remove_unused_columns else rows

    def _tell_cut(self, dataset: Dataset, rows: Dataset, what: str) -> None:
        """Warn if some rows have no response token left after truncation.

        Raises:
            ValueError: no row has one.
        """
        mode = getattr(self.args, "truncation_mode", "keep_start")
        cut = (
            f"{len(dataset) - len(rows)} of {len(dataset)} target {what} have no response token within "
            f"max_length={self.args.max_length} (truncation_mode={mode!r}) and are left out"
        )
        if not len(rows):
            raise ValueError(f"{cut}, so there is no target. Raise max_length, or pass rows of shorter prompts.")
        logger.warning(f"{cut}.")

    def _sft_rows(self, dataset: Any) -> tuple[Dataset, DataCollatorForLanguageModeling]:
        """Rows in SFT form, tokenised by TRL as for training but not packed, and a collator for them."""
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"target_dataset is a {type(dataset).__name__}; it must be a datasets.Dataset in SFT form: "
                "prompt-completion, conversational, text, or tokenised."
            )
        tokenizer = getattr(self, "_tokenizer", self.processing_class)
        formatting, text_field = self._read_as(dataset)
        first = next(iter(dataset))
        completion_only = getattr(self.args, "completion_only_loss", None)
        names = ("dataset_num_proc", "max_length", "assistant_only_loss", "truncation_mode")
        rows = prepared_by_trl(
            dataset,
            tokenizer,
            answers_only="prompt" in first if completion_only is None else completion_only,
            about="target",
            processing=self.processing_class,
            template=getattr(self, "chat_template", None),
            formatting=formatting,
            dataset_text_field=text_field,
            **{name: getattr(self.args, name) for name in names if hasattr(self.args, name)},
        )
        if len(rows) < len(dataset):
            self._tell_cut(dataset, rows, "rows")
        return rows, DataCollatorForLanguageModeling(pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0)


def _holds_pairs(dataset: Dataset) -> bool:
    return {"chosen", "rejected"} <= set(dataset.column_names) or tokenised_pairs(dataset)
