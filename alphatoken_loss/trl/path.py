"""The training data's log-probabilities at theta*, computed once, as TRL precomputes those of a reference.

When training starts, theta* is made, and a forward at theta* gives each token of the prepared rows its log-probability.
The column `path_logps` brings them to the batches, so that a step needs no second forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..directions.follow import make_path
from ..directions.path import Path
from ..estimators.path import COLUMN, check_column, check_whole
from ..gate.alphatoken import AlphaToken
from ..models.sites import find_scored
from .columns import BRANCHES, columns_in, numbered, places_of
from .running import Running

logger = get_logger(__name__)


class PathColumn(Running):
    """The part of [`AlphaTokenMixin`] that adds `path_logps` to the training data."""

    @property
    def _has_path_column(self) -> bool:
        return bool(columns_in(self.train_dataset, (COLUMN,)))

    def get_train_dataloader(self) -> Any:
        gate = self._gate
        if gate is not None and self.alphatoken_args.precompute_path_log_probs and not self._has_path_column:
            self._add_path_column(gate)
        return super().get_train_dataloader()

    def _check_path_column(self, target_dataset: Any, valued: bool) -> None:
        """Check that `path_logps`, from the data or computed here, can be used.

        Raises:
            ValueError: they cannot.
        """
        args, brought = self.alphatoken_args, self._has_path_column
        if brought and args.estimator == "path":
            check_column(args.alphatoken_config, None)
            if target_dataset is not None:
                raise ValueError(
                    "The training data bring path_logps, computed at a theta* that was made before, and target_dataset "
                    "would lead to another. Take the column out with remove_columns, or leave target_dataset out."
                )
        if not args.precompute_path_log_probs:
            return
        if not valued:
            raise ValueError(
                "precompute_path_log_probs is True, but tokens are not chosen by their values, so there is no theta*. "
                "Set it to False, or leave out selection and token weights."
            )
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"precompute_path_log_probs is True, but train_dataset is a {type(self.train_dataset).__name__}, to "
                "which no column can be added. Pass a datasets.Dataset, or set it to False."
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "precompute_path_log_probs is not offered under DeepSpeed, which places the model only after the data "
                "are read. Set it to False, or train without DeepSpeed."
            )

    def _add_path_column(self, gate: AlphaToken) -> None:
        """Make theta*, if there is none yet, and the column."""
        noisy = sorted({name for name, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0})
        if noisy and gate.config.path_from == "present":
            logger.warning(
                f"The model has dropout ({noisy[0]}), so each step's own log-probabilities have its noise and those at "
                "theta*, computed once, have none: values are noisier and lower than with a forward at each step. Set "
                "lora_dropout=0."
            )
        with self._as_in_a_step():
            self._make_ready(gate)
            source = gate.source
            check_whole(self.model, find_scored(self.model, gate.config.scored_layers, gate.config.scope))
            if source.path is None:
                assert source.batches is not None
                options: dict[str, Any] = {"fisher": source.drift_fisher, "config": gate.config}
                options["progress"] = self._shows
                source.path = make_path(self.model, source.batches, ref_model=source.ref_model, **options)
            columns = self._path_logps(source.path)
            source.path = source.path.to(torch.device("cpu"))  # for checkpoints; steps do not need it
        for name, column in columns.items():
            self.train_dataset = self.train_dataset.add_column(name, column)
        self._collate_columns()

    def _path_logps(self, path: Path) -> dict[str, list[np.ndarray]]:
        """Name of a column -> each row's log-probabilities at theta*. Every process computes a share of the rows."""
        rows, size, count = self.train_dataset, self._train_batch_size, self.accelerator.num_processes
        if self.args.remove_unused_columns:
            rows = self._remove_unused_columns(rows, "training")
        if not set(BRANCHES) & set(rows.column_names):
            raise ValueError(
                f"precompute_path_log_probs is True, but training rows have the columns {sorted(rows.column_names)}, "
                "none of them token ids that a column could go along with. Set it to False."
            )
        starts = range(self.accelerator.process_index * size, len(rows), count * size)
        found: dict[int, dict[str, np.ndarray]] = {}
        for start in tqdm(starts, desc="Path log-probs", unit="batch", disable=not self._shows):
            some = [rows[i] for i in range(start, min(start + size, len(rows)))]
            found |= dict(enumerate(self._logps_of(some, path), start))
        shares = gather_object([found])
        whole = {i: row for share in shares for i, row in share.items()}
        names = whole[0] if whole else {}
        return {name: [whole[i][name] for i in range(len(rows))] for name in names}

    def _logps_of(self, rows: list[dict[str, Any]], path: Path) -> list[dict[str, np.ndarray]]:
        """Those of some rows, collated as in training. Each token's number says where the collator put it."""
        batch = self._prepare_inputs(self.data_collator(rows))
        logps = path.logps(self.model, self.alphatoken_batch(batch)).float().cpu()
        renumbered, ranges, total = numbered(rows)
        places = places_of(self.data_collator(renumbered))
        flat = torch.zeros(total)
        flat[places[places >= 0]] = logps[places >= 0]
        numbers = flat.numpy()
        return [
            {
                f"{BRANCHES[ids]}{COLUMN}": numbers[span.start : span.stop]
                for ids, span in where.items()
                if ids in BRANCHES
            }
            for where in ranges
        ]
