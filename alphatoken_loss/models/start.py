"""Where training started, for models that adapters off do not take back there.

Most adapters add nothing at first: with adapters off, the network is the one that training started from. Not so if

- the initialisation moved a part of the base into the adapter (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA): with adapters off,
  only the rest of the base runs. The reference has the adapters on, with the values they started from;
- something beside the adapters is trained (LoRA with `bias="all"` or `"lora_only"`, parameters unfrozen by hand): it
  stays trained with adapters off. The reference has adapters off, and these at the values they started from.

Those values are copied when this library first sees the model (an `AlphaToken` or a trainer is made, a Fisher is
estimated, a reference is needed). This must be before the first step. What becomes trainable later is copied when
the next `AlphaToken` is made. A Fisher keeps them in its file.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .changes import Changes
from .layout import modules_of
from .structure import name_in, unwrap

REFERENCE_ADAPTER = "ref"  # TRL's name for the adapter that holds the reference when an adapter is trained further
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of LoraConfig.init_lora_weights


@dataclass(frozen=True)
class Start:
    """What a reference needs beside the network itself.

    Attributes:
        tensors (`dict`): parameter name, as in `model.named_parameters()`, -> its value when training started.
        adapters_on (`bool`): the reference is the network with adapters on, at these values; else with them off.
        base (`torch.Tensor` or `None`): some numbers of the adapted weights, which tell if an initialisation left
            another base.
        told (`bool`): it is what `remember_start` was called for.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapters_on: bool = False
    base: torch.Tensor | None = None
    told: bool = False


NOWHERE_ELSE = Start()
_starts: WeakKeyDictionary[nn.Module, Start] = WeakKeyDictionary()


def start_of(model: nn.Module) -> Start:
    """The start of a model. At the first call for a model it is copied."""
    model = unwrap(model)
    if model not in _starts:
        _starts[model] = _copied(model, adapters_on=_moved_bases(model))
    return _starts[model]


def see_start(model: nn.Module) -> None:
    """`start_of` where training is set up: what has become trainable since the model was first seen, or the adapter
    that was added, is copied too. It has not moved before."""
    model = unwrap(model)
    known = start_of(model)
    if REFERENCE_ADAPTER in getattr(model, "peft_config", {}):
        return
    adapters_on = known.adapters_on or _moved_bases(model)
    new = {name: p for name, p in _wanted(model, adapters_on).items() if name not in known.tensors}
    if new:
        _starts[model] = Start({**known.tensors, **_clones(new)}, adapters_on, _numbers(model), known.told)


def remember_start(model: nn.Module) -> None:
    """Make the model as it is now its reference, wherever `ref_model` is None and it has no adapter "ref".

    For an adapter that holds a part of its base and does not say so (of LoftQ or PiSSA, loaded from a file), or that is
    trained further and whose drift is to be measured from where it is, not from the base. Call it before the first
    step; it replaces an earlier start, and stays where a Fisher that is used later keeps another one.

    Args:
        model (`nn.Module`): a model with adapters.
    """
    _starts[unwrap(model)] = replace(_copied(unwrap(model), adapters_on=True), told=True)


def adopt_start(model: nn.Module, start: Start) -> None:
    """Use the start that a Fisher kept. A resumed run needs it: its adapters are trained already.

    The start of another base is not used: if an initialisation draws random numbers, this run's own start is right.
    Nor is one beside a start that `remember_start` was called for.
    """
    known = _starts.get(unwrap(model), NOWHERE_ELSE)
    if not known.told:
        _adopted(model, start)
    elif any(not torch.equal(known.tensors[n], t.to(known.tensors[n])) for n, t in start.tensors.items()
             if n in known.tensors):  # fmt: skip
        warnings.warn(
            "The Fisher keeps another start than the one that remember_start noted for this model. The latter is the "
            "reference.",
            stacklevel=4,
        )


def resume_start(model: nn.Module, start: Start) -> None:
    """Use the start that a run's own state kept.

    Raises:
        ValueError: it is not of this model, or of another base.
    """
    if start.tensors and not _adopted(model, start):
        raise ValueError(
            "The state's start, from which drift and KL are measured, is of other parameters or another base than this "
            "model's. Make the model as it was made then (same base, adapters and initialisation), and load their "
            "weights before the state."
        )


def _near(base: torch.Tensor, here: torch.Tensor) -> bool:
    same = base.shape == here.shape
    return same and torch.allclose(base, here, rtol=1e-3, atol=1e-3 * float(here.abs().max()))


def _adopted(model: nn.Module, start: Start) -> bool:
    model = unwrap(model)
    own = dict(model.named_parameters())
    if not start.tensors or any(name not in own or own[name].shape != t.shape for name, t in start.tensors.items()):
        return False
    here = _numbers(model)
    if (start.base is None) != (here is None):
        return False
    if start.base is not None and here is not None and not _near(start.base.to(here), here):
        return False
    tensors = {name: tensor.to(own[name]) for name, tensor in start.tensors.items()}
    _starts[model] = Start(tensors, start.adapters_on, here, start.told)
    return True


