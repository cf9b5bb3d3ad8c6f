"""Trainers on small models and data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tuning import arguments, base, dpo_data, lora, sft_data, tokenizer


def feature(
    form: str = "plain", model: Any = base, peft: Any = lora, options: Any = None, **args: Any
) -> dict[str, Any]:
    return {"form": form, "model": model, "peft": peft, "options": options or dict, "args": args}


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    nll = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return nll / num_items_in_batch


def offload_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own offloading, which asks for an accelerator, on a CPU: copies, and tensors that unpack once."""
    from trl.models.activation_offloading import OffloadActivations

    def manager(model: torch.nn.Module) -> OffloadActivations:
        offloading = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=0)
        offloading.update_model_params(model)
        return offloading

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    for module in ("sft", "dpo"):
        monkeypatch.setattr(f"trl.trainer.{module}_trainer.get_act_offloading_ctx_manager", manager)


def make(
    kind: str,
    trainer_class: Any,
    case: dict[str, Any],
    folder: Any,
    *,
    ours: bool = True,
    evaluate: bool = False,
    **changes: Any,
) -> Any:
    """A trainer of one feature; a stock one without what only ours takes."""
    make_data = sft_data if kind == "sft" else dpo_data
    data = make_data(case["form"])
    options = case["options"]()
    if evaluate:
        options["eval_dataset"] = make_data(case["form"], count=5, first=30)
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    if ours:
        options.setdefault("target_dataset", sft_data(case["form"], count=4, first=50))
    elif kind == "sft":
        options.pop("ref_model", None)
    return trainer_class(
        case["model"](),
        args=arguments(kind, folder, **{**case["args"], **changes}),
        train_dataset=data,
        processing_class=tokenizer(chat=case["form"] in ("chat", "messages")),
        peft_config=case["peft"]() if case["peft"] else None,
        **options,
    )
