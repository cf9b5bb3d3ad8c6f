"""A training step of any trainer against the gradient of its masked loss, written out."""

from __future__ import annotations

import copy
from typing import Any

import torch


def masked_gradient(model: Any, inputs: dict[str, Any], weights: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """Of the summed loss of the tokens of weight 1, over all trained parameters in one vector; of pairs, at a margin of
    zero and up to a factor, that of the DPO loss: rejected answers (the second half) count the other way round."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    logps = model(**given, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    logps = logps.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    sign = torch.ones(len(logps), 1)
    if pairs:
        sign[len(logps) // 2 :] = -1
    loss = -(sign * weights[:, 1:] * logps).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def check_first_step(seen: dict[str, Any], *, pairs: bool) -> None:
    """The gradient of the first micro-batch is that of the masked loss, and not that of the whole one."""
    response = seen["response"].float()
    kept = seen["weights"]
    assert 0 < kept.sum() < response.sum() and not kept[response == 0].any()

    def cosine(weights: torch.Tensor) -> float:
        explicit = masked_gradient(seen["model"], seen["inputs"], weights, pairs=pairs).double()
        return float(torch.nn.functional.cosine_similarity(explicit, seen["gradient"].double(), dim=0))

    assert cosine(kept) > 1 - 1e-6
    assert cosine(response) < 0.99


def record(seen: dict[str, Any], trainer: Any, model: Any, inputs: dict[str, Any]) -> None:
    """Keep what a trainer's first micro-batch was and what it left, behind its `training_step`."""
    if "gradient" in seen:
        return
    given = {name: tensor.clone() for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
    response = given["completion_mask"] != 0 if "completion_mask" in given else given["labels"] != -100
    response[:, 0] = False
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in trained])
    seen.update(inputs=given, response=response, weights=trainer.alphatoken.weights.clone(), gradient=gradient)
    frozen = [p.requires_grad for p in model.parameters()]
    seen["model"] = copy.deepcopy(model)
    for parameter, trains in zip(seen["model"].parameters(), frozen, strict=True):
        parameter.requires_grad_(trains)
        parameter.grad = None
