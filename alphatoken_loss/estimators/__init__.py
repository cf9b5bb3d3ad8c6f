"""From a batch's forward and backward to token values: one module for each estimator, and their table.

base.py says what an estimator is. To add one, write its class in a module and add a line to `ESTIMATORS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Estimator

# Name -> its class, imported at first use. A module outside this package is written with its full name.
ESTIMATORS = {
    "ghost": ".ghost:Ghost",
    "difference": ".difference:Difference",
    "exact": ".exact:Exact",
    "path": ".path:AlongPath",
}


def estimator_class(name: str) -> type[Estimator]:
    """The estimator of a name in `ESTIMATORS`."""
    module, _, cls = ESTIMATORS[name].partition(":")
    found: type[Estimator] = getattr(importlib.import_module(module, __name__), cls)
    return found
