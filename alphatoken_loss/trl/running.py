"""How the parts of the mixin run the model outside of training steps, and share work between processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..gate.alphatoken import AlphaToken
from ..models.modes import autocast_without_cache
from .arguments import AlphaTokenArguments

_Trainer: Any = object  # what the mixin is put in front of: the parts use its attributes


class Running(_Trainer):
    """What the parts of [`AlphaTokenMixin`] have in common."""

    alphatoken: AlphaToken | None = None
    alphatoken_args: AlphaTokenArguments
    data_collator: Any
    train_dataset: Any

    @property
    def _gate(self) -> AlphaToken | None:
        """The `AlphaToken` if it masks, else None."""
        return None if self.alphatoken is None or self.alphatoken.config.off else self.alphatoken

    @property
    def _shows(self) -> bool:
        """Whether this process shows progress."""
        return self.accelerator.is_local_main_process and not self.args.disable_tqdm

    def _share(self, items: Any) -> Any:
        """This process' share of a sequence; all of it, if there are fewer items than processes."""
        count = self.accelerator.num_processes
        return items[self.accelerator.process_index :: count] if len(items) >= count else items

    @contextlib.contextmanager
    def _as_in_a_step(self) -> Iterator[None]:
        """The model checkpointed, with the backward of 4-bit linears, and under autocast, as a step runs it."""
        training = self.model.training
        self.model.train()
        try:
            with self.accelerator.autocast(), autocast_without_cache(self.accelerator.device.type):
                yield
        finally:
            self.model.train(training)
