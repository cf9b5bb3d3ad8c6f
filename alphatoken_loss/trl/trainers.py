"""TRL's trainers with token values inside."""

from __future__ import annotations

from typing import ClassVar

from trl import DPOTrainer, SFTTrainer

from .mixin import AlphaTokenMixin


class AlphaTokenSFTTrainer(AlphaTokenMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that trains on the tokens of value; its arguments, and those of [`AlphaTokenMixin`].

    Training an existing adapter further, the reference is the model without adapters.

    Example:
        >>> args = AlphaTokenSFTConfig(output_dir="out", rho=0.5)
        >>> trainer = AlphaTokenSFTTrainer(
        ...     model, args=args, train_dataset=train, target_dataset=clean, peft_config=LoraConfig()
        ... )
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = [*SFTTrainer._tag_names, "alphatoken"]


class AlphaTokenDPOTrainer(AlphaTokenMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] that trains on the tokens of value; its arguments, and those of [`AlphaTokenMixin`].

    The reference of token values is that of the loss. Of a target held out of the training data the chosen answers
    count; with `estimator="path"` that target, and a `target_dataset` that holds pairs, leads to theta* by pairs.

    Example:
        >>> args = AlphaTokenDPOConfig(output_dir="out", rho=0.5)
        >>> trainer = AlphaTokenDPOTrainer(
        ...     model, args=args, train_dataset=pairs, target_dataset=clean, peft_config=LoraConfig()
        ... )
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = [*DPOTrainer._tag_names, "alphatoken"]
