"""How well position-local (ghost) values rank tokens beside the exact first-order ones. About a minute on two cores.

    python benchmarks/fidelity.py

What masking token t takes away is the gradient of its own loss, so its exact value is <grad l_t, D>, with
D = target + lambda * drift over the scored adapter parameters. Forward-mode differentiation along D gives it for every
token of a batch in one pass: the tangent of l_t as the adapter moves along D. A small Llama (bytes as tokens) is
trained on Python source of the standard library, then a LoRA adapter on docstring-free arithmetic; at several moments
of that tuning the script prints Spearman's rank correlation and the overlap of the kept halves.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaTokenConfig, Fisher, alphatoken_weights, estimate_fisher, sft_loss, target_gradient
from alphatoken_loss.blocks import find_scored

Batch = dict[str, torch.Tensor]


def exact_values(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], direction: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """<grad l_t, D> for every label, `(B, T)`: the tangent of -log p(y_t | y_<t) as parameters move along D.

    Args:
        direction: parameter name -> tensor of the parameter's shape; parameters without one stand still.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # Of the attention kernels only the plain one has a forward-mode rule.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        moving = {
            name: forward_ad.make_dual(parameter.detach(), direction[name].to(parameter))
            for name, parameter in model.named_parameters()
            if name in direction
        }
        logits = torch.func.functional_call(model, moving, (), {**inputs, "use_cache": False}).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        tangent = forward_ad.unpack_dual(losses).tangent
    return F.pad(tangent, (1, 0)).masked_fill(batch["labels"] == -100, 0).index_fill(1, torch.tensor([0]), 0)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def source_batches(length: int, size: int, generator: torch.Generator) -> Batch:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:80])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(0, len(data) - length, (size,), generator=generator)
    ids = torch.stack([data[start : start + length] for start in starts]).long()
    return {"input_ids": ids, "labels": ids.clone()}


def sum_batches(length: int, size: int, generator: torch.Generator, noise: float) -> Batch:
    """Sums in words of digits, e.g. `# 17 + 58\\nresult = 75`; a share of the answer's bytes may be random."""
    rows, labels = [], []
    for _ in range(size):
        a, b = torch.randint(0, 100, (2,), generator=generator).tolist()
        prompt = f"# {a} + {b}\n".encode()
        answer = f"result = {a + b}  # the sum of {a} and {b}\n".encode()[: length - len(prompt)]
        noisy = bytearray(answer)
        for i in range(len(noisy)):
            if torch.rand((), generator=generator) < noise:
                noisy[i] = int(torch.randint(32, 127, (), generator=generator))
        row = prompt + bytes(noisy)
        rows.append(F.pad(torch.tensor(list(row)), (0, length - len(row))))
        labels.append(F.pad(torch.tensor([-100] * len(prompt) + list(noisy)), (0, length - len(row)), value=-100))
    mask = torch.stack([torch.arange(length) < (row != 0).sum() for row in rows]).long()
    return {"input_ids": torch.stack(rows), "attention_mask": mask, "labels": torch.stack(labels)}


def train(model: torch.nn.Module, batches: object, steps: int, learning_rate: float, name: str) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in (bar := tqdm(range(steps), desc=name)):
        loss = sft_loss(model, batches())  # type: ignore[operator]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-steps", type=int, default=250, help="steps of 16 x 96 bytes (default 250)")
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 10, 40], help="tuning steps measured at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    train(model, lambda: source_batches(96, 16, generator), args.pretrain_steps, 2e-3, "pretraining")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    everything = AlphaTokenConfig(num_layers="all")
    prompts = [batch.tolist() for batch in source_batches(32, 32, generator)["input_ids"]]
    fisher = estimate_fisher(model, prompts, max_new_tokens=32, config=everything)
    validation = sum_batches(64, 32, generator, noise=0.0)
    batch = sum_batches(64, 16, generator, noise=0.25)

    print(f"\n{date.today()}, torch {torch.__version__}; against exact values over all 6 blocks")
    print(f"{'tuning steps':>12}  {'values':24}{'target':>8}{'drift':>8}{'total':>8}{'kept halves agree':>20}")
    done = 0
    for moment in args.moments:
        if moment > done:
            train(model, lambda: sum_batches(64, 8, generator, noise=0.25), moment - done, 3e-3, "tuning")
            done = moment
        target = target_gradient(model, [validation], config=everything)
        drift = fisher.drift(find_scored(model, "all"), None)
        exact_target = exact_values(model, batch, target.gradients)
        exact_drift = exact_values(model, batch, drift)
        exact_total = exact_target + 1.5 * exact_drift
        counted = batch["labels"] != -100
        counted[:, 0] = False
        for name, layers, window in (
            ("ghost, K=3, W=32", 3, 32),
            ("ghost, K=3, W=0", 3, 0),
            ("ghost, all, W=32", "all", 32),
            ("ghost, all, W=0", "all", 0),
        ):
            options = AlphaTokenConfig(num_layers=layers, causal_window=window)  # type: ignore[arg-type]
            own = Fisher({site.name: fisher.factors[site.name] for site in find_scored(model, layers).sites})
            weights, values = alphatoken_weights(
                model, None, batch, target=target, fisher=own, config=options, return_values=True
            )
            best = exact_total[counted] >= exact_total[counted].median()
            agree = ((weights[counted] > 0) == best).double().mean().item()
            pairs = ((values.adaptation, exact_target), (values.stability, exact_drift), (values.total, exact_total))
            correlations = [f"{spearman(a[counted], b[counted]):8.3f}" if b.any() else f"{'-':>8}" for a, b in pairs]
            print(f"{moment:12}  {name:24}{''.join(correlations)}{agree:20.3f}")


if __name__ == "__main__":
    main()
