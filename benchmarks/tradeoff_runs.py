"""One run of tradeoff.py: a LoRA tuning by one selection at one learning rate from one seed, measured along the way."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tradeoff_data import KINDS, Batch, Tasks, load_base

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    dpo_loss,
    estimate_fisher,
    excess_loss_weights,
    log_ratio_weights,
    random_weights,
    sft_loss,
)

Weights = torch.Tensor | AlphaToken | None


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    steps: int = 80
    batch: int = 8  # training rows, or pairs
    measured_at: tuple[float, ...] = (0.2, 0.4, 0.7, 1.0)  # shares of the steps
    validation: int = 32  # clean examples of the target task
    test: int = 48
    heldout: int = 48  # pieces of prose and of Python, 96 tokens each
    pair_steps: int = 50
    prompt: int = 28  # tokens of code
    answer: int = 32
    corrupted: float = 0.25
    mixed: int = 2  # validation rows in a batch of the selection "mixed"
    reference_steps: int = 16  # that RHO-1's reference is tuned for on the validation examples
    reference_lr: float = 3e-3
    fisher_prompts: int = 256
    fisher_tokens: int = 32
    beta: float = 0.1

    def moments(self, steps: int) -> set[int]:
        return {round(share * steps) for share in self.measured_at}


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        selection (`str`): all, random, oracle, mixed or only (validation examples, in each batch or alone), rho1, or
            log_ratio (pairs); "values" is AlphaToken's, by `config`.
        kl (`float`): coefficient of KL(reference || policy) on response tokens.
        l2 (`float`): coefficient of the squared Frobenius norm of the adapters' deltas s B A.
        task (`str`): "sft" or "dpo".
        precondition (`bool`): AlphaToken values the step that Adam will take.
        noise (`bool`): training answers have boilerplate, junk and corrupted tokens.
    """

    name: str
    selection: str = "all"
    config: AlphaTokenConfig | None = None
    kl: float = 0.0
    l2: float = 0.0
    task: str = "sft"
    precondition: bool = False
    noise: bool = True
    nf4: bool = False


@functools.cache
def _tasks(folder: Path, plan: Plan) -> Tasks:
    from tradeoff_data import read_texts

    sizes = {"prompt": plan.prompt, "answer": plan.answer, "heldout": plan.heldout}
    return Tasks(read_texts(), folder, **sizes, corrupted=plan.corrupted)


def _adapted(folder: Path, *, nf4: bool, seed: int, device: str) -> Any:
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(folder, nf4=nf4).to(device), lora)
    return model.train()  # 4-bit linears must not run in evaluation mode on a CPU


def make_fishers(folder: Path, plan: Plan, device: str = "cpu") -> None:
    """Estimate the base's Fisher once in each form that a setting uses, from prompts of the training data."""
    prompts = [prompt for prompt, _ in _tasks(folder, plan).clean("train", plan.fisher_prompts, seed=10**6)]
    for layers, form in ((3, "factored"), ("all", "factored"), (3, "dense")):
        config = AlphaTokenConfig(num_layers=layers, fisher=form)  # type: ignore[arg-type]
        path = _fisher_path(folder, plan, config)
        if not path.is_file():
            model = _adapted(folder, nf4=False, seed=0, device=device)
            estimate_fisher(model, prompts, max_new_tokens=plan.fisher_tokens, batch_size=32, config=config).save(path)


def _fisher_path(folder: Path, plan: Plan, config: AlphaTokenConfig) -> Path:
    size = f"{plan.fisher_prompts}x{plan.fisher_tokens}-{plan.prompt}"
    return folder / f"fisher-{config.scored_layers}-{config.fisher}-{size}.safetensors"


def _measure(model: Any, batches: Iterable[Batch]) -> tuple[float, float, float]:
    """Nats a token, share of tokens predicted, share of rows predicted whole."""
    loss = tokens = right = whole = rows = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            counted = labels != -100
            loss += F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").item()
            hit = (logits.argmax(-1) == labels) | ~counted
            tokens += counted.sum().item()
            right += (hit & counted).sum().item()
            whole += hit.all(1).sum().item()
            rows += len(labels)
    return loss / tokens, right / tokens, whole / rows


