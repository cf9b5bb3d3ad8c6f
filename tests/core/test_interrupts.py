"""Ctrl-C at random moments, by real signals and between the bytecodes that undo: no temporary change survives."""

from __future__ import annotations

import random
import signal
import sys
import time

import cases
import pytest
from batches import pair_batch, sft_batch
from models import lora_model
from state import differences, snapshot

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    make_path,
    shared_gain,
)
from alphatoken_loss.models import changes

pytestmark = pytest.mark.slow

TRIES = 40
SETTINGS = {
    "ghost": {"num_layers": "all", "causal_window": 4, "target_decay": None},
    "difference": {"num_layers": "all", "target_decay": None},
    "exact": {"num_layers": "all", "target_decay": None},
    "path": {"path_steps": 2, "path_kl": 0.5},
}


def interrupt(signum, frame):
    raise KeyboardInterrupt


@pytest.fixture
def alarms():
    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def gated(estimator):
    def make(model):
        fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", "all"))
        config = AlphaTokenConfig(estimator=estimator, **SETTINGS[estimator])
        alphatoken, batch = AlphaToken(model, target=cases.validation(), fisher=fisher, config=config), sft_batch()

        def act():
            alphatoken.source.path = None  # theta* is made in each try
            with alphatoken(batch, kl_coef=0.1) as step:
                (model(**batch).loss + step.kl).backward()

        return act

    return make


def weights(model):
    config = AlphaTokenConfig(num_layers=2)
    return lambda: alphatoken_weights(model, None, pair_batch(), config=config)


def dpo(model):
    config = AlphaTokenConfig(estimator="difference")
    alphatoken = AlphaToken(model, target=cases.validation(), config=config)
    return lambda: dpo_loss(model, None, pair_batch(), alphatoken).backward()


def fisher(model):
    config = AlphaTokenConfig(num_layers=2)
    return lambda: estimate_fisher(model, [[3, 4, 5], [6]], config=config, max_new_tokens=2, progress=False)


def path(model):
    config = AlphaTokenConfig(estimator="path", path_steps=2, path_rate=1e-3)
    return lambda: make_path(model, cases.validation(), config=config, progress=False)


def gain(model):
    config = AlphaTokenConfig(path_steps=2, path_rate=1e-3)
    return lambda: shared_gain(model, cases.validation(), [sft_batch()], config=config, progress=False)


ACTS = {name: gated(name) for name in SETTINGS} | {
    "weights": weights,
    "dpo": dpo,
    "fisher": fisher,
    "make_path": path,
    "shared_gain": gain,
}


def seconds(act):
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


@pytest.mark.parametrize("name", ACTS)
def test_no_survivor(alarms, name):
    model = lora_model("llama", others=["ref"], lora_dropout=0.1)
    act = ACTS[name](model)
    act()
    longest = min(seconds(act) for _ in range(3))  # the longest wait for a signal
    before, draw, cut = snapshot(model), random.Random(0), 0
    for _ in range(TRIES):
        try:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, longest))
            act()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            cut += 1
        assert differences(before, snapshot(model), (": grad", "generator")) == []
    assert cut > TRIES / 4


class Tracer:
    """Counts the bytecodes that undo changes, and raises before one of them."""

    UNDO = tuple(f.__code__ for f in (changes.Changes.__exit__, changes._call_all, changes.undoing(seconds)))

    def __init__(self, stop=None):
        self.stop, self.seen = stop, 0

    def __call__(self, frame, event, arg):
        if frame.f_code not in self.UNDO:
            return None
        frame.f_trace_opcodes = True
        return self.count

    def count(self, frame, event, arg):
        self.seen += event == "opcode"
        if self.seen == self.stop:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.count

    def watch(self, act):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            act()
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("name", ACTS)
def test_no_survivor_where_changes_are_undone(name):
    """Signals seldom meet these lines, which take a small part of a step."""
    model = lora_model("llama", others=["ref"], lora_dropout=0.1)
    act = ACTS[name](model)
    act()
    whole = Tracer()
    whole.watch(act)
    before = snapshot(model)
    for stop in random.Random(0).sample(range(1, whole.seen + 1), TRIES // 3):
        with pytest.raises(KeyboardInterrupt):
            Tracer(stop).watch(act)
        assert differences(before, snapshot(model), (": grad", "generator")) == []
