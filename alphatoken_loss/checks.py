"""Checks of single settings, with the messages that all of them share."""

from __future__ import annotations

from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a number and not NaN; infinity is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_int(name: str, value: object, *, least: int, hint: str) -> None:
    """Raise ValueError for what is no integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}. {hint}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError for what is not among those that are allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
