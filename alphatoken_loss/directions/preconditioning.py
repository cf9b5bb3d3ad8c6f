"""Directions scaled as Adam scales its steps.

A step of Adam moves the adapter by -P g, with P = lr / (sqrt(v) + eps) from its running average v of squared gradients
and the learning rate of the parameter's group (LoRA+ gives B a higher one), so what training on token t does to an
objective with gradient D is, to first order,

    <P grad l_t, D> = <grad l_t, P D>:

the ordinary value along P D. P is that of the steps so far. Momentum is left out, since no token of this batch can
change it, and so is a common scale. A sqrt(v) below a hundredth of its root mean square over all scored parameters is
raised to that, see `_FLOOR`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..models import tensors

# Of the root mean square of sqrt(v) over all scored parameters: entries that training has hardly reached (an A whose B
# was 0 until now, what 8 bits round to 0) would otherwise make up the whole direction.
_FLOOR = 0.01


def preconditioned(
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, dict[str, torch.Tensor]]:
    """Multiply each direction by Adam's P. Before the optimizer's first step they stay as they are.

    Args:
        parts (`dict`): part of the value -> parameter name -> direction.
        parameters (`dict`): the scored parameters by name.
        optimizer (`torch.optim.Optimizer`): one that keeps second moments: torch's Adam and AdamW and those of the same
            state, and bitsandbytes', 8-bit and paged ones included.

    Raises:
        ValueError: the optimizer has made a step and keeps no second moments, or not those of a scored parameter.
    """
    if not optimizer.state:
        return {part: dict(direction) for part, direction in parts.items()}
    roots = {name: _second_moment(optimizer, name, p).sqrt() for name, p in parameters.items()}  # an error, if none
    small = _epsilons(optimizer)
    roots = {name: root + small[id(parameters[name])].to(root.device) for name, root in roots.items()}
    mean = tensors.length_of(roots) / sum(root.numel() for root in roots.values()) ** 0.5
    floor = _FLOOR * torch.where(mean > 0, mean, 1.0)
    rates = _rates(optimizer, parameters)
    # At a learning rate of 0 nothing moves; the root is then inf.
    roots = {name: root.maximum(floor.to(root.device)) / rates[name] for name, root in roots.items()}
    return {part: tensors.divided(direction, roots) for part, direction in parts.items()}


def _epsilons(optimizer: torch.optim.Optimizer) -> dict[int, torch.Tensor]:
    """By the parameter's `id`: what Adam adds to the root of v, in the scale of v before its bias correction."""
    found: dict[int, torch.Tensor] = {}
    for group in optimizer.param_groups:
        state: dict[str, Any] = next((optimizer.state[p] for p in group["params"] if p in optimizer.state), {})
        step = torch.as_tensor(state.get("step", 0))  # a fused Adam's lies on the device: it is not read
        step = step.to(torch.float32 if step.device.type == "mps" else torch.float64)
        beta = group.get("betas", (0.0, 0.0))[1]
        correction = -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)  # 1 - beta^step
        found.update(dict.fromkeys(map(id, group["params"]), group.get("eps", 0.0) * correction**0.5))
    return found


def _rates(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """By name: the learning rate of the parameter's group, divided by the largest; 1 for all if all are 0."""
    of = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    rates = {name: of.get(id(p), 0.0) for name, p in parameters.items()}
    largest = max(rates.values())
    return {name: rate / largest if largest else 1.0 for name, rate in rates.items()}


def _second_moment(optimizer: torch.optim.Optimizer, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The running average of squared gradients, in float32 or better, of the parameter's shape."""
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if not state and any(parameter is p for group in optimizer.param_groups for p in group["params"]):
        return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))  # no gradient yet
    if "exp_avg_sq" in state:
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # AMSGrad's
        return second.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    second = state.get("state2")  # bitsandbytes; in 8 bits, block by block
    if second is not None and (second.dtype != torch.uint8 or "absmax2" in state):
        if second.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise

            second = dequantize_blockwise(second, absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
        return second.detach().float().view(parameter.shape)
    raise ValueError(
        f"The {type(optimizer).__name__} keeps no second moment of {name} (exp_avg_sq, or bitsandbytes' state2), but "
        f"{sorted(map(str, state)) or 'nothing'}. Give the Adam that trains this parameter, or no optimizer."
    )
