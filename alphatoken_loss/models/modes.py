"""The modes a model runs in (dropout, checkpointing, hooks on saved tensors), changed for a while and put back."""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .changes import Changes
from .layout import modules_of, plain

# Up to transformers 5.22 a checkpoint wraps a block's `__call__`: its hooks run again when the block is recomputed.
HOOKS_INSIDE_CHECKPOINT = "__call__" in GradientCheckpointingLayer.__dict__


def checkpointed(block: nn.Module) -> bool:
    """Whether a block's forward is recomputed in backward.

    Raises:
        ValueError: it is recomputed in a way that hides its training forward from hooks.
    """
    if not (block.training and getattr(block, "gradient_checkpointing", False)):
        return False
    if HOOKS_INSIDE_CHECKPOINT and _reentrant(getattr(block, "_gradient_checkpointing_func", None)):
        raise ValueError(
            "Reentrant checkpointing hides the training forward from hooks in this version of transformers. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, or transformers 5.23.'
        )
    return True


def _reentrant(function: Any, depth: int = 8) -> bool:
    """Whether a checkpointing function was given use_reentrant=True, also inside wrappers such as LLaMA-Factory's."""
    options = getattr(function, "keywords", {})
    if "use_reentrant" in options:
        return bool(options["use_reentrant"])
    cells = (cell.cell_contents for cell in getattr(function, "__closure__", None) or () if not _is_empty(cell))
    inner = (getattr(function, "func", None), getattr(function, "__wrapped__", None), *cells)
    return depth > 0 and any(_reentrant(each, depth - 1) for each in inner if callable(each))


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def without_checkpointing(module: nn.Module) -> Iterator[None]:
    """Run a forward without gradient checkpointing, which only warns if no gradient is needed."""
    with Changes() as changes:
        for child in modules_of(module):
            if plain(child, "gradient_checkpointing"):
                changes.set(child, "gradient_checkpointing", False)
        yield


@contextlib.contextmanager
def without_noise(*modules: nn.Module) -> Iterator[None]:
    """Run modules without dropout, NEFTune's noise and gradient checkpointing; all else is computed as before.

    4-bit linears always run in training mode: in evaluation mode on a CPU, bitsandbytes repacks their weights in place,
    to a form without a backward. Other linears keep their mode.
    """
    with Changes() as changes:
        for child in modules_of(*modules):
            mode = child.training
            if "quant_state" in vars(child) or hasattr(type(child), "quant_state"):
                mode = True
            elif mode and (child._modules or _is_dropout(child) or isinstance(child, nn.Embedding)):
                mode = False  # for an embedding: NEFTune's hook adds noise in training mode
            if mode != child.training:
                changes.set(child, "training", mode)
            if plain(child, "gradient_checkpointing"):
                changes.set(child, "gradient_checkpointing", False)
        yield


def autocast_without_cache(device: str) -> torch.autocast:
    """Autocast as it is now, without its cache: the model must not reuse casts made here, some without a graph."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def draws_noise(module: nn.Module) -> bool:
    """Whether a module in its present mode applies dropout."""
    return any(
        child.training and (plain(child, "attention_dropout") or (_is_dropout(child) and _rate(child) > 0))
        for child in modules_of(module)
    )


_KNOWN = ("torch.", "transformers.", "peft.", "bitsandbytes.")


def may_draw(model: nn.Module) -> bool:
    """Whether a forward may take random numbers: also by its config's other rates, by hooks on embeddings, and by
    modules that are neither torch's nor of the libraries that this one knows."""
    settings = vars(getattr(model, "config", None) or types.SimpleNamespace())
    rates = (value for name, value in settings.items() if re.search("drop|jitter|noise", name))
    everything = modules_of(model)
    if not all(name.startswith(_KNOWN) for name in {type(child).__module__ for child in everything}):
        return True
    modules = [child for child in everything if child.training]
    hooked = any(child._forward_hooks for child in modules if isinstance(child, nn.Embedding))  # NEFTune's noise
    return draws_noise(model) or (bool(modules) and any(isinstance(x, int | float) and x > 0 for x in rates)) or hooked


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd | nn.RNNBase)


def _rate(module: nn.Module) -> float:
    return module.dropout if isinstance(module, nn.RNNBase) else module.p  # type: ignore[return-value]


def saved_tensors_hooked() -> bool:
    """Whether saved tensors go through hooks, which may return them only once (as TRL's offloading does)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def unhooked() -> contextlib.AbstractContextManager[Any]:
    """Save tensors without any hooks."""
    if not saved_tensors_hooked():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("Token values need gradients, and torch.inference_mode() rules them out. Leave it first.")


def overwrites_saved(module: nn.Module) -> bool:
    """Whether kernels run in it whose backward writes its gradients into what autograd saved (Liger's SwiGLU and
    GeGLU do, also from the Hub, and Unsloth's), unseen by autograd's own check."""
    names = (getattr(child.forward, "__module__", None) or "" for child in modules_of(module))
    return any(name.startswith(("liger", "unsloth")) for name in names)


def walked_once(blocks: list[nn.Module]) -> bool:
    """Whether the graph of a training forward can be walked only once, or is not the one that values are taken in:
    blocks are recomputed in backward, draw dropout noise, or what they save comes back only once or overwritten.

    Raises:
        ValueError: a block's training forward is hidden from hooks.
    """
    once = [checkpointed(block) or draws_noise(block) or overwrites_saved(block) for block in blocks]
    return any(once) or saved_tensors_hooked()
