"""Arithmetic on many tensors beside the same one at a time."""

from __future__ import annotations

import pytest
import torch

from alphatoken_loss.models import tensors as foreach


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (1, 2, 3)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_at_a_time(dtype):
    """Names in the first one's order, whatever the second's; a factor that is a number or a 0-dim tensor."""
    x, y = tensors(0, dtype), dict(reversed(tensors(1, dtype).items()))
    for factor in (-1.5, torch.tensor(-1.5, dtype=dtype)):
        found = foreach.scaled(x, factor)
        assert list(found) == list(x) and all(torch.equal(found[n], x[n] * -1.5) for n in x)
    for found, expected in (
        (foreach.added(x, y), {n: x[n] + y[n] for n in x}),
        (foreach.added(x, y, -0.5), {n: x[n] - 0.5 * y[n] for n in x}),
        (foreach.divided(x, y), {n: x[n] / y[n] for n in x}),
    ):
        assert list(found) == list(x)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)
    whole = torch.cat([tensor.flatten() for tensor in x.values()])
    torch.testing.assert_close(foreach.length_of(x), whole.norm())


def test_a_factor_goes_to_each_device():
    x = tensors(0) | {"far": torch.zeros(2, device="meta")}
    found = foreach.scaled(x, torch.tensor(2.0))
    assert found["far"].is_meta and torch.equal(found["a"], 2 * x["a"])


def test_a_fingerprint_is_the_same_whether_tensors_are_summed_alone_or_joined(monkeypatch):
    some = [*tensors(0).values(), *tensors(1, torch.float32).values(), *tensors(2, torch.bfloat16).values()]
    joined = foreach.fingerprint(some)
    monkeypatch.setattr(foreach, "_LARGE", 6)
    assert any(x.numel() < 6 for x in some) and any(x.numel() >= 6 for x in some)
    assert torch.equal(foreach.fingerprint(some), joined)
    some[0].view(torch.int64).flatten()[0] += 1
    assert not torch.equal(foreach.fingerprint(some), joined), "a bit tells"
