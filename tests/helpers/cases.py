"""One value comparison, used by every test of values: the library against the reference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import reference
import torch
from batches import Batch, response, sft_batch, stacked
from checks import TOL64, assert_close
from models import FAMILIES
from torch import nn

from alphatoken_loss import AlphaTokenConfig, Fisher, alphatoken_weights

WINDOW = 3


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def validation(seed: int = 0) -> list[Batch]:
    """Two batches of validation examples, of different sizes and token counts."""
    return [sft_batch("none", seed=seed + 100), sft_batch("ragged", seed=seed + 200)]


def factor_names(model: nn.Module, family: str, k: int | str, adapter: str = "default") -> list[str]:
    layers = reference.scored_layers(model, FAMILIES[family], k, adapter)
    return [name for layer in layers for name in (layer.a, layer.b)]


def fisher_tensors(model: nn.Module, family: str, k: int | str, adapter: str = "default", seed: int = 0):
    return reference.random_fisher(model, reference.scored_layers(model, FAMILIES[family], k, adapter), seed)


def expected_values(
    model: nn.Module,
    family: str,
    batch: Batch,
    *,
    seed: int = 0,
    k: int | str = 2,
    window: int = WINDOW,
    adapter: str = "default",
    **options: Any,
) -> reference.Values:
    """The reference values for this module's standard target and Fisher."""
    target = options.pop("target", None)
    if target is None:
        names = factor_names(model, family, k, adapter)
        target = reference.target_gradient(model, validation(seed), names)
    fisher = options.pop("fisher", None) or fisher_tensors(model, family, k, adapter, seed)
    return reference.token_values(
        model, family, batch, target=target, fisher=fisher, k=k, window=window, adapter=adapter, **options
    )


def found_values(
    model: nn.Module,
    family: str,
    batch: Batch,
    *,
    seed: int = 0,
    k: int | str = 2,
    window: int = WINDOW,
    adapter: str = "default",
    ref_model: nn.Module | None = None,
    beta: float = 0.1,
    **config: Any,
):
    """(weights, values) of the library for the same target and Fisher."""
    return alphatoken_weights(
        model,
        ref_model,
        batch,
        target=validation(seed),
        fisher=Fisher.from_diagonals(fisher_tensors(model, family, k, adapter, seed)),
        config=AlphaTokenConfig(num_layers=k, causal_window=window, **config),
        beta=beta,
        return_values=True,
    )


def compare(values: Any, expected: reference.Values, batch: Batch, tol: float, zero: tuple[str, ...] = ()):
    """All terms, each against its own largest entry, and exact zeros where there is no label."""
    outside = ~response(batch)
    for term in reference.TERMS:
        actual, wanted = getattr(values, term), getattr(expected, term)
        assert actual.shape == stacked(batch)["labels"].shape, term
        assert not actual.requires_grad
        assert float(actual[outside].abs().sum()) == 0, f"{term}: value without a label"
        if term in zero:
            assert float(actual.abs().max()) == 0 and float(wanted.abs().max()) == 0, term
        else:
            assert_close(actual, wanted, tol, term)


def check_values(
    model: nn.Module,
    family: str,
    batch: Batch,
    *,
    tol: float = TOL64,
    zero: tuple[str, ...] = (),
    rho: float = 0.5,
    scope: str = "batch",
    stability_weight: float = 1.5,
    **options: Any,
) -> None:
    """Values and weights of one batch against the reference."""
    expected = expected_values(model, family, batch, stability_weight=stability_weight, **options)
    weights, values = found_values(
        model, family, batch, rho=rho, threshold_scope=scope, stability_weight=stability_weight, **options
    )
    compare(values, expected, batch, tol, zero)
    wanted = reference.keep(expected.total, batch, rho, scope)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, wanted.float()), "other tokens kept"
