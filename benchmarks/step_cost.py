"""What a gated training step costs beside a plain one, measured side by side in one process.

    python benchmarks/step_cost.py                     # 12 blocks, 43M parameters, 4 x 256 tokens, two cores
    python benchmarks/step_cost.py --blocks 24 --layers 2 --batch 1 --length 1024 --nf4
    python benchmarks/step_cost.py --dpo
    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json   # for the pages: make figures
    python benchmarks/step_cost.py --sweep --json sweep.json --plot sweep.png
    python benchmarks/step_cost.py --straightforward   # the method as first written down, minutes a step

Each kind of step runs in turn, round after round, and the ratios of a round are what is reported (median, and the
quartiles as spread). "+ refresh" adds what keeping the target fresh costs at the default schedule: 8 of 32 validation
sequences to a step of 64, at the time that one batch's "target of" took here. Peak memory is the high-water mark of
tensors allocated during one step, beyond the model. Floors are arithmetic, from the forward's time in the same run: for
the ghost estimator, without checkpointing the K scored blocks are gone back through twice, K/L of a backward; with it
they are run again besides. For the difference and the path, one forward less its head. For the exact one, K/L of a
forward with tangents, which doubles its arithmetic.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from results import write
from straightforward import straightforward_step
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    Path,
    alphatoken_weights,
    dpo_loss,
    sft_loss,
    target_gradient,
)
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses.logps import token_logps

Step = Callable[[], object]
FORWARD = "forward, no grad, no head"
AXES: dict[str, list[dict[str, Any]]] = {
    "blocks": [{"blocks": n} for n in (4, 8, 12, 20, 32)],
    "scored blocks": [{"layers": n} for n in (1, 2, 3, 4, 6)],
    "tokens a sequence": [{"length": n, "batch": max(1, 1024 // n)} for n in (128, 256, 512, 1024, 2048)],
    "rank": [{"rank": n} for n in (4, 16, 64)],
    "NF4 base": [{"nf4": on} for on in (False, True)],
    "checkpointing": [{"checkpointing": on} for on in ("off", "on")],
}
# Weights that need no values. STM of the reference costs a forward of it, STM of the model none.
WEIGHED: dict[str, dict[str, Any]] = {
    "weights given": {"selection": "given"},
    "DFT": {"selection": "dft"},
    "STM of the model": {"selection": "stm", "selection_options": {"of": "model"}},
    "low loss": {"selection": "low_loss"},
    "EAFT": {"selection": "eaft"},
    "STM of the reference": {"selection": "stm"},
}
SWEEP = {"hidden": 256, "vocabulary": 4096, "rounds": 3}  # a sweep's defaults: minutes on two cores
VALIDATION, EFFECTIVE = 32, 64  # sequences of the target, and of a step whose target's cost is counted


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
    base: torch.nn.Module = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if args.straightforward else "sdpa"
    )
    if args.nf4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)  # type: ignore[operator]
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules="all-linear"))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def batch_of(args: argparse.Namespace, size: int, *, pairs: bool = False) -> dict[str, torch.Tensor]:
    """Random tokens, of which the last three quarters are the response."""
    ids = torch.randint(0, args.vocabulary, (size, args.length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answer = (torch.arange(args.length) >= args.length // 4).expand(ids.shape)
    if pairs:
        reference = torch.full((size // 2,), -7.0 * args.length)
        return {
            **batch,
            "completion_mask": answer.long(),
            "ref_chosen_logps": reference,
            "ref_rejected_logps": reference,
        }
    return {**batch, "labels": ids.where(answer, -100)}


def steps(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, Step]:
    batch = batch_of(args, args.batch, pairs=args.dpo)
    examples = batch_of(args, args.batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def loss(weights: torch.Tensor | AlphaToken | None = None, batch: dict[str, torch.Tensor] = batch) -> torch.Tensor:
        return dpo_loss(model, None, batch, weights) if args.dpo else sft_loss(model, batch, weights)

    def stepping(compute: Callable[[], torch.Tensor]) -> Step:
        def step() -> None:
            compute().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def forward() -> None:
        with torch.no_grad():
            model.get_base_model().model(input_ids=batch["input_ids"], use_cache=False)  # type: ignore[operator]

    read = read_batch(batch)

    def fused_loss() -> torch.Tensor:
        return -token_logps(model, read, fused=True).mean()

    def weighed(gate: AlphaToken, given: torch.Tensor | None, fused: bool = False) -> torch.Tensor:
        with gate(batch, weights=given):
            return fused_loss() if fused else loss()

    found: dict[str, Step] = {"plain": stepping(loss), FORWARD: forward}
    if args.fused:
        found["plain, TRL's fused log-probs"] = stepping(fused_loss)
    if not args.dpo and args.only is None:
        found["plain + KL to the reference"] = stepping(lambda: sft_loss(model, batch, kl_coef=0.3))
    if args.straightforward:
        validation = batch_of(args, VALIDATION)

        def naive() -> None:
            straightforward_step(model, batch, validation, layers=args.layers)
            optimizer.step()
            optimizer.zero_grad()

        found["straightforward"] = naive
    for name, options in WEIGHED.items():
        if args.only is None or any(word in name for word in args.only):
            gate = AlphaToken(model, **options)
            given = torch.rand(batch["input_ids"].shape) if options["selection"] == "given" else None
            found[name] = stepping(partial(weighed, gate, given))
            if args.fused and given is None and not args.dpo:
                found[f"{name}, fused"] = stepping(partial(weighed, gate, given, fused=True))
    kinds: dict[str, dict[str, Any]] = {
        "difference, all": {"estimator": "difference"},
        "difference, all, Adam's step": {"estimator": "difference"},
        f"exact, K={args.layers}": {"estimator": "exact", "num_layers": args.layers},
        "exact, all": {"estimator": "exact"},
        f"ghost, K={args.layers}, W=0": {"num_layers": args.layers, "causal_window": 0},
        f"ghost, K={args.layers}, W=32": {"num_layers": args.layers},
    }
    for name, options in kinds.items():
        if args.only is not None and not any(word in name for word in args.only):
            continue
        config = AlphaTokenConfig(**options)
        target = target_gradient(model, [examples], config=config)
        fisher = uniform_fisher(model, target.gradients)
        adam = optimizer if "Adam" in name else None
        gate = AlphaToken(model, target=target, fisher=fisher, config=config, optimizer=adam)
        found[name] = stepping(lambda gate=gate: loss(gate))  # type: ignore[misc]
        found[f"target of {name}"] = lambda config=config: target_gradient(model, [examples], config=config)  # type: ignore[misc]
        if name.startswith("ghost") and args.only is None and "W=32" in name:
            weigh = partial(alphatoken_weights, model, None, batch, target=target, fisher=fisher, config=config)
            found["weights alone"] = weigh
            found["weights + loss"] = stepping(lambda weigh=weigh: loss(weigh()))  # type: ignore[misc]
    for name, step in along_paths(model, batch, args).items():
        if args.only is None or any(word in name for word in args.only):
            found[name] = stepping(partial(loss, step[0], step[1]))
    return found


def along_paths(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], args: argparse.Namespace
) -> dict[str, tuple[AlphaToken, dict[str, torch.Tensor]]]:
    """The path estimator: with its forward at theta*, with a KL to it, and with theta*'s log-probabilities brought."""
    generator = torch.Generator().manual_seed(1)
    trained = {name: p.detach().cpu().float() for name, p in model.named_parameters() if p.requires_grad}
    path = Path({name: p + 1e-3 * torch.randn(p.shape, generator=generator) for name, p in trained.items()})
    with_column = {**batch, "path_logps": path.logps(model, batch)}
    plain, with_kl = (AlphaTokenConfig(estimator="path", path_kl=kl) for kl in (0.0, 0.6))
    return {
        "path": (AlphaToken(model, path=path, config=plain), batch),
        "path, KL to theta*": (AlphaToken(model, path=path, config=with_kl), batch),
        "path, precomputed": (AlphaToken(model, config=plain), with_column),
    }


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


