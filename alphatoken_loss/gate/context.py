"""A context that says so if nobody entered it: `alphatoken(batch)` on a line of its own would mask nothing."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from .alphatoken import AlphaToken

_UNENTERED = (
    "alphatoken(batch) was called and its context never entered, so nothing was masked. Write `with "
    "alphatoken(batch):` around the model's forward. (AlphaToken(..., strict=False) only warns.)"
)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def to_be_entered(
    make: Callable[Concatenate[AlphaToken, _P], Iterator[_T]],
) -> Callable[Concatenate[AlphaToken, _P], AbstractContextManager[_T]]:
    """`contextlib.contextmanager` for a method. A context that is thrown away without having been entered warns, and if
    its owner is strict, the next call raises a RuntimeError; not so where there was nothing to mask."""
    manager = contextlib.contextmanager(make)

    @functools.wraps(make)
    def call(owner: AlphaToken, *args: _P.args, **kwargs: _P.kwargs) -> AbstractContextManager[_T]:
        if vars(owner).pop(_LEFT, False) and owner.strict:
            raise RuntimeError(_UNENTERED)
        made = manager(owner, *args, **kwargs)
        return made if owner.config.off or not torch.is_grad_enabled() else _Context(owner, made)

    return call


_LEFT = "_left_a_context"


class _Context(AbstractContextManager[_T]):
    def __init__(self, owner: AlphaToken, inner: AbstractContextManager[_T]) -> None:
        self._owner, self._inner, self._entered = owner, inner, False

    def __enter__(self) -> _T:
        self._entered = True
        return self._inner.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._inner.__exit__(*raised)

    def __del__(self) -> None:
        if not self._entered:
            vars(self._owner)[_LEFT] = True
            warnings.warn(_UNENTERED, RuntimeWarning, stacklevel=2)
