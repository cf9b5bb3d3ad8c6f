"""Which tokens are trained on: by their values, or by other rules; a table of selections by name.

base.py says what a selection is. To add one, write its class in a module and add a line to `SELECTIONS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import AlphaTokenConfig
    from .base import Selection

# Name -> its class, imported at first use. A module outside this package is written with its full name.
SELECTIONS = {
    "alphatoken": ".base:ByValue",
    "given": ".base:Given",
    "random": ".rules:Random",
    "excess_loss": ".rules:ExcessLoss",
    "log_ratio": ".rules:LogRatio",
    "stm": ".rules:Stm",
    "eaft": ".confidence:Eaft",
    "dft": ".confidence:Dft",
    "low_loss": ".confidence:LowLoss",
    "high_loss": ".confidence:HighLoss",
}


def selection_class(name: str) -> type[Selection]:
    """The selection of a name in `SELECTIONS`.

    Raises:
        ValueError: there is none.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection is {name!r}; it must be one of {', '.join(map(repr, SELECTIONS))}.")
    module, _, cls = SELECTIONS[name].partition(":")
    found: type[Selection] = getattr(importlib.import_module(module, __name__), cls)
    return found


def make_selection(name: str, config: AlphaTokenConfig, options: Mapping[str, Any] | None = None) -> Selection:
    """The selection of a name, with its options.

    Raises:
        ValueError: there is no such selection, or it has no such option.
    """
    cls = selection_class(name)
    known = [field.name for field in fields(cls) if field.name != "config"]
    for option in options or {}:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"selection {name!r} has no option {option!r}; {has}.")
    return cls(config, **(options or {}))
