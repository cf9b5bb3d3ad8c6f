"""Two threads of one process: what one values is what it values alone, and another's plain training is untouched."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from batches import sft_batch
from models import lora_model
from state import differences, process_state
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher
from alphatoken_loss.models.attention import eager_attention, replaced_attention
from alphatoken_loss.models.structure import find_blocks

pytestmark = pytest.mark.slow

STEPS = 8
HOW = {
    "in the graph": dict(estimator="ghost", causal_window=cases.WINDOW),
    "replayed": dict(estimator="ghost", causal_window=cases.WINDOW, checkpointed=True),
    "difference": dict(estimator="difference"),
    "exact": dict(estimator="exact"),
    "path": dict(estimator="path", path_steps=2),
}


@pytest.fixture(autouse=True)
def often():
    """Threads change places every few bytecodes, and leave nothing."""
    interval, before = sys.getswitchinterval(), process_state()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    assert differences([before], [process_state()], ("generator",)) == []


def valuing(seed, how):
    """Steps of SGD on a model that is made here; they return its values, weights and adapter at every step."""
    options = dict(HOW[how])
    model = lora_model("llama", seed=seed)  # transformers sets the process' default dtype meanwhile
    if options.pop("checkpointed", False):
        # Torch's checkpoint would set the process' generator back and forth, beside whatever thread draws from it.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        model.enable_input_require_grads()
    model.train()
    return lambda meet=None: valued(model, seed, meet, **options)


def valued(model, seed, meet, **options):
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2, seed=seed))
    config = AlphaTokenConfig(num_layers=2, **options)
    alphatoken = AlphaToken(model, target=cases.validation(seed), fisher=fisher, config=config)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for step in range(STEPS):
        batch = sft_batch("ragged", seed=seed + step)
        if meet is not None:
            meet.wait()
        with alphatoken(batch):
            model(**batch, use_cache=False).loss.backward()
        found += [alphatoken.values.total, alphatoken.weights]
        with torch.no_grad():
            for p in trained:
                p -= 0.05 * p.grad
                found.append(p.clone())
                p.grad = None
    return found


def training(*, dropout=0.0):
    """Plain steps of a third model, likewise."""
    model = lora_model("llama", seed=9, lora_dropout=dropout)
    return lambda meet=None: trained_plainly(model, meet)


def trained_plainly(model, meet):
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for step in range(2 * STEPS):
        if meet is not None and step % 2 == 0:
            meet.wait()
        model(**sft_batch("ragged", seed=step), use_cache=False).loss.backward()
        with torch.no_grad():
            for p in trained:
                p -= 0.05 * p.grad
                found.append(p.clone())
                p.grad = None
    return found


def at_once(*work):
    meet = threading.Barrier(len(work), timeout=60)

    def run(each):
        try:
            return each(meet)
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(len(work)) as pool:
        futures = [pool.submit(run, one) for one in work]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def assert_as_alone(*make):
    alone = [one()() for one in make]
    for found, wanted in zip(at_once(*[one() for one in make]), alone, strict=True):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:theta")  # random rows, which no theta* helps
@pytest.mark.parametrize("how", HOW)
def test_two_models_valued_at_once(how):
    assert_as_alone(lambda: valuing(0, how), lambda: valuing(1, how))


def test_two_estimators_at_once():
    assert_as_alone(lambda: valuing(0, "in the graph"), lambda: valuing(1, "exact"))


@pytest.mark.parametrize("how", HOW)
def test_plain_training_beside(how):
    """Its dropout takes the random numbers that it takes alone: torch has one generator for all threads."""
    assert_as_alone(lambda: valuing(0, how), lambda: training(dropout=0.2))


@pytest.mark.parametrize("how", ["replayed", "exact"])
def test_kernels_of_the_process_stay_as_they_are(monkeypatch, how):
    """Also as another thread sees them in the middle of a replay."""
    model, seen = lora_model("llama"), []
    inner = find_blocks(model)[-1].mlp

    def state():
        kernels = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math")]
        return [*kernels, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]

    def forward(hidden):
        thread = threading.Thread(target=lambda: seen.append(state()))
        thread.start()
        thread.join()
        return type(inner).forward(inner, hidden)

    monkeypatch.setattr(inner, "forward", forward)
    batch, config = sft_batch(), AlphaTokenConfig(estimator=HOW[how]["estimator"], stability_weight=0)
    with AlphaToken(model, target=cases.validation(), config=config)(batch):
        model(**batch, use_cache=False).loss.backward()
    assert len(seen) > 2 and all(each == state() for each in seen)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("first", ["first leaves first", "second leaves first"])
@pytest.mark.parametrize("own", [False, True], ids=["registered", "overridden"])
def test_replaced_attention_may_end_in_any_order(attn, first, own):
    """Where it was overridden in the registry before, this is what comes back."""
    models = [lora_model("llama", attn=attn, seed=seed) for seed in (0, 1)]
    batch, calls = sft_batch(), {0: 0, 1: 0, "own": 0}
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    registered = ALL_ATTENTION_FUNCTIONS.get(attn) or eager_attention(find_blocks(models[0])[0])

    def counted(key, function):
        def attention(module, *args, **kwargs):
            calls[key] += 1
            return (function or registered)(module, *args, **kwargs)

        return attention

    before = dict(local)
    overridden = counted("own", registered)
    if own:
        local[attn] = overridden
    turns = [threading.Event() for _ in range(5)]

    def run(index, enter, leave):
        turns[enter].wait(60)
        with replaced_attention(list(find_blocks(models[index])), lambda kernel, there: counted(index, there)):
            turns[enter + 1].set()
            turns[leave].wait(60)
            with torch.no_grad():
                models[index](**batch, use_cache=False)
        turns[leave + 1].set()

    leaves = (2, 3) if first == "first leaves first" else (3, 2)
    try:
        threads = [threading.Thread(target=run, args=(i, i, leaves[i])) for i in (0, 1)]
        for thread in threads:
            thread.start()
        turns[0].set()
        for thread in threads:
            thread.join(60)
        assert calls == {0: 3, 1: 3, "own": 6 if own else 0}
        assert dict(local) == ({**before, attn: overridden} if own else before)
    finally:
        local.clear()
        local.update(before)


def test_another_thread_may_compile(monkeypatch):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    for how in ("in the graph", "difference"):
        assert all(tensor.isfinite().all() for tensor in valuing(0, how)())
