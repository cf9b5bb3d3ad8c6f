"""Token values for fine-tuning that forgets less: AlphaToken (arXiv 2606.01635) for LoRA and QLoRA models."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import AlphaTokenConfig
    from .directions.estimate import estimate_fisher
    from .directions.fisher import Fisher
    from .directions.follow import make_path
    from .directions.path import Path
    from .directions.target import Target, target_gradient
    from .gate.alphatoken import AlphaToken
    from .losses.dpo import dpo_loss
    from .losses.sft import sft_loss
    from .models.start import remember_start
    from .selection.confidence import dft_weights, eaft_weights, high_loss_weights, low_loss_weights
    from .selection.rules import excess_loss_weights, log_ratio_weights, random_weights, stm_weights
    from .tools.gain import SharedGain, shared_gain
    from .tools.report.samples import SampleWriter
    from .tools.show.tokens import show_tokens
    from .trl.arguments import AlphaTokenArguments, AlphaTokenDPOConfig, AlphaTokenSFTConfig
    from .trl.mixin import AlphaTokenMixin
    from .trl.trainers import AlphaTokenDPOTrainer, AlphaTokenSFTTrainer
    from .values import TokenValues
    from .weights import alphatoken_weights

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
    "Path",
    "SampleWriter",
    "SharedGain",
    "Target",
    "TokenValues",
    "alphatoken_weights",
    "dft_weights",
    "dpo_loss",
    "eaft_weights",
    "estimate_fisher",
    "excess_loss_weights",
    "high_loss_weights",
    "log_ratio_weights",
    "low_loss_weights",
    "make_path",
    "random_weights",
    "remember_start",
    "sft_loss",
    "shared_gain",
    "show_tokens",
    "stm_weights",
    "target_gradient",
]

# Name -> its module, imported when it is first asked for: torch and transformers take seconds, and `alphatoken --help`
# needs neither.
_WHERE = {
    "AlphaToken": "gate.alphatoken",
    "AlphaTokenArguments": "trl.arguments",
    "AlphaTokenConfig": "config",
    "AlphaTokenDPOConfig": "trl.arguments",
    "AlphaTokenDPOTrainer": "trl.trainers",
    "AlphaTokenMixin": "trl.mixin",
    "AlphaTokenSFTConfig": "trl.arguments",
    "AlphaTokenSFTTrainer": "trl.trainers",
    "Fisher": "directions.fisher",
    "Path": "directions.path",
    "SampleWriter": "tools.report.samples",
    "SharedGain": "tools.gain",
    "Target": "directions.target",
    "TokenValues": "values",
    "alphatoken_weights": "weights",
    "dft_weights": "selection.confidence",
    "dpo_loss": "losses.dpo",
    "eaft_weights": "selection.confidence",
    "estimate_fisher": "directions.estimate",
    "excess_loss_weights": "selection.rules",
    "high_loss_weights": "selection.confidence",
    "log_ratio_weights": "selection.rules",
    "low_loss_weights": "selection.confidence",
    "make_path": "directions.follow",
    "random_weights": "selection.rules",
    "remember_start": "models.start",
    "sft_loss": "losses.sft",
    "shared_gain": "tools.gain",
    "show_tokens": "tools.show.tokens",
    "stm_weights": "selection.rules",
    "target_gradient": "directions.target",
}

if importlib.util.find_spec("trl") is None:  # `import *` asks for every name
    __all__ = [name for name in __all__ if not _WHERE[name].startswith("trl.")]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
