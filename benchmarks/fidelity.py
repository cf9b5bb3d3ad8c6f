"""How well the estimators rank tokens beside exact first-order values over all blocks. Some minutes on two cores.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py --pretrain-steps 0     # on a randomly initialised model

What masking token t takes away is the gradient of its own loss, so its exact value is <grad l_t, D>, with
D = target + lambda * drift over the scored adapter parameters: estimator="exact", in float32. A small Llama (bytes as
tokens) is trained on Python source of the standard library, then a LoRA adapter on arithmetic in words; at several
moments of that tuning the script prints Spearman's rank correlation and the overlap of the kept halves, of the ghost
estimator and of the difference estimator at its default step and at steps from 0.0003 to 1, in float32, under bf16
autocast, and on an NF4 base (beside exact values on that base).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sysconfig
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    estimate_fisher,
    sft_loss,
    target_gradient,
)
from alphatoken_loss.blocks import find_scored

Batch = dict[str, torch.Tensor]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
EFFECTS = (None, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


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


def small_model(pretrain_steps: int, generator: torch.Generator) -> PeftModel:
    """Six blocks, bytes as tokens, trained on Python source, with a fresh adapter."""
    torch.manual_seed(generator.initial_seed())
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    train(model, lambda: source_batches(96, 16, generator), pretrain_steps, 2e-3, "pretraining")
    return get_peft_model(model, LORA).train()  # type: ignore[return-value]


def in_nf4(model: torch.nn.Module) -> torch.nn.Module:
    """The same base in NF4, computing in float32, with the same adapter."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = copy.deepcopy(model).unload()  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
    quantised = get_peft_model(base, LORA).train()
    set_peft_model_state_dict(quantised, get_peft_model_state_dict(model))
    return quantised


def report(name: str, found: torch.Tensor, exact: torch.Tensor, counted: torch.Tensor, moment: int) -> None:
    kept, best = (values[counted] >= values[counted].median() for values in (found, exact))
    agree = (kept == best).double().mean().item()
    print(f"{moment:12}  {name:32}{spearman(found[counted], exact[counted]):10.4f}{agree:14.3f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain-steps", type=int, default=250, help="steps of 16 x 96 bytes (default 250)")
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 10, 40, 150], help="tuning steps measured at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    generator = torch.Generator().manual_seed(args.seed)
    model = small_model(args.pretrain_steps, generator)
    exact = AlphaTokenConfig(estimator="exact")
    prompts = [batch.tolist() for batch in source_batches(32, 32, generator)["input_ids"]]
    fisher = estimate_fisher(model, prompts, max_new_tokens=32, config=exact)
    validation = sum_batches(64, 32, generator, noise=0.0)
    batch = sum_batches(64, 16, generator, noise=0.25)
    counted = batch["labels"] != -100
    counted[:, 0] = False

    print(f"\n{date.today()}, torch {torch.__version__}, {args}; against exact values over all 6 blocks")
    print(f"{'tuning steps':>12}  {'values':32}{'Spearman':>10}{'same half':>14}")
    done = 0
    for moment in args.moments:
        train(model, lambda: sum_batches(64, 8, generator, noise=0.25), moment - done, 3e-3, "tuning")
        done = moment
        quantised = in_nf4(model)
        wanted = {}
        for base, of in (("float32", model), ("nf4", quantised)):
            target = target_gradient(of, [validation], config=exact)
            given = {"target": target, "fisher": fisher, "config": exact}
            _, values = alphatoken_weights(of, None, batch, **given, return_values=True)
            wanted[base] = values.total, target
        total, target = wanted["float32"]
        for layers, window in ((3, 32), (3, 0), ("all", 32), ("all", 0)):
            options = AlphaTokenConfig(num_layers=layers, causal_window=window)  # type: ignore[arg-type]
            own = Fisher({s.name: fisher.factors[s.name] for s in find_scored(model, layers).sites}, base=fisher.base)
            given = {"target": target, "fisher": own, "config": options}
            _, values = alphatoken_weights(model, None, batch, **given, return_values=True)
            report(f"ghost, K={layers}, W={window}", values.total, total, counted, moment)
        for precision in ("float32", "bf16 autocast", "nf4"):
            of = quantised if precision == "nf4" else model
            total, target = wanted["nf4" if precision == "nf4" else "float32"]
            autocast = torch.autocast("cpu", torch.bfloat16) if "bf16" in precision else contextlib.nullcontext()
            for effect in EFFECTS:
                options = AlphaTokenConfig(estimator="difference", difference_rms=effect)
                given = {"target": target, "fisher": fisher, "config": options}
                with autocast:
                    gate = AlphaToken(of, **given)
                    with gate(batch):
                        loss = of(**batch, use_cache=False).loss
                loss.backward()
                of.zero_grad()
                assert gate.values is not None
                report(f"difference, {precision}, {effect or 'default'}", gate.values.total, total, counted, moment)


if __name__ == "__main__":
    main()
