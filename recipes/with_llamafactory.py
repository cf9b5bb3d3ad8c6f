"""Token values inside LLaMA-Factory 0.9, which has no hook for plugins: a context around its trainers' compute_loss.

    python recipes/with_llamafactory.py config.yaml    # what `llamafactory-cli train config.yaml` takes, sft or dpo

Beside LLaMA-Factory's own keys, the file has a key `alphatoken` with the fields of `AlphaTokenConfig`, and with
`target_size`, the training rows that define the target (32; they are trained on too, and should be clean). Reentrant
checkpointing, LLaMA-Factory's default, is switched off: it hides the training forward from hooks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from alphatoken_loss import AlphaToken, AlphaTokenConfig


def batch_of(inputs: dict[str, Any], *, pairs: bool) -> dict[str, Any]:
    """A batch as AlphaToken reads it; LLaMA-Factory stacks pairs, chosen first, with labels."""
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    if pairs:
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
    return batch


def target_of(trainer: Any, size: int, *, pairs: bool) -> list[dict[str, torch.Tensor]]:
    """Collated batches of the first training rows; of pairs, their chosen answers."""
    rows = [trainer.train_dataset[i] for i in range(min(size, len(trainer.train_dataset)))]
    step = trainer.args.per_device_train_batch_size
    batches = []
    for start in range(0, len(rows), step):
        batch = trainer.data_collator(rows[start : start + step])
        count = len(batch["input_ids"]) // (2 if pairs else 1)
        names = ("input_ids", "attention_mask", "labels")
        batches.append({name: batch[name][:count].to(trainer.args.device) for name in names})
    return batches


def with_values(trainer: type, config: AlphaTokenConfig, size: int, *, pairs: bool) -> None:
    """Let a trainer's class mask tokens of low value, and log what it kept."""
    plain = trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return plain(self, model, inputs, *args, **kwargs)
        if not hasattr(self, "alphatoken"):
            ref = getattr(self, "ref_model", None)
            self.alphatoken = AlphaToken(self.model, ref, target=target_of(self, size, pairs=pairs), config=config)
            self.add_callback(LogValues(self.alphatoken))
        count = kwargs.get("num_items_in_batch")
        with self.alphatoken(batch_of(inputs, pairs=pairs), num_items_in_batch=count) as step:
            found = plain(self, model, inputs, *args, **kwargs)
        if step.kl is None:
            return found
        return (found[0] + step.kl, *found[1:]) if isinstance(found, tuple) else found + step.kl  # path_kl

    trainer.compute_loss = compute_loss


class LogValues(TrainerCallback):
    """Prints the share kept and the mean value beside each logged loss."""

    def __init__(self, alphatoken: AlphaToken) -> None:
        self.alphatoken = alphatoken

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            print({f"alphatoken/{name}": round(value, 6) for name, value in self.alphatoken.metrics().items()})


def main(argv: list[str] | None = None) -> None:
    (path,) = sys.argv[1:] if argv is None else argv
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    own = settings.pop("alphatoken", {})
    if settings.setdefault("use_reentrant_gc", False):
        raise ValueError("use_reentrant_gc is true; token values need false, which is also the default here.")
    size, pairs = own.pop("target_size", 32), settings["stage"] == "dpo"
    with_values(CustomDPOTrainer if pairs else CustomSeq2SeqTrainer, AlphaTokenConfig(**own), size, pairs=pairs)
    run_exp(settings)


if __name__ == "__main__":
    main()
