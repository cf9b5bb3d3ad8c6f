"""From a batch's forward and backward to token values: an estimator a module, and their table.

base.py says what an estimator is. To add one, write its class in a module and add a line to `ESTIMATORS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Estimator

# Name -> where its class is, imported when the estimator is first used; a module outside the package is named whole.
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
