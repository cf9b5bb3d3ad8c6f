"""Stale targets: how token values rank by the target in use beside a fresh one, and what keeping it fresh costs.

    python benchmarks/target_refresh.py                # about five minutes on two cores
    python benchmarks/target_refresh.py --learning-rate 3e-4

The setting of fidelity.py: a small Llama trained on Python source, then tuned by LoRA on arithmetic in words, masked by
the difference estimator. Every schedule goes along the same tuning run (a target of its own, the run's masks from a
fresh full one at every step), so that nothing differs but the target. At each step after the first ten, exact values of
the training batch by the schedule's target are ranked beside those by the fresh full-set target (lambda 0: the drift
does not age). Cost: validation over training sequences, at 64 training sequences a step and 32 validation sequences in
all, each of which takes a forward and a backward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from datetime import date

import torch
from fidelity import Batch, small_model, spearman, sum_batches
from tqdm.auto import tqdm

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Target, alphatoken_weights, target_gradient

VALIDATION, TRAINING = 32, 64  # sequences: of the target, and of a step whose cost is counted


def schedules() -> dict[str, AlphaTokenConfig]:
    found = {}
    for every in (1, 2, 4, 8, 16):
        found[f"all 32, every {every}"] = AlphaTokenConfig(estimator="exact", stability_weight=0, target_every=every)
    for decay in (0.0, 0.5, 0.75, 0.9):
        for every in (1, 2, 4):
            options = {"target_every": every, "target_decay": decay}
            found[f"8, every {every}, decay {decay}"] = AlphaTokenConfig(
                estimator="exact", stability_weight=0, **options
            )
    return found


def cost_of(config: AlphaTokenConfig) -> float:
    """Validation over training sequences in a step."""
    taken = VALIDATION if config.target_decay is None else VALIDATION / 4
    return taken / config.target_every / TRAINING


def values_by(model: torch.nn.Module, batch: Mapping[str, torch.Tensor], target: Target) -> torch.Tensor:
    config = AlphaTokenConfig(estimator="exact", stability_weight=0)
    _, values = alphatoken_weights(model, None, batch, target=target, config=config, return_values=True)
    return values.total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the tuning (default 3e-3)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of it (default 50)")
    parser.add_argument("--pretrain-steps", type=int, default=250, help="steps of 16 x 96 bytes (default 250)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(args.seed)
    model = small_model(args.pretrain_steps, generator)
    validation: list[Batch] = [sum_batches(64, VALIDATION // 4, generator, noise=0.0) for _ in range(4)]
    exact = AlphaTokenConfig(estimator="exact", stability_weight=0)

    # Only their schedules are used: each keeps its own target as it would in training.
    keepers = {name: AlphaToken(model, target=validation, config=config) for name, config in schedules().items()}
    found: dict[str, list[float]] = {name: [] for name in keepers}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    for step in tqdm(range(args.steps), desc="tuning"):
        batch = sum_batches(64, 8, generator, noise=0.25)
        counted = batch["labels"] != -100
        counted[:, 0] = False
        fresh = target_gradient(model, validation, config=exact)
        wanted = values_by(model, batch, fresh)
        for name, keeper in keepers.items():
            keeper._refresh(keeper._scored())
            assert keeper.target is not None
            if step >= 10:
                found[name].append(spearman(values_by(model, batch, keeper.target)[counted], wanted[counted]))
        run = AlphaToken(model, target=fresh, config=AlphaTokenConfig(estimator="difference", stability_weight=0))
        with run(batch):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"\n{date.today()}, torch {torch.__version__}, {args}")
    print(f"{'target':30}{'sequences / 64':>16}{'Spearman':>10}{'lowest decile':>15}")
    for name, correlations in found.items():
        low = statistics.quantiles(correlations, n=10)[0]
        print(f"{name:30}{cost_of(keepers[name].config):16.3f}{statistics.mean(correlations):10.3f}{low:15.3f}")


if __name__ == "__main__":
    main()