def with_refresh(table: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """Add the target's share at the default schedule: a quarter of 32 validation sequences to 64 of training."""
    default = AlphaTokenConfig()
    share = VALIDATION / (default.target_parts * default.target_every * EFFECTIVE)
    for name, row in table.items():
        target = table.get(f"target of {name}")
        if target is not None:
            row["with refresh"] = row["time ratio"] + share * target["time ratio"]


def add_floors(table: dict[str, dict[str, float]], args: argparse.Namespace, checkpointing: bool) -> None:
    """What arithmetic alone allows, from the time that a forward without grad and without the head took here."""
    forward, share = table[FORWARD]["time ratio"], args.layers / args.blocks
    back = 1 - (2 if checkpointing else 1) * forward  # with what head and optimizer take
    again = forward if checkpointing else 0.0
    found = {
        "difference, all": forward,
        "difference, all, Adam's step": forward,
        "path": forward,
        "path, KL to theta*": forward,
        "path, precomputed": 0.0,
        "exact, all": 2 * forward,
        f"exact, K={args.layers}": 2 * share * forward,
    }
    for window in (0, 32):
        found[f"ghost, K={args.layers}, W={window}"] = share * (again + back)
    for name in found.keys() & table.keys():
        table[name]["floor"] = 1 + found[name]


def measured(args: argparse.Namespace, checkpointing: bool) -> dict[str, dict[str, float]]:
    table = measure(steps(build(args, checkpointing), args), args.rounds)
    with_refresh(table, args)
    add_floors(table, args, checkpointing)
    return table


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Walk each axis from the base setting; a setting that axes share is measured once."""
    known: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    points = []
    args.only, args.checkpointing = ["W=32", "difference"], "off"
    columns = "".join(f"{kind:>12}{'floor':>7}{'+ refresh':>11}{'peak':>7}" for kind in ("ghost", "difference"))
    print(f"{'':28}{'plain, s':>9}{columns}")
    for axis in args.axes or AXES:
        for change in AXES[axis]:
            here = argparse.Namespace(**{**vars(args), **change})
            key = tuple(getattr(here, name) for name in ("blocks", "layers", "length", "rank", "nf4", "checkpointing"))
            if key not in known:
                known[key] = measured(here, here.checkpointing == "on")
            table = known[key]
            point = {"axis": axis, "at": next(iter(change.values())), "plain": table["plain"]}
            point |= {"ghost": table[f"ghost, K={here.layers}, W=32"], "difference": table["difference, all"]}
            points.append(point)
            rows = "".join(
                f"{row['time ratio']:12.3f}{row['floor']:7.2f}{row['with refresh']:11.2f}{row['peak ratio']:7.3f}"
                for row in (point["ghost"], point["difference"])
            )
            print(f"{axis + ' ' + str(point['at']):28}{table['plain']['seconds']:9.3f}{rows}", flush=True)
    return points


def report(name: str, table: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    print(f"\n{name}, K/L = {args.layers / args.blocks:.2f}")
    print(f"{'':30}{'s/step':>9}{'time':>8}{'spread':>14}{'floor':>7}{'+ refresh':>11}{'peak MiB':>10}{'peak':>8}")
    for kind, row in table.items():
        spread = f"{row['low']:.3f}-{row['high']:.3f}"
        floor, refreshed = (f"{row[key]:.2f}" if key in row else "" for key in ("floor", "with refresh"))
        print(
            f"{kind:30}{row['seconds']:9.3f}{row['time ratio']:8.3f}{spread:>14}{floor:>7}{refreshed:>11}"
            f"{row['peak MiB']:10.1f}{row['peak ratio']:8.3f}",
            flush=True,
        )


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
    parser.add_argument("--nf4", action="store_true", help="a 4-bit base")
    parser.add_argument("--dpo", action="store_true", help="preference pairs, reference log-probabilities given")
    parser.add_argument("--fused", action="store_true", help="also a plain step on TRL's fused log-probabilities")
    parser.add_argument(
        "--straightforward", action="store_true", help="also straightforward.py, all on eager attention, which it needs"
    )
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="both")
    parser.add_argument("--only", nargs="+", help="only the gated steps whose name has one of these words")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--plot", help="also draw them into this file (needs matplotlib)")
    parser.add_argument("--sweep", action="store_true", help="walk one setting at a time (hidden size 256 by default)")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), help="of a sweep (default all)")
    args = parser.parse_args(argv)
    if args.sweep:
        parser.set_defaults(**SWEEP)
        args = parser.parse_args(argv)

    about = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{date.today()}, {about}, {args}")
    results: Any = {}
    if args.sweep:
        results = sweep(args)
    else:
        for checkpointing in (False, True):
            if args.checkpointing == ("off" if checkpointing else "on"):
                continue
            name = "checkpointing" if checkpointing else "plain graph"
            results[name] = measured(args, checkpointing)
            report(name, results[name], args)
    if args.json:
        write(args.json, results, settings=args, device="cuda" if torch.cuda.is_available() else "cpu")
    if args.plot:
        from cost_plots import plot_bars, plot_sweep  # needs matplotlib

        (plot_sweep if args.sweep else plot_bars)(results, args.plot)


if __name__ == "__main__":
    main()
