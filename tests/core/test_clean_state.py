"""Nothing left behind: after success, and after an exception in the forward, the loss, or the backward."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import cases
import pytest
import torch
from batches import pair_batch, sft_batch
from models import FAMILIES, base_model, lora_model, nf4_lora_model
from state import differences, snapshot

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    sft_loss,
    target_gradient,
)

CONFIG = AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW, target_every=1)
GRADS = (": grad",)


class Boom(Exception):
    """What the tests throw."""


def fisher_for(model, family="llama"):
    return Fisher.from_diagonals(cases.fisher_tensors(model, family, 2))


def gate_for(model, family="llama"):
    return AlphaToken(model, target=cases.validation(), fisher=fisher_for(model, family), config=CONFIG)


def prepare(model, how):
    """Irregular modes, flags and gradients, so that a reset to some default shows."""
    if how != "off":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    for i, module in enumerate(model.modules()):
        if isinstance(module, torch.nn.Dropout) and i % 2:
            module.eval()
    generator = torch.Generator().manual_seed(1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for i, parameter in enumerate(trainable):
        if i % 3 == 0:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    trainable[0].requires_grad_(False)  # in the first block, not scored
    return model


MODELS = {
    "llama": lambda: lora_model("llama", lora_dropout=0.2),
    "ref": lambda: lora_model("llama", others=["ref", "third"], lora_dropout=0.2),
    "gpt2": lambda: lora_model("gpt2"),
    "nf4": lambda: nf4_lora_model("llama"),
}


def family_of(name):
    return name if name in FAMILIES else "llama"


def weights_call(model, family, batch):
    return alphatoken_weights(
        model,
        None,
        batch,
        target=cases.validation(),
        fisher=fisher_for(model, family),
        config=CONFIG,
        return_values=True,
    )


CALLS = {
    "weights": lambda model, family: weights_call(model, family, sft_batch("left")),
    "weights_pairs": lambda model, family: weights_call(model, family, pair_batch()),
    "weights_bare": lambda model, family: alphatoken_weights(model, None, sft_batch(), config=CONFIG),
    "target": lambda model, family: target_gradient(model, cases.validation(), config=CONFIG),
    "fisher": lambda model, family: estimate_fisher(
        model, [[3, 4, 5], [6]], config=CONFIG, max_new_tokens=2, progress=False
    ),
    "fisher_forced": lambda model, family: estimate_fisher(
        model, [sft_batch()], config=CONFIG, generate=False, progress=False
    ),
}


# Every kind of model without checkpointing, and the kind with most to restore with it.
VARIANTS = [*((name, "off") for name in MODELS), ("ref", "non_reentrant"), ("nf4", "reentrant")]


@pytest.mark.parametrize(("name", "how"), VARIANTS)
@pytest.mark.parametrize("call", CALLS)
def test_after_success(name, call, how):
    """Functions without a training forward change nothing at all, `.grad` included."""
    model = prepare(MODELS[name](), how)
    before = snapshot(model)
    CALLS[call](model, family_of(name))
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("call", CALLS)
def test_eval_mode_stays(call):
    model = MODELS["llama"]().eval()
    before = snapshot(model)
    CALLS[call](model, "llama")
    assert differences(before, snapshot(model)) == []


def test_separate_reference_model_is_left_alone():
    model, ref_model = lora_model("llama"), base_model("llama")
    before = snapshot(model, ref_model)
    for batch in (sft_batch(), pair_batch()):
        alphatoken_weights(model, ref_model, batch, target=cases.validation(), fisher=fisher_for(model), config=CONFIG)
    dpo_loss(model, ref_model, pair_batch())
    estimate_fisher(model, [[3, 4]], ref_model=ref_model, config=CONFIG, max_new_tokens=2, progress=False)
    assert differences(before, snapshot(model, ref_model)) == []


# ---------------------------------------------------------------------------------------- training steps


def context_step(model, family, gate):
    batch = sft_batch("left")
    with gate(batch):
        model(**batch).loss.backward()


def context_late(model, family, gate):
    batch = sft_batch("left")
    with gate(batch):
        loss = model(**batch).loss
    loss.backward()


STEPS = {
    "context": context_step,
    "context_late": context_late,
    "sft_loss": lambda model, family, gate: sft_loss(model, sft_batch("left"), gate).backward(),
    "dpo_loss": lambda model, family, gate: dpo_loss(model, None, pair_batch(), gate).backward(),
    "sft_weights": lambda model, family, gate: sft_loss(
        model, sft_batch(), (sft_batch()["labels"] != -100).float()
    ).backward(),
    "dpo_plain": lambda model, family, gate: dpo_loss(model, None, pair_batch()).backward(),
}


@pytest.mark.parametrize(("name", "how"), VARIANTS)
@pytest.mark.parametrize("step", STEPS)
def test_after_a_step(name, step, how):
    """A gated step leaves gradients on the trainable parameters and nothing else."""
    model = prepare(MODELS[name](), how)
    gate = gate_for(model, family_of(name))
    before = snapshot(model)
    STEPS[step](model, family_of(name), gate)
    changed = differences(before, snapshot(model), ignore=(*GRADS, "torch generator"))
    assert changed == []
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None or f"{key}: grad" in before[1], key
    assert any(p.grad is not None for p in model.parameters())


def test_frozen_parameters_get_no_gradient():
    model = lora_model("llama", others=["ref"])
    gate = gate_for(model)
    for step in STEPS.values():
        step(model, "llama", gate)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".default." in name), name


@pytest.mark.parametrize("form", ["sft", "dpo"])
def test_nothing_is_installed_between_loss_and_backward(form):
    model = lora_model("llama")
    gate = gate_for(model)
    before = snapshot(model)
    if form == "sft":
        loss = sft_loss(model, sft_batch(), gate)
    else:
        loss = dpo_loss(model, None, pair_batch(), gate)
    assert differences(before, snapshot(model)) == []
    del loss
    assert differences(before, snapshot(model)) == []


def test_making_an_alphatoken_changes_nothing():
    model = lora_model("llama")
    before = snapshot(model)
    gate = gate_for(model)
    assert differences(before, snapshot(model)) == []
    batch = sft_batch()
    with pytest.raises(RuntimeError, match="nothing was masked"), gate(batch):
        pass
    assert differences(before, snapshot(model), ignore=("torch generator",)) == []


def test_a_forward_outside_the_context_is_a_plain_one():
    plain, model = lora_model("llama"), lora_model("llama")
    gate = gate_for(model)
    batch = sft_batch()
    with gate(batch):
        model(**batch).loss.backward()
    model.zero_grad()
    for one in (plain, model):
        one(**batch).loss.backward()
    for (name, first), (_, second) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if first.requires_grad:
            assert torch.equal(first.grad, second.grad), name


# ------------------------------------------------------------------------------------------------- exceptions


@contextlib.contextmanager
def failing_module(model, path, on_call):
    """The module at `path` raises on its `on_call`-th call; the hook is the test's own and goes again."""
    calls = 0

    def hook(_module, _args, _output):
        nonlocal calls
        calls += 1
        if calls == on_call:
            raise Boom(f"{path}, call {on_call}")

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield lambda: calls
    finally:
        handle.remove()


