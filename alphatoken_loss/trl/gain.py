"""What the path to theta* gains in a trainer's own rows, before it trains."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..batches.read import read_batch
from ..tools.gain import SharedGain, shared_gain
from .arguments import check_gain
from .target import TargetRows

logger = get_logger(__name__)


class FoundRho(TrainerCallback, ExportableState):
    """Keeps the rho that was found in the trainer's own state, which every checkpoint holds."""

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def state(self) -> dict[str, Any]:
        return {"args": {"rho": self.rho}, "attributes": {"rho": self.rho}}


class GainOfRows(TargetRows):
    """The part of [`AlphaTokenMixin`] that compares training rows with the target."""

    _found_rho: float | None = None

    def get_train_dataloader(self) -> Any:
        gate = self._gate
        if self.alphatoken_args.gain_rows and self.is_in_train and gate is not None and self._found_rho is None:
            if self.args.auto_find_batch_size:
                gate.source.limit_rows(self._train_batch_size)
            try:
                gain = self.shared_gain(self.alphatoken_args.gain_rows)
            except ValueError as error:
                error.args = (f"{error} Or set gain_rows=0, which leaves rho as it is.",)
                raise
            logger.warning(f"rho is {gain.rho:.2f}. {gain}")
            self._take_rho(gain.rho)
        return super().get_train_dataloader()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.alphatoken_args.gain_rows and self._gate is not None and self._found_rho is None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            kept = (state.stateful_callbacks or {}).get(FoundRho.__name__)
            if kept is None:
                raise ValueError(
                    f"gain_rows is {self.alphatoken_args.gain_rows}, by which rho is found when training begins, and "
                    f"{resume_from_checkpoint} does not tell what was found. Set gain_rows=0, and rho to what the run "
                    "that wrote it said in its log."
                )
            self._take_rho(kept["attributes"]["rho"])
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _take_rho(self, rho: float) -> None:
        """Train with this share of tokens from now on, and with the KL in the same balance to their loss."""
        gate = self._gate
        assert gate is not None
        config = gate.config
        self._make_gate(replace(config, rho=rho, path_kl=config.path_kl * rho / config.rho))
        self._found_rho = rho
        self.add_callback(FoundRho(rho))

    def _check_gain_rows(self, valued: bool) -> None:
        """Check that rho can be found, if it is to be.

        Raises:
            ValueError: it cannot.
        """
        if not self.alphatoken_args.gain_rows:
            return
        check_gain(self.alphatoken_args)  # they may have been changed since
        asked = f"gain_rows is {self.alphatoken_args.gain_rows}, by which rho is found, but"
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
