"""Comparisons with a relative error against the largest entry, and tolerances."""

from __future__ import annotations

import torch

TOL64 = 1e-6
TOL_NF4 = 1e-4


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.double().abs().max())
    assert scale > 0, "nothing to compare: the expected tensor is zero"
    return float((actual.double() - expected.double()).abs().max()) / scale


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float, what: str = "") -> None:
    found = error(actual, expected)
    assert found < tol, f"{what}: relative error {found:.2e}, allowed {tol:.0e}"


def assert_same_grads(actual: dict, expected: dict, tol: float) -> None:
    """Every parameter's gradient, relative to its own largest entry; exact zeros must be (nearly) zero."""
    assert set(actual) == set(expected), set(actual) ^ set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, grad in expected.items():
        if float(grad.abs().max()) < 1e-12 * largest:
            assert float(actual[name].abs().max()) < tol * largest, name
        else:
            assert_close(actual[name], grad, tol, name)


def grads_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`.grad` of every trainable parameter, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    """Rank correlation, no ties assumed."""
    ranks = torch.stack([x.argsort().argsort().double(), y.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])
