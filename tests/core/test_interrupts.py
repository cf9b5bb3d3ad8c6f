"""Ctrl-C at random moments, by real signals: nothing of a temporary change survives."""

from __future__ import annotations

import random
import signal
import time

import cases
import pytest
from batches import pair_batch, sft_batch
from models import lora_model
from state import differences, snapshot

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, alphatoken_weights, dpo_loss, estimate_fisher

TRIES = 40


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
        config = AlphaTokenConfig(estimator=estimator, num_layers="all", causal_window=4, target_decay=None)
        alphatoken, batch = AlphaToken(model, target=cases.validation(), fisher=fisher, config=config), sft_batch()

        def act():
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


ACTS = {name: gated(name) for name in ("ghost", "difference", "exact")} | {
    "weights": weights,
    "dpo": dpo,
    "fisher": fisher,
}


@pytest.mark.parametrize("name", ACTS)
def test_no_survivor(alarms, name):
    model = lora_model("llama", others=["ref"], lora_dropout=0.1)
    act = ACTS[name](model)
    act()
    started = time.perf_counter()
    act()
    longest = time.perf_counter() - started
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
