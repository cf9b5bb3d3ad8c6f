"""How the parts of the mixin run the model outside of training steps, and share work between processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..models.modes import autocast_without_cache

_Trainer: Any = object


class Running(_Trainer):
    """What the parts of [`AlphaTokenMixin`] have in common."""

    args: Any
    accelerator: Any
    model: Any

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