class _Exam:
    """What is measured of a model; the same rows for every run."""

    def __init__(self, tasks: Tasks, plan: Plan, device: str) -> None:
        target = tasks.clean("test", plan.test, seed=10**6)
        little = tasks.little(plan.test, seed=10**6)
        self.sets = {
            "target": [tasks.batch(target)],
            "prose": [{"input_ids": tasks.prose, "labels": tasks.prose}],
            "code": [{"input_ids": tasks.code, "labels": tasks.code}],
            "tasks": [tasks.batch(little)],
        }
        self.sets = {name: [_to(b, device) for b in batches] for name, batches in self.sets.items()}

    def __call__(self, model: Any) -> dict[str, float]:
        found = {}
        for name, batches in self.sets.items():
            found[name], found[f"{name} tokens"], found[f"{name} rows"] = _measure(model, batches)
        kept = {k: v for k, v in found.items() if not k.endswith("rows") or k == "tasks rows"}
        return {**kept, "retention": (found["prose"] + found["code"]) / 2}


def _to(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _squared_deltas(model: Any) -> torch.Tensor:
    """Sum over LoRA layers of |s B A|^2, without forming B A."""
    total: Any = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            total = total + module.scaling["default"] ** 2 * ((b.T @ b) * (a @ a.T)).sum()
    return total


def _weigher(
    model: Any, optimizer: torch.optim.Optimizer, folder: Path, setting: Setting, plan: Plan, target: list[Batch]
) -> AlphaToken | None:
    if setting.config is None:
        return None
    fisher = Fisher.load(_fisher_path(folder, plan, setting.config))
    given = optimizer if setting.precondition else None
    return AlphaToken(model, target=target, fisher=fisher, config=setting.config, optimizer=given)


def _optimizer(model: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def _tune_reference(model: Any, validation: list[Batch], plan: Plan, lr: float) -> None:
    """Give the model an adapter "ref", tuned on the validation examples: RHO-1's clean reference."""
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    optimizer = _optimizer(model, lr)
    for step in range(plan.reference_steps):
        sft_loss(model, validation[step % len(validation)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_adapter("default")


_BEFORE: dict[Hashable, dict[str, float]] = {}


def _train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[Callable[[], torch.Tensor]],
    lr: float,
    measured_at: set[int],
    exam: Callable[[Any], dict[str, float]],
    base: Hashable,
) -> list[dict[str, float]]:
    """Take a step by each of the losses, and the exam on the way; `pace` is the median of the steps' seconds so far."""
    if base not in _BEFORE:  # B = 0: every run of this process starts from the same function
        _BEFORE[base] = exam(model)
    curve, seconds = [{"step": 0, "pace": 0.0, **_BEFORE[base]}], []
    for number, loss in enumerate(steps, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, number / 5)
        started = time.perf_counter()
        loss().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        if number in measured_at:
            curve.append({"step": number, "pace": statistics.median(seconds), **exam(model)})
    return curve


def run_sft(folder: Path, setting: Setting, lr: float, seed: int, plan: Plan, device: str = "cpu") -> dict[str, Any]:
    """One supervised run: its curve, and the share kept of each kind of token."""
    tasks = _tasks(folder, plan)
    model = _adapted(folder, nf4=setting.nf4, seed=seed, device=device)
    rows = tasks.training(plan.steps * plan.batch, seed, noise=setting.noise)
    clean = tasks.clean("validation", plan.validation, seed)
    validation = [_to(tasks.batch(clean[i : i + plan.batch]), device) for i in range(0, len(clean), plan.batch)]
    optimizer = _optimizer(model, lr)
    values = _weigher(model, optimizer, folder, setting, plan, validation)
    if setting.selection == "rho1":
        _tune_reference(model, validation, plan, plan.reference_lr)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    counts = torch.zeros(2, len(KINDS))

    def step(number: int) -> torch.Tensor:
        mine = rows[number * plan.batch : (number + 1) * plan.batch]
        if setting.selection == "only":
            mine = [(*row, [0] * plan.answer) for row in rng.sample(clean, plan.batch)]
        kinds = tasks.kinds(mine)
        extra = rng.sample(clean, plan.mixed) if setting.selection == "mixed" else []
        batch = _to(tasks.batch([(prompt, answer) for prompt, answer, _ in mine] + extra), device)
        weights: Weights = values
        if setting.selection == "random":
            weights = random_weights(batch, rho=0.5, generator=generator)
        elif setting.selection == "rho1":
            weights = excess_loss_weights(model, None, batch, rho=0.5)
        elif setting.selection == "oracle":
            weights = _to({"kept": (kinds == 0).float()}, device)["kept"]
        loss = sft_loss(model, batch, weights, **({"kl_coef": setting.kl} if setting.kl else {}))
        if setting.l2:
            loss = loss + setting.l2 * _squared_deltas(model)
        seen.append((kinds, weights))
        return loss

    seen: list[tuple[torch.Tensor, Weights]] = []

    def steps() -> Iterable[Callable[[], torch.Tensor]]:
        for number in range(plan.steps):
            yield functools.partial(step, number)
            kinds, weights = seen.pop()  # the step was taken: an AlphaToken now has its mask
            kept = weights.weights if isinstance(weights, AlphaToken) else weights
            kept = (kinds >= 0).float() if kept is None else kept.cpu()[: len(kinds), : kinds.shape[1]]
            for kind in range(len(KINDS)):
                of_kind = kinds == kind
                counts[:, kind] += torch.stack([kept[of_kind].sum(), of_kind.sum()])

    exam = _Exam(tasks, plan, device)
    curve = _train(model, optimizer, steps(), lr, plan.moments(plan.steps), exam, (folder, plan, "sft", setting.nf4))
    return {"curve": curve, "kept": {kind: (counts[0, i] / counts[1, i]).item() for i, kind in enumerate(KINDS)}}


def run_dpo(folder: Path, setting: Setting, lr: float, seed: int, plan: Plan, device: str = "cpu") -> dict[str, Any]:
    """One preference run; the reference is the base."""
    tasks = _tasks(folder, plan)
    model = _adapted(folder, nf4=setting.nf4, seed=seed, device=device)
    size = plan.batch
    pairs = tasks.pairs("train", plan.pair_steps * size, seed, noise=setting.noise)
    batches = [_to(tasks.pair_batch(pairs[i : i + size]), device) for i in range(0, len(pairs), size)]
    held_out = _to(tasks.pair_batch(tasks.pairs("test", plan.test, 10**6, noise=False)), device)
    with torch.no_grad():  # B = 0: the model is the reference still
        for batch in (*batches, held_out):
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = _answer_logps(model, batch).chunk(2)
    clean = tasks.pairs("validation", plan.validation, seed, noise=False)
    validation = [_to(tasks.pair_batch(clean[i : i + size]), device) for i in range(0, len(clean), size)]
    optimizer = _optimizer(model, lr)
    values = _weigher(model, optimizer, folder, setting, plan, validation)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    retained = _Exam(tasks, plan, device)

    def exam(model: Any) -> dict[str, float]:
        with torch.no_grad():
            _, figures = dpo_loss(model, None, held_out, beta=plan.beta, return_metrics=True)
        return {
            "accuracy": figures["rewards/accuracies"].item(),
            "margin": figures["rewards/margins"].item(),
            **retained(model),  # "target" is the loss on clean answers that would be chosen
        }

    def step(batch: Batch) -> torch.Tensor:
        weights: Weights = values
        if setting.selection == "only":
            batch = _to(tasks.pair_batch(rng.sample(clean, size)), device)
        if setting.selection == "random":
            weights = random_weights(batch, rho=0.5, generator=generator)
        elif setting.selection == "log_ratio":
            weights = log_ratio_weights(model, None, batch, rho=0.5)
        return dpo_loss(model, None, batch, weights, beta=plan.beta)

    steps = (functools.partial(step, batch) for batch in batches)
    base = folder, plan, "dpo", setting.nf4
    return {"curve": _train(model, optimizer, steps, lr, plan.moments(plan.pair_steps), exam, base), "kept": {}}


def _answer_logps(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["input_ids"][:, 1:]
    logps = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def pace_of(folder: Path, setting: Setting, plan: Plan, steps: int = 15, device: str = "cpu") -> float:
    """Median seconds of a step, of some steps that nothing else is measured of."""
    short = replace(plan, steps=steps, pair_steps=steps, measured_at=(1.0,), test=2)
    return run(folder, setting, 1e-4, 0, short, device)["curve"][-1]["pace"]


def run(folder: Path, setting: Setting, lr: float, seed: int, plan: Plan, device: str = "cpu") -> dict[str, Any]:
    return (run_dpo if setting.task == "dpo" else run_sft)(folder, setting, lr, seed, plan, device)
