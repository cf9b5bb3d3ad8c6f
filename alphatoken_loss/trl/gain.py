"""What the path to theta* gains in a trainer's own rows, before it trains."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from datasets import Dataset

from ..batches.read import read_batch
from ..gate import AlphaToken
from ..tools.gain import SharedGain, shared_gain
from .target import TargetRows


class GainOfRows(TargetRows):
    """The part of [`AlphaTokenMixin`] that compares training rows with the target."""

    _gate: AlphaToken | None
    _prepare_inputs: Any
    _train_batch_size: int

    def shared_gain(self, rows: int = 64) -> SharedGain:
        """`shared_gain` of the target, and of some of the training rows: drawn by the seed, of a stream the first.

        Args:
            rows (`int`): how many of them.

        Returns:
            [`SharedGain`]; its `rho` is what to train with.

        Raises:
            ValueError: the trainer values no tokens, its target is no batches, or a target or the rows are pairs.

        Example:
            >>> print(gain := trainer.shared_gain())
            >>> args = AlphaTokenSFTConfig(..., rho=gain.rho)  # and the trainer made anew
        """
        gate = self._gate
        if gate is None or gate.source.batches is None:
            raise ValueError(
                "There is no target to compare training rows with: rho is 1, tokens are not chosen by their values, or "
                "the data bring path_logps. Make the trainer with rho below 1 and a target_dataset."
            )
        if any(read_batch(batch).pairs for batch in gate.source.batches):
            raise ValueError(
                "The target is of preference pairs, and so are the rows: shared_gain compares answers in SFT form. Ask "
                "alphatoken_loss.shared_gain with batches of chosen answers; tokens of pairs are chosen by their sign "
                "(best(pairs=True)), not by a share."
            )
        data = self.train_dataset
        if isinstance(data, Dataset) and self.args.remove_unused_columns:
            data = self._remove_unused_columns(data, "training")
        if hasattr(data, "__len__"):
            places = random.Random(self.args.seed).sample(range(len(data)), min(rows, len(data)))
            drawn = [data[place] for place in self._share(places)]
        else:
            drawn = list(islice(data, self.accelerator.process_index, rows, self.accelerator.num_processes))
        size = self._train_batch_size
        batches = [
            self.alphatoken_batch(self._prepare_inputs(self.data_collator(drawn[start : start + size])))
            for start in range(0, len(drawn), size)
        ]
        with self._as_in_a_step():
            return shared_gain(self.model, gate.source.batches, batches, config=gate.config, progress=self._shows)
