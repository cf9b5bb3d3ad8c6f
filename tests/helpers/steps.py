"""A training step of any trainer against the gradient of its masked loss, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def masked_gradient(seen: dict[str, Any], weights: torch.Tensor, *, pairs: bool, beta: float = 0.1) -> torch.Tensor:
    """Of the summed loss of the tokens of weight 1, over all trained parameters in one vector, and of the KL to theta*
    where the trainer adds it. Of pairs, up to a factor, that of the DPO loss on whole sequences: the tokens of a pair
    by sigmoid(-margin), and rejected answers (the second half) the other way round."""
    model, inputs = seen["model"], seen["inputs"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}

    def log_softmax() -> torch.Tensor:
        return model(**given, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    def of_labels(logps: torch.Tensor) -> torch.Tensor:
        return logps.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]

    wanted = _at(model, seen["path"], log_softmax)  # before the pass whose graph is used
    logps, response = log_softmax(), seen["response"][:, 1:].float()
    factor = torch.ones(len(logps), 1)
    if pairs:
        with torch.no_grad(), model.disable_adapter():
            moved = ((of_labels(logps) - of_labels(log_softmax())) * response).sum(1)
        chosen, rejected = moved.detach().chunk(2)
        omega = torch.sigmoid(-beta * (chosen - rejected))
        factor = torch.cat([omega, -omega])[:, None]
    loss = -(factor * weights[:, 1:] * of_labels(logps)).sum()
    if seen["path_kl"]:
        assert not pairs, "not written out: a mean over pairs beside one over tokens"
        loss = loss + seen["path_kl"] * (response * (wanted.exp() * (wanted - logps)).sum(-1)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def _at(model: Any, parameters: dict[str, torch.Tensor], function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a function of the model returns when these parameters are in it."""
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in parameters}
    with torch.no_grad():
        for name, tensor in parameters.items():
            own[name].copy_(tensor)
        found = function()
        for name, tensor in before.items():
            own[name].copy_(tensor)
    return found


def check_step(seen: dict[str, Any], *, pairs: bool) -> None:
    """The gradient of the micro-batch that was recorded is that of the masked loss, and not that of the whole one."""
    response = seen["response"].float()
    kept = seen["weights"]
    assert 0 < kept.sum() < response.sum() and not kept[response == 0].any()

    def cosine(weights: torch.Tensor) -> float:
        explicit = masked_gradient(seen, weights, pairs=pairs).double()
        return float(torch.nn.functional.cosine_similarity(explicit, seen["gradient"].double(), dim=0))

    assert cosine(kept) > 1 - 1e-6
    assert cosine(response) < 0.99


def record(seen: dict[str, Any], trainer: Any, model: Any, inputs: dict[str, Any], *, step: int = 0) -> None:
    """Keep what the first micro-batch of a trainer's step was and what it left, behind its `training_step`."""
    if "gradient" in seen or trainer.state.global_step != step:
        return
    given = {name: tensor.clone() for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
    response = given["completion_mask"] != 0 if "completion_mask" in given else given["labels"] != -100
    response[:, 0] = False
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in trained])
    seen.update(inputs=given, response=response, weights=trainer.alphatoken.weights.clone(), gradient=gradient)
    path = trainer.alphatoken.path
    seen["path_kl"] = trainer.alphatoken.config.path_kl
    seen["path"] = {} if path is None else {name: tensor.clone() for name, tensor in path.parameters.items()}
    frozen = [p.requires_grad for p in model.parameters()]
    seen["model"] = copy.deepcopy(model)
    for parameter, trains in zip(seen["model"].parameters(), frozen, strict=True):
        parameter.requires_grad_(trains)
        parameter.grad = None