@contextlib.contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run a model with other tensors in the place of parameters, tied ones too; nothing is written to these."""
    named = dict(model.named_parameters()) if tensors else {}
    with Changes() as changes:
        changes.replace_named(model, {name: tensor.to(named[name]) for name, tensor in tensors.items()})
        yield


def add_reference_adapter(model: nn.Module, *, precomputed: bool = False) -> None:
    """Add the adapter "ref", which TRL's own losses use, to a model that adapters off do not take back to its start.

    Args:
        precomputed (`bool`): the reference of those losses has been run already.

    Raises:
        ValueError: it has been run, with adapters off, or parameters are trained that an adapter cannot hold.
    """
    model = unwrap(model)
    start = start_of(model)
    config = getattr(model, "peft_config", {})
    if not start.tensors or REFERENCE_ADAPTER in config:
        return
    if precomputed and start.adapters_on:
        raise ValueError(
            "precompute_ref_log_probs=True has run the reference with adapters off, but this adapter's initialisation "
            "took its part out of the base, which is no reference. Set precompute_ref_log_probs=False, or initialise "
            "the adapter with init_lora_weights=True."
        )
    active: list[str] = list(model.active_adapters)  # type: ignore[arg-type]
    if len(active) != 1:
        raise ValueError(
            f"The adapters {', '.join(active)} are active together, and what is trained does not go back to its start "
            "when they are off, so that this trainer's reference would need a copy of each. Choose one with "
            "set_adapter(), or pass ref_model."
        )
    name = active[0]
    named, of_adapters = dict(model.named_parameters()), _of_adapters(model)
    beside = [n for n in start.tensors if id(named[n]) not in of_adapters]
    if beside:
        raise ValueError(
            f"{beside[0]} is trained beside the adapters ({len(beside)} such parameters) and stays trained when they "
            'are off, so this trainer\'s reference would move with the policy. Use bias="none" and train adapters '
            "alone, or pass ref_model."
        )
    from copy import deepcopy

    plain = deepcopy(config[name])
    plain.init_lora_weights = True
    model.add_adapter(REFERENCE_ADAPTER, plain)  # type: ignore[operator]
    named = dict(model.named_parameters())
    with torch.no_grad():
        for own, tensor in named.items():
            of = name_in(name, own, REFERENCE_ADAPTER, named)
            if of is not None:
                tensor.copy_(start.tensors.get(of, named[of]))
    _starts[model] = NOWHERE_ELSE  # the adapter "ref" has it now


def _copied(model: nn.Module, *, adapters_on: bool) -> Start:
    wanted = _wanted(model, adapters_on)
    return Start(_clones(wanted), adapters_on, _numbers(model)) if wanted else NOWHERE_ELSE


def _wanted(model: nn.Module, adapters_on: bool) -> dict[str, nn.Parameter]:
    """The parameters whose values at the start a reference needs; none of a model without adapters."""
    if not switchable(model):
        return {}
    left_out = set() if adapters_on else _of_adapters(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in left_out}


def _clones(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _of_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters that adapters add."""
    found: set[int] = set()
    for wrapper, inner in switchable(model):
        inside = set() if inner is None else {id(p) for p in inner.parameters()}
        found |= {id(p) for p in wrapper.parameters() if id(p) not in inside}
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether there is anything to switch off: PEFT's wrapper, or adapters that transformers put into the model."""
    from peft import PeftModel

    return isinstance(unwrap(model), PeftModel) or bool(switchable(unwrap(model)))


def switchable(model: nn.Module) -> list[tuple[nn.Module, nn.Module | None]]:
    """PEFT's modules that can be switched off, each with the module that then runs."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[tuple[nn.Module, nn.Module | None]] = []
    for module in modules_of(model):
        if isinstance(module, BaseTunerLayer):
            found.append((module, getattr(module, "base_layer", None)))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found.append((module, getattr(module, "original_module", None)))
    return found


def _moved_bases(model: nn.Module) -> bool:
    """Whether the initialisation of an active adapter moved a part of the base into it."""
    config = getattr(model, "peft_config", {})
    active = {name for module, _ in switchable(model) for name in getattr(module, "active_adapters", ())}
    inits = (str(getattr(config[name], "init_lora_weights", "")).lower() for name in active if name in config)
    return any(init.startswith(_MOVES_THE_BASE) for init in inits)


def _weight(module: nn.Module | None, of_adapters: set[int]) -> torch.Tensor | None:
    """A weight of an adapted module: that of a linear, or the first of experts that are one module."""
    weight = getattr(module, "weight", None)
    if module is None or isinstance(weight, torch.Tensor):
        return weight
    return next((p for p in module.parameters() if id(p) not in of_adapters), None)


def _numbers(model: nn.Module) -> torch.Tensor | None:
    of_adapters, found = _of_adapters(model), []
    weights = [w for _, inner in switchable(model) if (w := _weight(inner, of_adapters)) is not None]
    weights = [w for w in weights if not w.requires_grad and w.device.type != "meta"]  # not what moves, or is away
    for weight in weights[:: max(1, len(weights) // 8)]:
        flat = weight.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long()
        found.append(flat[places.to(flat.device)].double().cpu())
    return torch.cat(found) if found else None
