"""A causal LM's head, run on rows of the last hidden state: log-probabilities and KLs are made so, some at a time.

That the logits are the head's output, but for a scale or a cap of the configuration, is seen once for each model.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..batches.batch import Batch
from ..models.changes import Changes
from ..models.forwards import hidden_of
from ..models.modes import autocast_without_cache, may_draw, without_noise
from ..models.structure import causal_lm, find_decoder, refuse_encoder_decoder, unwrap

LOGITS = 2**25  # that exist at a time: 128 MiB in float32, enough rows to keep a GPU busy
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_TOLERANCE = 0.02  # of the largest logit; what bf16 rounds is less


def head_of(model: nn.Module) -> nn.Module:
    head: nn.Module = causal_lm(model).get_output_embeddings()  # type: ignore[operator]
    return head


def chunk_of(model: nn.Module) -> int:
    """How many rows go through the head at a time: as many as have `LOGITS` logits."""
    return max(1, LOGITS // causal_lm(model).config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def logits_of_hidden(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A causal LM's logits `(..., vocabulary)` from its last hidden state: its head, with any scale or cap."""
    config, head = causal_lm(model).config.get_text_config(), head_of(model)  # type: ignore[union-attr, operator]
    dtype: Any = head.weight.dtype
    if dtype.is_floating_point and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(dtype)  # Mamba's is float32, whatever the model's
    logits: torch.Tensor = head(hidden)
    scale = next((s for s in (getattr(config, name, None) for name in _MULTIPLIERS) if s is not None), None)
    divisor = getattr(config, "logits_scaling", None)  # Granite, MiniCPM3; HyperCLOVA X means a factor by it
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    if scale is not None:
        logits = logits * scale
    cap = next((c for c in (getattr(config, name, None) for name in _CAPS) if c is not None), None)
    return logits if cap is None else (logits / cap).tanh() * cap


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model's forward takes, by name."""
    return inspect.signature(model.forward).parameters


def may_be_plain(model: nn.Module) -> bool:
    """What is known before a forward: the head stands beside the decoder, and not behind a transform of its own (BERT
    and its kin), and `is_plain` has not said otherwise."""
    decoder, head = find_decoder(model), head_of(model)
    if _plain.get(causal_lm(model), (0, True)) == (id(head), False):
        return False
    parents = (module for module in causal_lm(model).modules() if any(child is head for child in module.children()))
    return any(any(module is decoder for module in parent.modules()) for parent in parents)


_plain: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # base -> its head, and what was seen


def is_plain(model: nn.Module, batch: Batch) -> bool:
    """Whether a model's logits are those of `logits_of_hidden`.

    Told by a forward without grad of the batch's first row, once for each model and head.
    """
    refuse_encoder_decoder(model)
    base, key = causal_lm(model), id(head_of(model))
    known = _plain.get(base)
    if known is not None and known[0] == key:
        return known[1]
    if not batch.shape[0]:
        return True  # not told by this batch
    logits, own = _both(unwrap(model), batch)
    if logits.shape == own.shape and not bool((logits.isfinite() & own.isfinite()).all()):
        return True  # nor by this one
    alike = logits.shape == own.shape and bool((logits - own).abs().max() <= _TOLERANCE * logits.abs().max())
    _plain[base] = key, alike
    return alike


def check_head(model: nn.Module, batch: Batch) -> None:
    """Refuse a model whose logits are not those of `logits_of_hidden`.

    Raises:
        ValueError: they are not.
    """
    if not is_plain(model, batch):
        raise ValueError(
            f"The logits of {type(causal_lm(model)).__name__} are not its output embedding times the last hidden state "
            "(with a scale or cap that is known here), so that log-probabilities and KLs made from that state would be "
            'wrong. Use estimator="ghost" or "difference", and no kl_coef.'
        )


def _both(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position's logits in the first row (or in all), of the model and of its hidden state."""
    device = causal_lm(model).get_input_embeddings().weight.device  # type: ignore[operator]
    given = [value for value in batch.inputs.values() if isinstance(value, torch.Tensor)]
    if all(value.shape[:1] == batch.shape[:1] for value in given):  # not so of the patches of images
        batch = batch.of_rows(slice(1))
    inputs = {**batch.to(device).inputs, "use_cache": False}
    if "logits_to_keep" in arguments(causal_lm(model)):
        inputs["logits_to_keep"] = 1
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        kept.append(hidden_of(output))

    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), autocast_without_cache(device.type), without_noise(model), Changes() as changes:
        changes.hook(find_decoder(model), keep)
        with torch.random.fork_rng(devices) if may_draw(model) else contextlib.nullcontext():
            logits = model(**inputs).logits[:, -1]
        own = logits_of_hidden(model, kept[-1][:, -1])
    return logits.float(), own.float().to(logits.device)
