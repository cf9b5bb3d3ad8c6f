"""A gated training step waits for its device as often as is listed here, and no oftener.

On an accelerator the host runs ahead of the device; reading a tensor's value, or a shape that depends on one, makes it
wait. On a CPU the same operations run, so they can be counted.
"""

from __future__ import annotations

from collections import Counter

import cases
import pytest
import torch
from batches import sft_batch
from models import lora_model
from torch.utils._python_dispatch import TorchDispatchMode

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, sft_loss, target_gradient

WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount")


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITS or indexed:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(step) -> Counter:
    with Waits() as mode:
        step()
    return mode.found


@pytest.mark.parametrize("kind", ["right", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["graph", "checkpointing"])
@pytest.mark.parametrize("estimator", ["ghost", "difference", "exact"])
def test_a_gated_step_waits_once_more_than_a_plain_one(estimator, checkpointing, kind, monkeypatch):
    """The one check that values are finite; a nudged forward masks for itself, and micro-batches after a step's first
    compare the adapter's bits."""
    model = lora_model("llama", dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    layers = 2 if estimator == "ghost" else "all"
    config = AlphaTokenConfig(estimator=estimator, num_layers=layers, causal_window=3)
    batch = sft_batch(kind)
    target = target_gradient(model, [sft_batch("none")], config=config)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2 if estimator == "ghost" else 3))
    gate = AlphaToken(model, target=target, fisher=fisher, config=config)
    sft_loss(model, batch, gate).backward()  # first step lengths, value rows
    plain = waits(lambda: sft_loss(model, batch).backward())
    expected = plain + Counter(_local_scalar_dense=1)
    if estimator == "difference":
        expected += plain

    torch.optim.SGD(model.parameters(), 1e-4).step()
    assert waits(lambda: sft_loss(model, batch, gate).backward()) == expected
    assert waits(lambda: sft_loss(model, batch, gate).backward()) == expected + Counter(equal=1)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    optimizer.step()
    preconditioned = AlphaToken(model, target=target, fisher=fisher, config=config, optimizer=optimizer)
    sft_loss(model, batch, preconditioned).backward()
    optimizer.step()
    # A fused step leaves no trace in versions, so bits are compared.
    assert waits(lambda: sft_loss(model, batch, preconditioned).backward()) == expected + Counter(equal=1)

    record = AlphaToken._record

    def reading(gate, values, *rest):
        record(gate, values, *rest)
        values.total[0, 0].item()

    monkeypatch.setattr(AlphaToken, "_record", reading)
    assert waits(lambda: sft_loss(model, batch, gate).backward()) != expected + Counter(equal=1)


def test_without_a_target_waits_do_not_grow_with_the_adapters():
    found = []
    for layers in (1, 3):
        model = lora_model("llama", dtype=torch.float32)
        config = AlphaTokenConfig(num_layers=layers, causal_window=0, stability_weight=0.0)
        gate, batch = AlphaToken(model, config=config), sft_batch("right")
        sft_loss(model, batch, gate).backward()
        found.append(waits(lambda model=model, batch=batch, gate=gate: sft_loss(model, batch, gate).backward()))
    assert found[0] == found[1]
