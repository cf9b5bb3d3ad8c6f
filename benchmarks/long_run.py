"""Whether a long run stays as it began: memory, hooks, tensors and the time of a step over 2,000 gated steps.

    python benchmarks/long_run.py                 # each estimator in turn; some minutes of one core
    python benchmarks/long_run.py --steps 200

A small Llama with LoRA adapters is trained by AdamW on random sequences of two lengths, with a target estimated anew in
parts and a Fisher; figures are taken every twentieth part of the run. The first of these are a start, in which caches
fill; flat means that the last quarter of the run differs from the second quarter by no more than a step's own noise.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from results import FOLDER, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaToken, AlphaTokenConfig
from alphatoken_loss.models import changes

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARTS = 20


def small_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapter).train()


def batch_of(step: int, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 256, (rows, (24, 40)[step % 2]), generator=generator)
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def resident() -> float:
    """MiB of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def taken(model: nn.Module, milliseconds: list[float]) -> dict[str, float]:
    gc.collect()
    objects = gc.get_objects()
    return {
        "step ms": statistics.median(milliseconds),
        "resident MiB": resident(),
        "hooks": sum(len(getattr(module, name) or ()) for module in model.modules() for name in HOOKS),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in objects),
        "objects": len(objects),
        "journal": len(changes._journal.entries),
    }


def run(estimator: str, steps: int) -> dict[str, Any]:
    model = small_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    target = [batch_of(-1 - i, rows=8) for i in range(2)]
    alphatoken = AlphaToken(model, target=target, config=AlphaTokenConfig(estimator=estimator))
    every, times, series = max(steps // PARTS, 1), [], []
    for step in range(steps):
        batch = batch_of(step)
        started = time.perf_counter()
        with alphatoken(batch):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.perf_counter() - started))
        if (step + 1) % every == 0:
            alphatoken.metrics()
            series.append({"step": step + 1, **taken(model, times)})
            times = []
    return {"series": series, "change": change(series)}


def change(series: list[dict[str, float]]) -> dict[str, float]:
    """What the last quarter's median has over the second's; of times, as a ratio."""
    quarter = max(len(series) // 4, 1)
    early, late = series[quarter : 2 * quarter] or series, series[-quarter:]
    found = {}
    for name in series[0].keys() - {"step"}:
        first, last = (statistics.median(row[name] for row in rows) for rows in (early, late))
        found[name] = last / first if name == "step ms" else last - first
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run (default: 2000)")
    parser.add_argument(
        "--estimators", nargs="+", default=["ghost", "difference", "exact", "path"], help="which, in turn"
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "long_run.json", help="file of figures")
    args = parser.parse_args(argv)
    found = {}
    for estimator in args.estimators:
        found[estimator] = run(estimator, args.steps)
        shown = ", ".join(f"{name} {figure:.3g}" for name, figure in found[estimator]["change"].items())
        print(f"{estimator}: last quarter against the second: {shown}", flush=True)
    settings = {"steps": args.steps, "estimators": args.estimators}
    write(args.output, found, settings=settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
