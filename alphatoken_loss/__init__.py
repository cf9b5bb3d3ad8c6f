"""Token values for fine-tuning that forgets less: AlphaToken (arXiv 2606.01635) for LoRA and QLoRA models."""

from .config import AlphaTokenConfig
from .fisher import Fisher, estimate_fisher
from .gate import AlphaToken
from .losses import dpo_loss, sft_loss
from .target import Target, target_gradient
from .values import TokenValues
from .weights import alphatoken_weights

__version__ = "0.1.0"
__all__ = [
    "AlphaToken",
    "AlphaTokenConfig",
    "Fisher",
    "Target",
    "TokenValues",
    "alphatoken_weights",
    "dpo_loss",
    "estimate_fisher",
    "sft_loss",
    "target_gradient",
]
