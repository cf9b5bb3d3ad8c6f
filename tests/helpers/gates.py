"""Gates on small models."""

from __future__ import annotations

import contextlib

import cases
import reference
from models import FAMILIES

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher

CHECKPOINTING = ("off", "non_reentrant", "reentrant")


def gate_for(model, family="llama", *, k=2, rho=0.5, fisher=True, **options):
    """An `AlphaToken` with the tests' target and Fisher."""
    config = AlphaTokenConfig(num_layers=k, causal_window=cases.WINDOW, rho=rho, **options)
    given = Fisher.from_diagonals(cases.fisher_tensors(model, family, k)) if fisher else None
    return AlphaToken(model, target=cases.validation(), fisher=given, config=config)


def checkpointed(model, how):
    """Switch checkpointing on in place."""
    if how != "off":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def steady(family):
    return reference.softmax_in_own_dtype() if FAMILIES[family].eager_only else contextlib.nullcontext()