class BackwardBoom(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Boom("in the backward")


@contextlib.contextmanager
def failing_backward(model, path):
    def hook(_module, _args, output):
        first = output[0] if isinstance(output, tuple) else output
        if not first.requires_grad:
            return None
        first = BackwardBoom.apply(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


BLOCK = "base_model.model.model.layers.{}"
PLACES = [
    BLOCK.format(0) + ".mlp",
    BLOCK.format(1) + ".self_attn",
    BLOCK.format(2) + ".mlp.down_proj",
    BLOCK.format(2),
    "base_model.model.model.norm",
]


def boom_at_each_call(model, path, act, ignore=()):
    """Raise at the first call, the second, ... until the action goes through; all is restored each time."""
    raised = 0
    for on_call in range(1, 100):
        before = snapshot(model)
        with failing_module(model, path, on_call) as calls:
            try:
                act()
            except Boom:
                raised += 1
                assert calls() == on_call
            else:
                break
        # the hook above has run and gone; hook ids do not count, only what is registered now
        assert differences(before, snapshot(model), ignore) == [], f"{path}, call {on_call}"
    assert raised > 0
    return raised


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_exception_in_any_forward(call, path):
    model = prepare(lora_model("llama", others=["ref"], lora_dropout=0.2), "off")
    torch.manual_seed(3)
    boom_at_each_call(model, path, lambda: CALLS[call](model, "llama"))


@pytest.mark.parametrize("how", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("step", ["context", "context_late", "sft_loss", "dpo_loss"])
def test_exception_in_any_forward_of_a_step(step, how):
    """Including the target's refresh before, the reference's forward, and the replay inside the backward."""
    model = prepare(lora_model("llama", others=["ref"]), how)
    for path in (BLOCK.format(0) + ".mlp", BLOCK.format(2) + ".mlp.down_proj"):
        gate = gate_for(model)
        boom_at_each_call(model, path, lambda gate=gate: STEPS[step](model, "llama", gate), (*GRADS, "torch generator"))


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("call", ["weights", "weights_pairs", "target", "fisher_forced"])
def test_exception_in_the_inner_backward(call, path):
    model = prepare(lora_model("llama"), "off")
    before = snapshot(model)
    scored = "layers.0" not in path
    with failing_backward(model, path):
        if scored:
            with pytest.raises(Boom):
                CALLS[call](model, "llama")
        else:
            CALLS[call](model, "llama")  # blocks below the scored ones have no backward at all
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("how", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("step", ["context", "context_late", "sft_loss", "dpo_loss"])
@pytest.mark.parametrize("place", [0, 2, "norm"])
def test_exception_in_the_backward_of_a_step(step, how, place):
    model = prepare(lora_model("llama"), how)
    gate = gate_for(model)
    STEPS[step](model, "llama", gate)  # the target is estimated here
    before = snapshot(model)
    path = "base_model.model.model.norm" if place == "norm" else BLOCK.format(place) + ".mlp"
    with failing_backward(model, path), pytest.raises(Boom):
        STEPS[step](model, "llama", gate)
    assert differences(before, snapshot(model), (*GRADS, "torch generator")) == []


def test_exception_in_the_users_loss():
    model = prepare(lora_model("llama", others=["ref"]), "off")
    gate = gate_for(model)
    batch = sft_batch()
    before = snapshot(model)
    with pytest.raises(Boom), gate(batch):
        model(**batch)
        raise Boom
    assert differences(before, snapshot(model), (*GRADS, "torch generator")) == []


def test_a_step_after_an_exception_is_right():
    """The same object goes on as if nothing had happened."""
    model, twin = lora_model("llama"), lora_model("llama")
    batch = sft_batch()
    gates = gate_for(model), gate_for(twin)
    with pytest.raises(Boom), gates[0](batch):
        model(**batch)
        raise Boom
    with failing_backward(model, BLOCK.format(2) + ".mlp"), pytest.raises(Boom), gates[0](batch):
        model(**batch).loss.backward()
    model.zero_grad()
    for one, gate in zip((model, twin), gates, strict=True):
        with gate(batch):
            one(**batch).loss.backward()
    for (name, first), (_, second) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        if first.requires_grad:
            assert torch.equal(first.grad, second.grad), name


def test_exception_from_the_target_batches():
    model = prepare(lora_model("llama", others=["ref"]), "off")

    def batches():
        yield sft_batch()
        raise Boom

    before = snapshot(model)
    with pytest.raises(Boom):
        target_gradient(model, batches(), config=CONFIG)
    with pytest.raises(Boom):
        alphatoken_weights(model, None, sft_batch(), target=batches(), fisher=fisher_for(model), config=CONFIG)
    assert differences(before, snapshot(model)) == []


# -------------------------------------------------------------------------------------------------- import


def test_importing_is_light():
    """Neither trl nor bitsandbytes, no environment variable, no generator moved, no warning filter."""
    code = """
import os, sys, warnings
import torch
environment, filters, state = dict(os.environ), list(warnings.filters), torch.get_rng_state()
import alphatoken_loss
assert not {"trl", "bitsandbytes"} & set(sys.modules), "heavy imports"
assert dict(os.environ) == environment
assert torch.equal(torch.get_rng_state(), state)
assert not hasattr(alphatoken_loss, "main")
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
