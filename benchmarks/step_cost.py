"""What a gated training step costs beside a plain one, measured side by side in one process.

    python benchmarks/step_cost.py                     # 12 blocks, 43M parameters, 4 x 256 tokens, two cores
    python benchmarks/step_cost.py --blocks 24 --layers 2 --batch 1 --length 1024

Each kind of step runs in turn, round after round, and the ratios of a round are what is reported (median, and the
quartiles as spread). Peak memory is the high-water mark of tensors allocated during one step, beyond the model.
Floors: for the ghost estimator, without checkpointing the K scored blocks are gone back through twice, K/L of a
backward; with it they are run again besides, K/L of a forward and a backward. For the difference, one forward less its
head. For the exact one, K/L of a forward with tangents, which doubles its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, alphatoken_weights, sft_loss, target_gradient

Step = Callable[[], None]


def build(args: argparse.Namespace, checkpointing: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=args.rank, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def steps(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Step]:
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length))
    labels = ids.clone()
    labels[:, : args.length // 4] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def plain() -> None:
        model(**batch).loss.backward()
        update()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def gated(alphatoken: AlphaToken) -> Step:
        def step() -> None:
            with alphatoken(batch):
                model(**batch).loss.backward()
            update()

        return step

    found: dict[str, Step] = {"plain": plain}
    kinds: dict[str, dict[str, Any]] = {
        "difference, all": {"estimator": "difference"},
        f"exact, K={args.layers}": {"estimator": "exact", "num_layers": args.layers},
        "exact, all": {"estimator": "exact"},
        f"ghost, K={args.layers}, W=0": {"num_layers": args.layers, "causal_window": 0},
        f"ghost, K={args.layers}, W=32": {"num_layers": args.layers},
    }
    for name, options in kinds.items():
        config = AlphaTokenConfig(**options)
        target = target_gradient(model, [batch], config=config)
        fisher = uniform_fisher(model, target.gradients)
        if args.only is None or any(word in name for word in args.only):
            found[name] = gated(AlphaToken(model, target=target, fisher=fisher, config=config))
    if args.only is not None:
        return found

    def two_pass() -> None:
        weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config)
        sft_loss(model, batch, weights).backward()
        update()

    def weights_only() -> None:
        alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config)

    def target_only() -> None:
        target_gradient(model, [batch], config=config)

    return {**found, "weights + sft_loss": two_pass, "weights alone": weights_only, "target alone": target_only}


def uniform_fisher(model: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> Fisher:
    """A Fisher of ones: what it holds does not change what using it costs."""
    shapes: dict[str, list[int]] = {}
    for name, gradient in gradients.items():
        layer, _, factor = name.partition(".lora_")
        shapes.setdefault(layer, [0, 0])[0 if factor.startswith("B") else 1] = gradient.shape[factor.startswith("A")]
    return Fisher({layer: (torch.ones(out) * size, torch.ones(size) * out) for layer, (out, size) in shapes.items()})


def peak_bytes(step: Step) -> int:
    """High-water mark of live tensor memory allocated within one step."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    live = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def measure(found: dict[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, step in found.items():
            start = time.perf_counter()
            step()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    peaks = {name: peak_bytes(step) for name, step in found.items()}
    table = {}
    for name in found:
        ratios = sorted(t / p for t, p in zip(times[name], times["plain"], strict=True))
        table[name] = {
            "seconds": statistics.median(times[name]),
            "time ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[(3 * len(ratios)) // 4],
            "peak MiB": peaks[name] / 2**20,
            "peak ratio": peaks[name] / peaks["plain"],
        }
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="transformer blocks, L (default 12)")
    parser.add_argument("--layers", type=int, default=3, help="scored blocks, K (default 3)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (default 512)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="vocabulary (default 8192)")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step (default 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default 256)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default 16)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds measured (default 9)")
    parser.add_argument("--only", nargs="+", help="only the gated steps whose name has one of these words")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(argv)

    about = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{date.today()}, {about}, {args}")
    results = {}
    for checkpointing in (False, True):
        model = build(args, checkpointing)
        table = measure(steps(model, args), args.rounds)
        results["checkpointing" if checkpointing else "plain graph"] = table
        share = args.layers / args.blocks
        print(f"\n{'with' if checkpointing else 'without'} gradient checkpointing, K/L = {share:.2f}")
        print(f"{'':22}{'s/step':>9}{'time':>8}{'spread':>16}{'peak MiB':>10}{'peak':>8}")
        for name, row in table.items():
            spread = f"{row['low']:.3f}-{row['high']:.3f}"
            print(
                f"{name:22}{row['seconds']:9.3f}{row['time ratio']:8.3f}{spread:>16}{row['peak MiB']:10.1f}"
                f"{row['peak ratio']:8.3f}"
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"date": str(date.today()), "machine": about, "settings": vars(args), "results": results}, file)


if __name__ == "__main__":
    main()
