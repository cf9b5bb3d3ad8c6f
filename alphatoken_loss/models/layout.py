"""What a model is made of, walked quickly, and what was found in it, kept while it stays as it is.

`Module.modules()` takes milliseconds in a large model with adapters, and what is to be known of a model before each
forward took many such walks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_T = TypeVar("_T")


def modules_of(*roots: nn.Module) -> list[nn.Module]:
    """The modules of `Module.modules()`, each once, in its order."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = list(reversed(roots))
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            children = module.__dict__["_modules"]
            if children:
                waiting.extend(reversed(children.values()))
    return list(found)


def plain(module: nn.Module, name: str, default: Any = None) -> Any:
    """An attribute that is neither parameter, buffer nor module: for those torch looks, slowly, where there is none."""
    own = module.__dict__
    return own[name] if name in own else getattr(type(module), name, default)


class Kept(Generic[_T]):
    """What was found in a model, anew if the model has changed: other modules or parameters, others trained, other
    adapters on, code compiled or weights repacked."""

    def __init__(self) -> None:
        self._layout: list[Hashable] | None = None
        self._found: _T | None = None

    def of(self, model: nn.Module, find: Callable[[], _T]) -> _T:
        layout = _layout(model)
        if layout != self._layout:
            self._found = find()
            self._layout = layout  # not before: an error is not kept
        return self._found  # type: ignore[return-value]


# Model -> by key, what was found. It must not know the model, which would never be let go.
_kept: WeakKeyDictionary[nn.Module, dict[Hashable, Kept[Any]]] = WeakKeyDictionary()


def kept(model: nn.Module, key: Hashable, find: Callable[[], _T]) -> _T:
    """The same, kept beside the model: for names and numbers alone."""
    found: Kept[_T] = _kept.setdefault(model, {}).setdefault(key, Kept())
    return found.of(model, find)


def _layout(model: nn.Module) -> list[Hashable]:
    found: list[Hashable] = []
    for module in modules_of(model):
        own = module.__dict__
        found.append(id(module))
        for parameter in own["_parameters"].values():
            if parameter is not None:
                found.append(id(parameter) if parameter.requires_grad else -id(parameter))
                if type(parameter) is not nn.Parameter:  # a quantised one may be repacked
                    state = getattr(parameter, "quant_state", None)
                    found.append(bool(getattr(state, "packing_format_for_cpu", False)))
        active = plain(module, "_active_adapter")
        if active is not None:  # a layer of PEFT
            found.append(active if isinstance(active, str) else tuple(active))
            found += plain(module, "_disable_adapters"), tuple(plain(module, "merged_adapters", ()))
        if "forward" in own or "_compiled_call_impl" in own:
            found += id(own.get("forward")), id(own.get("_compiled_call_impl"))
    return found
