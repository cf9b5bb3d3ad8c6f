"""What chooses the tokens that a trainer trains on: values, another selection, or weights that come with the data."""

from __future__ import annotations

import hashlib
from typing import Any

from accelerate.logging import get_logger
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from ..batches.read import COLUMNS
from ..models.start import has_adapters
from ..selection.base import Selection
from .columns import columns_in
from .running import Running

logger = get_logger(__name__)


class Selecting(Running):
    """The part of [`AlphaTokenMixin`] that finds the selection, and checks that it has what it needs."""

    _micro_batch = (-1, 0, 0)  # the optimizer step, the batch size, the number in the step

    def _found_weights(self, token_weights: Any) -> Any:
        """`token_weights`; if there are none, the name of the training data's column "token_weights", if it has one."""
        args, columns = self.alphatoken_args, columns_in(self.train_dataset, COLUMNS[:1])
        if args.rho >= 1.0:
            if token_weights is not None:
                raise ValueError("token_weights were given, but rho=1.0 trains on every token alike. Set rho below 1.")
            if columns:
                logger.warning(f"The columns {', '.join(columns)} are not used, since rho=1.0 trains on every token.")
            return None
        if isinstance(token_weights, str) and not columns_in(self.train_dataset, (token_weights,)):
            raise ValueError(
                f"token_weights names the column {token_weights!r}, which the training data has not (for pairs, with "
                f"chosen_ and rejected_ before it); it has {get_dataset_column_names(self.train_dataset)}."
            )
        if token_weights is not None or not columns:
            return token_weights
        if not args.alphatoken_selection.valued:
            raise ValueError(
                f"The training data has token weights ({', '.join(columns)}), and selection={args.selection!r} chooses "
                "others. Leave the selection out, or take the columns out with remove_columns."
            )
        logger.warning(f"Token weights of the training data are used ({', '.join(columns)}), and nothing is valued.")
        return COLUMNS[0]

    def _values(self, token_weights: Any, *unused: Any) -> bool:
        """Whether tokens are chosen by their values; where not, a warning of what only these need, or an error."""
        valued = token_weights is None and self._checked_selection().valued
        if self.alphatoken_args.precondition and not valued:
            raise ValueError(
                "precondition is True, but tokens are not chosen by their values. Set precondition=False, or leave "
                "selection and token_weights (a data set's column of that name too) out."
            )
        columns = getattr(self._raw_rows, "column_names", None) or ()  # of a stream they may not be known
        if "messages" in columns and getattr(self.args, "assistant_only_loss", None) is False:
            logger.warning(
                "The training data has messages, of which all turns are trained on and valued, those of users too. Set "
                "assistant_only_loss=True for the assistant's alone."
            )
        if not valued and any(given is not None for given in unused):
            logger.warning("target_dataset and fisher are not used, since tokens are not chosen by their values.")
        return valued

    def _checked_selection(self) -> Selection:
        """The selection. An error if it needs a reference or pairs, and there are none."""
        args = self.alphatoken_args
        selection = args.alphatoken_selection
        without = self._alphatoken_ref is None and not has_adapters(self.model)
        if selection.pairs and isinstance(self, SFTTrainer):
            raise ValueError(
                f'selection="{args.selection}" chooses tokens of preference pairs, and this trainer has none. Use '
                'AlphaTokenDPOTrainer, or selection="excess_loss".'
            )
        if selection.reference and without:
            raise ValueError(
                f'selection="{args.selection}" compares with a reference, and the model has no adapters and there is '
                "no ref_model. Pass ref_model."
            )
        if selection.valued and args.stability_weight > 0 and without:
            raise ValueError(
                "The model has no adapters and there is no ref_model, so there is nothing to measure drift from. Pass "
                "the model that training starts from as ref_model, use a peft_config, or set stability_weight=0."
            )
        return selection

    def _draw(self) -> int:
        """The seed of a random selection. It depends only on the run's seed, the optimizer step, the number of the
        micro-batch in it and the process, so that a resumed run draws the same as an uninterrupted one."""
        *where, number = self._micro_batch
        step, size = self.state.global_step, self._train_batch_size  # a size that ran out of memory begins anew
        number = number + 1 if where == [step, size] else 0
        self._micro_batch = (step, size, number)
        key = (self.args.seed, step, number, self.accelerator.process_index)
        return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big")
