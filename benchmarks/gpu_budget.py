"""Time and memory of gated QLoRA steps on Llamas of 1B, 3B and 8B shape, beside a plain step; needs no download.

    python benchmarks/gpu_budget.py --size 8b --cap-gib 12 --json results/gpu_budget.json   # on a CUDA device
    python benchmarks/gpu_budget.py --device cpu --size tiny --rounds 2                      # the script itself
    python benchmarks/gpu_budget.py --budget --size 8b                                       # arithmetic, no run

Models (llamas.py) have random weights, in NF4 with double quantisation and bf16 compute; embeddings, head and norms are
bf16. Adapters are LoRA r=16 on all linears, in float32, under bf16 autocast and non-reentrant checkpointing, trained by
paged 8-bit AdamW: SFT at 1 x 2,048 tokens, DPO at a pair of 1,024 each. Log-probabilities come from a head that never
holds whole logits: TRL's fused one, or chunks of rows without TRL.

Time: medians over rounds in which the kinds of step run in turn, forward and back. "+ refresh" adds what keeping the
target fresh costs at the default schedule, 8 validation sequences to a step of 64, at the time that `target_gradient`
took here on a batch of as many sequences as a step's. Operations, views included: what the host has to dispatch in a
step, and a fast device to wait for. Memory: each kind alone, the peak of tensors and of what the allocator reserved,
model included; "beyond" compares what a step and its gate add to the model and optimizer. CUDA's own context (in the
heading) and the optimizer's paged state come on top of the reserved. On a CPU what was allocated within a step counts.
Tables are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from arithmetic import budget
from llamas import SIZES, build, optimizer_of
from results import write
from step_cost import EFFECTIVE, VALIDATION, batch_of, peak_bytes, uniform_fisher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alphatoken_loss import AlphaToken, AlphaTokenConfig, dpo_loss, target_gradient
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses.logps import _trls_head, token_logps
from alphatoken_loss.losses.preference import reference_logps

Step = Callable[[], object]
Row = dict[str, Any]
GIB = 2**30
KINDS: dict[str, dict[str, Any]] = {
    "ghost, K=3": {"estimator": "ghost", "num_layers": 3},
    "difference, all": {"estimator": "difference"},
}
GOALS = {"ghost, K=3": "at most 1.08, 1.02", "difference, all": "at most 1.40, 1.02"}  # of a plain step's


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Operations(TorchDispatchMode):
    """Counts what torch dispatches, views included: what the host has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Bench:
    """One model and task: its steps, plain and gated.

    Args:
        task (`str`): "sft" or "dpo".
        reference (`str`): "precomputed" log-probabilities, or "adapters", a forward with adapters off in each step.
    """

    def __init__(self, model: nn.Module, size: str, task: str, reference: str, device: torch.device) -> None:
        self.model, self.task, self.device = model, task, device
        self.optimizer = optimizer_of(model)
        rows, length = (1, 2048) if task == "sft" else (2, 1024)
        shape = argparse.Namespace(vocabulary=SIZES[size][5], length=length // 32 if size == "tiny" else length)
        self.examples = {k: v.to(device) for k, v in batch_of(shape, rows).items()}
        self.batch = {k: v.to(device) for k, v in batch_of(shape, rows, pairs=task == "dpo").items()}
        if task == "dpo":
            names = ("ref_chosen_logps", "ref_rejected_logps")
            rest = {k: v for k, v in self.batch.items() if k not in names}
            with self.autocast():
                sums = reference_logps(model, None, read_batch(rest)).chunk(2)
            self.batch = rest if reference == "adapters" else {**rest, **dict(zip(names, sums, strict=True))}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(self, gate: AlphaToken | None) -> torch.Tensor:
        with self.autocast():
            if self.task == "dpo":
                return dpo_loss(self.model, None, self.batch, gate)
            read = read_batch(self.batch)
            with contextlib.nullcontext() if gate is None else gate(self.batch, mean_over_kept=True):
                return -token_logps(self.model, read, fused=True).sum() / read.rows.sum()

    def step(self, gate: AlphaToken | None = None) -> None:
        self.loss(gate).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def target(self, config: AlphaTokenConfig) -> Any:
        with self.autocast():
            return target_gradient(self.model, [self.examples], config=config)

    def named(self, name: str) -> Step:
        """A row's step, with what it keeps from step to step."""
        if name == "plain":
            return self.step
        config = AlphaTokenConfig(**KINDS[name.removeprefix("target of ")])
        if name.startswith("target of"):
            return lambda: self.target(config)
        target = self.target(config)
        fisher = uniform_fisher(self.model, target.gradients)
        gate = AlphaToken(self.model, target=target, fisher=fisher, config=config)
        return lambda: self.step(gate)

    @contextlib.contextmanager
    def reporting(self, row: Row) -> Iterator[None]:
        """Note out of memory in the row instead of failing, and let go of what the step had made."""
        try:
            yield
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        if "error" in row:
            self.optimizer.zero_grad()
            release()

    def memory(self, row: Row, step: Step) -> None:
        """Bytes in GiB: resident before a step, and the most that lived, and was reserved, within one."""
        if self.device.type == "cpu":
            resident = sum(p.nbytes for p in self.model.parameters()) / GIB
            peak = resident + peak_bytes(step) / GIB
            row.update({"resident GiB": resident, "peak GiB": peak, "reserved GiB": peak})
            return
        release()
        torch.cuda.reset_peak_memory_stats()
        row["resident GiB"] = torch.cuda.memory_allocated() / GIB
        step()
        row["peak GiB"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved GiB"] = torch.cuda.max_memory_reserved() / GIB

    def run(self, rounds: int) -> dict[str, Row]:
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        names = ["plain", *KINDS, *(f"target of {name}" for name in KINDS)]
        table: dict[str, Row] = {name: {} for name in names}
        for name in names:  # alone: no other kind's target is held
            with self.reporting(table[name]):
                step = self.named(name)
                step()  # makes the optimizer's state, finds the difference's step length
                self.memory(table[name], step)
                with Operations() as operations:
                    step()
                table[name]["operations"] = operations.count
            step = None  # type: ignore[assignment]
        steps: dict[str, Step] = {}
        for name in (name for name in names if "error" not in table[name]):
            with self.reporting(table[name]):
                steps[name] = self.named(name)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for name in list(steps)[:: -1 if number % 2 else 1]:
                with self.reporting(table[name]):
                    synchronize()
                    start = time.perf_counter()
                    steps[name]()
                    synchronize()
                    times[name] += [time.perf_counter() - start] if number else []  # the first round warms up
                if "error" in table[name]:
                    del steps[name]
        for name in steps:
            table[name]["seconds"] = statistics.median(times[name])
        compare(table, times)
        return table


def compare(table: dict[str, Row], times: dict[str, list[float]]) -> None:
    """Add the ratios to the plain step, round by round in time."""
    default, plain = AlphaTokenConfig(), table["plain"]
    share = VALIDATION / (default.target_parts * default.target_every * EFFECTIVE)
    if "seconds" not in plain:
        return
    for name, row in table.items():
        if "seconds" in row:
            row["time ratio"] = statistics.median(t / p for t, p in zip(times[name], times["plain"], strict=True))
            row["memory ratio"] = row["peak GiB"] / plain["peak GiB"]
            beyond, plain_beyond = (r["peak GiB"] - plain["resident GiB"] for r in (row, plain))
            row["beyond ratio"] = beyond / plain_beyond
    for name in KINDS:
        target = table[f"target of {name}"]
        if "time ratio" in target and "time ratio" in table[name]:
            table[name]["with refresh"] = table[name]["time ratio"] + share * target["time ratio"]


COLUMNS = {
    "seconds": "s/step",
    "time ratio": "time",
    "with refresh": "+ refresh",
    "operations": "operations",
    "peak GiB": "peak GiB",
    "reserved GiB": "reserved GiB",
    "memory ratio": "memory",
    "beyond ratio": "beyond",
}


def markdown(title: str, table: dict[str, Row]) -> str:
    lines = [f"| {title} | {' | '.join(COLUMNS.values())} | goal: time, memory |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in table.items():
        figures = [f"{row[key]:.{0 if key == 'operations' else 3}f}" if key in row else "" for key in COLUMNS]
        goal = GOALS.get(name, "every row within 12 GiB" if (name, title[:6]) == ("plain", "8b dpo") else "")
        lines.append(f"| {name} | {' | '.join(figures)} | {row.get('error', goal)} |")
    return "\n".join(lines)


def heading(device: torch.device, cap: float | None) -> str:
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")]
    head = f"TRL's fused head {version('trl')}" if _trls_head() else "chunked head, no TRL"
    if device.type == "cpu":
        return f"{date.today()}, CPU {platform.machine()}, {', '.join(packages)}, {head}"
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    used = (total - free - torch.cuda.memory_reserved(device)) / GIB
    limit = "no cap" if cap is None else f"capped at {cap:g} GiB"
    return (
        f"{date.today()}, {properties.name} of {total / GIB:.1f} GiB, {limit}, {used:.2f} GiB held by CUDA and others, "
        f"CUDA {torch.version.cuda}, {', '.join(packages)}, {head}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8b"], help="shapes (default 8b)")
    parser.add_argument("--task", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"], help="(default both)")
    parser.add_argument("--reference", choices=["precomputed", "adapters"], default="precomputed",
                        help="DPO's reference: given log-probabilities, or adapters off")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds after one to warm up (default 10)")
    parser.add_argument("--cap-gib", type=float, help="let the allocator have so many GiB of the device")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu takes tiny (default cuda)")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--markdown", help="append the tables to this file")
    parser.add_argument("--budget", action="store_true", help="only print the arithmetic")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    if not args.budget and args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: use --device cpu --size tiny")
    if not args.budget and args.device == "cpu" and args.size != ["tiny"]:
        parser.error(f"--device cpu with --size {' '.join(args.size)} would take hours: use --device cpu --size tiny")
    if args.cap_gib is not None and (args.device == "cpu" or not args.cap_gib > 0):
        parser.error("--cap-gib takes a positive number of GiB, on a CUDA device")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.budget:
        print("\n\n".join(budget(size, task) for size in args.size for task in args.task))
        return
    device = torch.device(args.device)
    if args.cap_gib is not None:
        share = args.cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    about, results = heading(device, args.cap_gib), dict[str, dict[str, Row]]()

    def tell(text: str) -> None:
        print(text + "\n", flush=True)
        if args.markdown:
            with open(args.markdown, "a") as file:
                file.write("\n" + text + "\n")

    tell(about)
    for size in args.size:
        try:
            model = build(size, device)
        except torch.OutOfMemoryError:
            tell(f"{size}: out of memory while the model was made")
            continue
        for task in args.task:
            title = f"{size} {task}"
            if task == "dpo" and args.reference == "adapters":
                title += ", reference by adapters off"
            try:
                bench = Bench(model, size, task, args.reference, device)
            except torch.OutOfMemoryError:
                tell(f"{title}: out of memory before the first step")
                continue
            results[title] = bench.run(args.rounds)
            tell(markdown(title, results[title]))
            if args.json:
                write(args.json, results, settings=args, device=device, about=about)
            del bench
        del model
        release()


if __name__ == "__main__":
    main()
