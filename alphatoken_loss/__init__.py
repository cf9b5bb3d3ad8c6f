"""Token values for fine-tuning that forgets less: AlphaToken (arXiv 2606.01635) for LoRA and QLoRA models."""

from typing import TYPE_CHECKING

from .config import AlphaTokenConfig
from .fisher import Fisher, estimate_fisher
from .gate import AlphaToken
from .losses import dpo_loss, sft_loss
from .selections import excess_loss_weights, log_ratio_weights, random_weights
from .target import Target, target_gradient
from .values import TokenValues
from .weights import alphatoken_weights

if TYPE_CHECKING:
    from .arguments import AlphaTokenArguments, AlphaTokenDPOConfig, AlphaTokenSFTConfig
    from .samples import SampleWriter
    from .show import show_tokens
    from .trainers import AlphaTokenDPOTrainer, AlphaTokenMixin, AlphaTokenSFTTrainer

__version__ = "0.1.0"
__all__ = [
    "AlphaToken",
    "AlphaTokenArguments",
    "AlphaTokenConfig",
    "AlphaTokenDPOConfig",
    "AlphaTokenDPOTrainer",
    "AlphaTokenMixin",
    "AlphaTokenSFTConfig",
    "AlphaTokenSFTTrainer",
    "Fisher",
    "SampleWriter",
    "Target",
    "TokenValues",
    "alphatoken_weights",
    "dpo_loss",
    "estimate_fisher",
    "excess_loss_weights",
    "log_ratio_weights",
    "random_weights",
    "sft_loss",
    "show_tokens",
    "target_gradient",
]


def __getattr__(name: str) -> object:
    """Import TRL only for those who use its trainers, and what shows and records only for those who do."""
    if name == "show_tokens":
        from .show import show_tokens

        return show_tokens
    if name == "SampleWriter":
        from .samples import SampleWriter

        return SampleWriter
    if name in __all__:
        from . import arguments, trainers

        return getattr(arguments if hasattr(arguments, name) else trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
