"""Autocast as it was, also where an interrupt left contexts of it open: else casts outlive the step they belong to."""

from __future__ import annotations

import pytest
import torch

from alphatoken_loss.models.changes import Changes


def depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@pytest.mark.parametrize("around", [0, 1, 2])
@pytest.mark.parametrize("left_open", [0, 1, 3])
def test_depth_and_cache_are_put_back(around, left_open):
    contexts = [torch.autocast("cpu", torch.bfloat16) for _ in range(around)]
    for context in contexts:
        context.__enter__()
    before = depth()
    with Changes() as changes:
        changes.keep_modes()
        for _ in range(left_open):  # what an interrupt in `__enter__` or `__exit__` leaves
            torch.autocast_increment_nesting()
            torch.set_autocast_cache_enabled(False)
    assert depth() == before == around
    assert torch.is_autocast_cache_enabled()
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    assert depth() == 0
