"""The Fisher of a trainer: estimated from prompts of its training data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..directions.estimate import estimate_fisher
from ..directions.fisher import Fisher
from .checkpoints import FISHER_FILE
from .running import Running


class FisherOfPrompts(Running):
    """The part of [`AlphaTokenMixin`] that estimates the Fisher when training starts."""

    def _estimate_fisher(self) -> Fisher:
        assert self.alphatoken is not None
        args = self.alphatoken_args
        prompts = self._share(list(self._prompts(args.fisher_prompts)))
        found = self.args.auto_find_batch_size  # a size that ran out of memory is tried again, smaller
        fisher = estimate_fisher(
            self.model,
            prompts,
            tokenizer=getattr(self, "_tokenizer", self.processing_class),
            ref_model=self._alphatoken_ref,
            config=self.alphatoken.config,
            batch_size=min(args.fisher_batch_size, self._train_batch_size) if found else args.fisher_batch_size,
            max_new_tokens=args.fisher_new_tokens,
            max_prompt_length=args.fisher_prompt_length,
            seed=self.args.seed,
            progress=self._shows,
        )
        if self.args.should_save:
            fisher.save(Path(self.args.output_dir) / FISHER_FILE)
        return fisher

    def _prompts(self, count: int) -> Iterator[list[int]]:
        """Token ids of prompts in the training data; if a row has no prompt, its first half."""
        rows: Any = self.train_dataset
        if hasattr(rows, "__len__"):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed)).tolist()
            rows = (self.train_dataset[i] for i in order)
        for row in itertools.islice(rows, count):
            prompt = row.get("prompt_ids", row.get("prompt_input_ids"))
            if prompt is None and "input_ids" in row:
                ids = row["input_ids"][: row["seq_lengths"][0]] if "seq_lengths" in row else row["input_ids"]
                labels = row.get("labels", ids)[: len(ids)]
                start = next((i for i, label in enumerate(labels) if label != -100), 0)
                prompt = ids[: start or (len(ids) + 1) // 2]
            if prompt is None:
                raise ValueError(
                    f"No prompts for the Fisher can be read from training rows with the columns {sorted(row)}. Pass "
                    "fisher, made with estimate_fisher(model, prompts), or set stability_weight=0."
                )
            if len(prompt):
                yield list(prompt)
