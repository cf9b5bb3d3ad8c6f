"""What a masked step costs the host, apart from arithmetic: a model as deep as a large one and very narrow.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --json benchmarks/results/host_time.json

Where a GPU is fast, it waits for Python: a step of an 8B model dispatches as many operations as this one, and its
modules are looked at as often. 32 blocks of a Llama of width 16, LoRA on all linears, 2 rows of 8 tokens. Settings take
turns, and medians over the rounds are told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaToken, AlphaTokenConfig, sft_loss

Batch = dict[str, torch.Tensor]


def some_batch(generator: torch.Generator) -> Batch:
    ids = torch.randint(64, (2, 8), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(torch.arange(8) < 3, -100),
    }


def make_steps(blocks: int) -> dict[str, Callable[[], None]]:
    """A forward and a backward of each setting, on one model."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **size))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    batch, target = some_batch(generator), [some_batch(generator)]
    seldom = {"target_every": 10**6}
    configs = {
        "ghost, K = 3": AlphaTokenConfig(**seldom),
        "difference": AlphaTokenConfig(estimator="difference", **seldom),
        "path, as in `best()`": AlphaTokenConfig.best(path_steps=2, path_rate=1e-3),
    }

    def plain(grad: bool = True) -> None:
        with torch.set_grad_enabled(grad):
            loss = model(**batch, use_cache=False).loss
        if grad:
            loss.backward()

    def stepping(weights: AlphaToken | torch.Tensor) -> Callable[[], None]:
        return lambda: sft_loss(model, batch, weights).backward()

    given = AlphaToken(model, selection="given")

    def with_given() -> None:
        with given(batch, weights=torch.ones(2, 8)):
            model(**batch, use_cache=False).loss.backward()

    masked = {name: stepping(AlphaToken(model, target=target, config=config)) for name, config in configs.items()}
    return {"plain": plain, "a forward without grad": lambda: plain(False), "weights given": with_given, **masked}


def measure(blocks: int, rounds: int) -> dict[str, dict[str, float]]:
    steps, seconds = make_steps(blocks), {}
    for step in steps.values():  # targets, theta*, and what is found once
        step()
        step()
    for _ in tqdm(range(rounds), desc="rounds", dynamic_ncols=True):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: {"ms": 1000 * time, "ratio": time / found["plain"]} for name, time in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.blocks, args.rounds)
    for name, each in found.items():
        print(f"{name:24} {each['ms']:8.1f} ms  {each['ratio']:5.2f} of a plain step")
    if args.json:
        results.write(args.json, found, settings=args)


if __name__ == "__main__":
    main()
