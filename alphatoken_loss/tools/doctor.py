"""`alphatoken doctor MODEL`: what a user wants to know before a long run.

Which estimators take this model with its adapter, and why the others refuse; what is scored and what is not; how much
time and memory a step takes on this machine, beside a plain one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..config import AlphaTokenConfig
from ..estimators import ESTIMATORS
from ..gate.alphatoken import AlphaToken
from ..models.sites import find_scored
from ..models.structure import causal_lm, trained_behind
from .cli import or_exit

Step = Callable[[], None]


@or_exit("Lower --batch-size or --length.")
def run(args: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0, or 1 if no estimator takes the model."""
    from .score.scorer import load_model, read_device

    device = args.device = read_device(args.device)
    model: Any = load_model(args, device)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    print(_about(model))
    batch = _batch(model, args)
    plain = _plain(model, batch)
    found = {name: _step(model, batch, name) for name in ESTIMATORS}
    steps = {"plain": plain, **{name: step for name, step in found.items() if not isinstance(step, str)}}
    table = measure(steps, args.steps, device)
    print(f"\nA step of {args.batch_size} x {args.length} tokens on {device}, the target given:")
    seconds, peak = table["plain"]
    print(f"  {'plain':12} {seconds:8.3f} s         {peak / 2**20:8.0f} MiB beyond the weights")
    for name, step in found.items():
        if isinstance(step, str):
            print(f"  {name:12} refused: {step}")
            continue
        seconds_of, peak_of = table[name]
        ratios = f"{seconds_of / seconds:5.2f} x  {peak_of / 2**20:8.0f} MiB {peak_of / max(peak, 1):5.2f} x"
        print(f"  {name:12} {seconds_of:8.3f} s {ratios}")
        print(f"  {'':12} scores {_scored(model, name)}")
    return 0 if len(steps) > 1 else 1


def _about(model: nn.Module) -> str:
    base: Any = causal_lm(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    every = sum(p.numel() for p in model.parameters())
    lines = [
        f"{type(base).__name__}, {getattr(base.config, 'num_hidden_layers', '?')} layers, {every / 1e6:.1f} M "
        f"parameters as stored, {sum(p.numel() for p in trained.values()) / 1e6:.2f} M trained",
    ]
    behind = trained_behind(model)
    if behind:
        lines.append(f"Trained behind the decoder, where no gate masks: {', '.join(behind[:4])}")
    return "\n".join(lines)


def _scored(model: nn.Module, name: str) -> str:
    """What an estimator scores and what it leaves out, in words."""
    config = AlphaTokenConfig(estimator=name)
    scored = find_scored(model, config.scored_layers, config.scope)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = Counter(site.name.rsplit(".", 1)[-1] for site in scored.sites)
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    text = f"the last {len(scored.blocks)} of {scored.total} blocks: {listed}"
    left = trained - set(scored.parameters)
    if left:
        text += f"; not scored, but masked all the same: {len(left)} of {len(trained)} trained tensors"
    return text


def _batch(model: nn.Module, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random tokens; the second half of each sequence is the response."""
    size = causal_lm(model).get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(size, (args.batch_size, args.length), generator=generator)
    labels = ids.clone()
    labels[:, : args.length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def _plain(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    def step() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _step(model: nn.Module, batch: dict[str, torch.Tensor], name: str) -> Step | str:
    """A step with an estimator, or why it refuses."""
    plain = _plain(model, batch)
    try:
        config = AlphaTokenConfig(estimator=name, stability_weight=0.0)
        alphatoken = AlphaToken(model, target=[batch], config=config)  # the target is made once: nothing moves

        def step() -> None:
            with alphatoken(batch):
                plain()

        step()
    except torch.OutOfMemoryError:  # which is no refusal
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        model.zero_grad(set_to_none=True)
        return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return step


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, tuple[float, int]]:
    """Median seconds of each step, and peak bytes of tensors that it allocates; a round runs each once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: (statistics.median(times[name]), peak_bytes(step, device)) for name, step in steps.items()}


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak of the tensor memory that one step allocates, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _no_native_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _no_native_messages() -> Iterator[None]:
    """Silence the profiler's native code, which writes to the process' error stream and not to `logging`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
