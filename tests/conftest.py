"""Shared settings: one thread and a fixed seed per test."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import that reads it

from alphatoken_loss.models.modes import HOOKS_INSIDE_CHECKPOINT

# What checkpoints of transformers before 5.23 do not allow; the refusals have tests of their own.
REFUSED = ("hides the training forward from hooks", "runs a block's hooks inside its checkpoint")


def pytest_collection_finish() -> None:
    """What was imported is no garbage: a collection that looks through it takes longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[None]:
    """A test of what the installed transformers does not allow is skipped where that is said."""
    try:
        return (yield)
    except ValueError as error:
        if HOOKS_INSIDE_CHECKPOINT and any(text in str(error) for text in REFUSED):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def _no_autocast_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """A signal that falls into torch's `autocast.__enter__` leaves it open. Then its cache of cast weights is never
    cleared, and a later test under autocast would train on the weights of its first step."""
    yield
    torch.autocast_increment_nesting()
    depth = torch.autocast_decrement_nesting()
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    if depth:
        warnings.warn(f"{request.node.nodeid} left autocast open {depth} times", stacklevel=1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*checkpointing.*deprecated.*")
        yield
