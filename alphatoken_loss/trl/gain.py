"""What the path to theta* gains in a trainer's own rows, before it trains."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from ..batches.read import read_batch
from ..gate import AlphaToken
from ..tools.gain import SharedGain, shared_gain
from .arguments import AlphaTokenArguments
from .target import TargetRows

logger = get_logger(__name__)


class GainOfRows(TargetRows):
    """The part of [`AlphaTokenMixin`] that compares training rows with the target."""

    alphatoken: AlphaToken | None
    alphatoken_args: AlphaTokenArguments
    train_dataset: Any
    _gate: AlphaToken | None
    _gate_options: dict[str, Any]
    _has_path_column: Any
    _make_gate: Any
    _make_ready: Any
    _prepare_inputs: Any
    _train_batch_size: int
    _rho_is_found = False

    def get_train_dataloader(self) -> Any:
        gate, rows = self._gate, self.alphatoken_args.gain_rows
        if rows and gate is not None and not self._rho_is_found:
            self._make_ready(gate)
            gain = self.shared_gain(rows)
            logger.warning(f"rho is {gain.rho:.2f}, by {rows} training rows: {gain}")
            self._take_rho(gain.rho)
        return super().get_train_dataloader()

    def _take_rho(self, rho: float) -> AlphaToken:
        """Train with this share of tokens from now on, and with the KL in the same balance to their loss."""
        gate = self._gate
        assert gate is not None
        config = gate.config
        self._gate_options["fisher"] = gate.source.fisher
        self._make_gate(replace(config, rho=rho, path_kl=config.path_kl * rho / config.rho))
        self._rho_is_found = True
        assert self.alphatoken is not None
        return self.alphatoken

    def _check_gain_rows(self, valued: bool) -> None:
        """Check that rho can be found, if it is to be.

        Raises:
            ValueError: it cannot.
        """
        asked = f"gain_rows is {self.alphatoken_args.gain_rows}, by which rho is found, but"
        if not self.alphatoken_args.gain_rows:
            return
        if not valued:
            raise ValueError(f"{asked} token weights were given. Set gain_rows=0, or leave them out.")
        if self._has_path_column:
            raise ValueError(
                f"{asked} the training data bring path_logps, so there is no target to compare them with. Set "
                "gain_rows=0, and rho to what shared_gain told before."
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"{asked} under DeepSpeed the model is placed only after the data are read. Set gain_rows=0, and rho "
                "to what alphatoken_loss.shared_gain tells of the model before."
            )

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
            >>> args = AlphaTokenSFTConfig.best(..., rho=gain.rho)  # and the trainer made anew; or gain_rows=rows
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
