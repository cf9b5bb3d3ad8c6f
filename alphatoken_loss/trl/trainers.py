"""TRL's trainers with token values inside."""

from __future__ import annotations

from typing import ClassVar

from trl import DPOTrainer, SFTTrainer

from .mixin import AlphaTokenMixin


class AlphaTokenSFTTrainer(AlphaTokenMixin, SFTTrainer):
    """[`~trl.SFTTrainer`] that trains on the tokens of value. It takes its arguments and those of [`AlphaTokenMixin`].

    If an existing adapter is trained further, the reference is the model without adapters.

    Example:
        >>> args = AlphaTokenSFTConfig(output_dir="out", rho=0.5)
        >>> trainer = AlphaTokenSFTTrainer(
        ...     model, args=args, train_dataset=train, target_dataset=clean, peft_config=LoraConfig()
        ... )
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = [*SFTTrainer._tag_names, "alphatoken"]


class AlphaTokenDPOTrainer(AlphaTokenMixin, DPOTrainer):
    """[`~trl.DPOTrainer`] that trains on the tokens of value. It takes its arguments and those of [`AlphaTokenMixin`].

    Token values have the reference of the loss. If the target is held out of the training data, its chosen answers
    count. With `estimator="path"`, theta* is trained on the pairs of that target, or of a `target_dataset` of pairs.

    Example:
        >>> args = AlphaTokenDPOConfig(output_dir="out", rho=0.5)
        >>> trainer = AlphaTokenDPOTrainer(
        ...     model, args=args, train_dataset=pairs, target_dataset=clean, peft_config=LoraConfig()
        ... )
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = [*DPOTrainer._tag_names, "alphatoken"]
