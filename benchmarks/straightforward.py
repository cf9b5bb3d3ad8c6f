"""The method as one would first write it, in plain PyTorch: what step_cost.py measures the library against.

Validation sequences ride in the training forward; attention maps of every layer are asked for; each scored linear's
token-by-token Gram matrices between training and validation tokens give the target terms; Fisher times drift is formed
as a (d_out, d_in) matrix; and the masked loss takes a second backward through everything. Kept short on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

Batch = Mapping[str, torch.Tensor]


def straightforward_step(
    model: nn.Module,
    batch: Batch,
    validation: Batch,
    *,
    layers: int,
    window: int = 32,
    rho: float = 0.5,
    stability_weight: float = 1.5,
) -> torch.Tensor:
    """One masked SFT step of AlphaToken (arXiv 2606.01635, Eqs. 8 to 13) on LoRA's A and B of the last blocks.

    The model must have been loaded with eager attention, which alone returns its maps. Gradients go to `.grad`.

    Returns:
        `(B, T)` float 0/1: the rows that were kept.
    """
    rows = {key: torch.cat([batch[key], validation[key]]) for key in ("input_ids", "attention_mask", "labels")}
    size = len(batch["input_ids"])
    blocks = model.get_base_model().model.layers  # type: ignore[operator]
    seen: list[tuple[str, int, nn.Module, torch.Tensor, torch.Tensor]] = []
    handles = []

    def keep(name: str, index: int) -> object:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.retain_grad()
            seen.append((name, index, module, args[0].detach(), output))

        return hook

    for index in range(len(blocks) - layers, len(blocks)):
        for name, module in blocks[index].named_modules():
            if isinstance(module, nn.Linear) and "lora_" in name:
                handles.append(module.register_forward_hook(keep(name, index)))  # type: ignore[arg-type]
    model.get_base_model().set_attn_implementation("eager")  # type: ignore[operator]
    output = model(
        input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False, output_attentions=True
    )
    for handle in handles:
        handle.remove()
    following = F.pad(rows["labels"][:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(output.logits.flatten(0, 1).float(), following.flatten(), reduction="none")
    losses = losses.view(following.shape)
    losses.sum().backward(retain_graph=True)
    response = following != -100
    counted = response[size:].flatten()

    values = torch.zeros(batch["input_ids"].shape)
    distance = torch.arange(following.shape[1])[:, None] - torch.arange(following.shape[1])
    band = ((distance > 0) & (distance <= window)).float()
    for name, index, module, inputs, out in seen:
        error = out.grad
        assert error is not None
        d, h = error[:size], inputs[:size]
        errors = [d]
        if "v_proj" in name:
            attention = output.attentions[index][:size].mean(1) * band
            errors.append(attention.transpose(1, 2) @ d)
        d_val, h_val = error[size:].flatten(0, 1)[counted], inputs[size:].flatten(0, 1)[counted]
        # A stand-in for the drift: a Fisher of ones times the factor itself, formed whole.
        drift = torch.ones_like(module.weight) * module.weight.detach()  # type: ignore[arg-type, operator]
        for e in errors:
            gram = (e.flatten(0, 1) @ d_val.T) * (h.flatten(0, 1) @ h_val.T)
            values += gram.sum(1).view(values.shape) / counted.sum()
            values += stability_weight * ((e @ drift) * h).sum(-1)
    model.zero_grad()
    threshold = values[response[:size]].quantile(1 - rho)
    kept = (values >= threshold) & response[:size]
    (losses[:size] * kept).sum().div(kept.sum()).backward()
    return kept.float()
