"""Temporary changes (hooks, flags, other tensors in the place of parameters), undone whatever ends them.

Ctrl-C raises KeyboardInterrupt between any two bytecodes: inside a `finally` too, and between the last line of a
context and its exit. So that nothing of a change survives,

- what undoes it is noted in a journal before it is made;
- a context undoes its part of the journal in one call into C, during which no signal handler runs;
- that part still has the changes of inner contexts whose exit was cut short.

The outermost context of a call is left twice (`undoing`), since one interrupt cuts one exit short.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sized
from functools import partial
from itertools import compress, starmap
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layout import modules_of

IN_CONTEXT = "_alphatoken_context"  # attribute of a model in the context of an AlphaToken

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Mark(partial[Any]):
    """Where a context begins in the journal; undoing it does nothing."""


class _Journal(threading.local):
    def __init__(self) -> None:
        self.entries: list[partial[Any]] = []


_journal = _Journal()


class Changes:
    """A context that undoes what was changed through it, and within it, in this thread."""

    def __enter__(self) -> Changes:
        self._mark, self._entries = _Mark(int), _journal.entries
        self._entries.append(self._mark)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        entries, mark = self._entries, self._mark
        if mark not in entries:  # undone by a context around it
            return
        if kind is not GeneratorExit:
            _call_all(iter(entries.pop, mark))
            return
        # A generator that an interrupt left open may be closed at any later time: contexts begun since are not its own.
        start = entries.index(mark)
        after = (i for i, entry in enumerate(entries[start + 1 :], start + 1) if isinstance(entry, _Mark))
        stop = next(after, len(entries))
        own = entries[start:stop]
        _call_all(reversed(own))
        del entries[start:stop]

    def note(self, undo: Callable[..., Any], *args: Any) -> None:
        """Call `undo(*args)` on leaving. It must be no Python function, nor call one."""
        _journal.entries.append(partial(undo, *args))

    def note_unless(self, held: Sized, undo: Callable[[], Any]) -> None:
        """Call `undo()`, likewise no Python function, on leaving, unless `held` holds something then."""
        self.note(deque, starmap(undo, compress([()], map(operator.not_, [held]))), 0)

    def begin(self, begin: Callable[[], _R], end: Callable[[_R], Any]) -> _R:
        """Call `begin()` now, and `end` with what it returned on leaving; both must be C functions."""
        begun: list[_R] = []
        self.note(deque, map(end, begun), 0)
        begun.extend(starmap(begin, [()]))
        return begun[0]

    def keep(self, places: dict[Any, Any], key: Any) -> None:
        """On leaving, put back what is at a key now, or remove the key if it is not there."""
        if key in places:
            self.note(places.__setitem__, key, places[key])
        else:
            self.note(places.pop, key, None)

    def put(self, places: dict[Any, Any], key: Any, value: Any) -> None:
        self.keep(places, key)
        places[key] = value

    def set(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute that is neither parameter, buffer nor module."""
        self.put(vars(module), attribute, value)

    def require_grad(self, parameter: torch.Tensor, flag: bool) -> None:
        self.note(torch.Tensor.requires_grad_, parameter, parameter.requires_grad)
        parameter.requires_grad_(flag)

    def replace(self, module: nn.Module, tensors: Mapping[int, torch.Tensor]) -> None:
        """Put other tensors in the place of a module's parameters, by their `id`; parameters are not written to."""
        for child in modules_of(module) if tensors else ():
            for name, parameter in child._parameters.items():
                if id(parameter) in tensors:
                    self.put(child._parameters, name, tensors[id(parameter)])

    def replace_named(self, module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """The same by their names in `module.named_parameters()`."""
        own = dict(module.named_parameters()) if tensors else {}
        self.replace(module, {id(own[name]): tensor for name, tensor in tensors.items()})

    def hook(
        self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False, with_kwargs: bool = False
    ) -> None:
        """As `register_forward_hook`, or `register_forward_pre_hook`, but undone even if it is cut short."""
        hooks = module._forward_pre_hooks if before else module._forward_hooks
        key = RemovableHandle(hooks).id
        if with_kwargs:
            self.put(module._forward_pre_hooks_with_kwargs if before else module._forward_hooks_with_kwargs, key, True)
        self.put(hooks, key, hook)

    def keep_modes(self) -> None:
        """On leaving, put grad mode and autocast on or off as now, and drop casts, which may have no graph."""
        # Autocast frees its casts when the outermost context ends, which it knows by the depth. After an interrupt the
        # depth could stay too high, and casts outlive an optimizer step. Go back to this depth, from one above it.
        depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        self.note(deque, iter(torch.autocast_decrement_nesting, depth), 0)
        self.note(torch.autocast_increment_nesting)
        self.note(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        self.note(torch.clear_autocast_cache)  # before torch 2.9 or so, a forward with grad would take them
        self.note(torch._C._set_grad_enabled, torch.is_grad_enabled())
        for device in ("cpu", "cuda"):
            self.note(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
            self.note(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device))


def _call_all(entries: Any) -> None:
    deque(map(partial.__call__, entries), maxlen=0)


def undoing(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Undo all that a function changes through `Changes`, even if Ctrl-C cuts one of its exits short."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with Changes(), Changes() as changes:
            changes.keep_modes()
            return function(*args, **kwargs)

    return run
