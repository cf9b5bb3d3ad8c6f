"""One run: a LoRA tuning by one setting at one learning rate from one seed, measured along the way."""

from __future__ import annotations

import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    Path,
    dpo_loss,
    excess_loss_weights,
    log_ratio_weights,
    make_path,
    random_weights,
    sft_loss,
    shared_gain,
)
from alphatoken_loss.files import save_text

from .real_data import flipped
from .rivals import RULES, answer_logps, at_labels, base_of, pair_loss, self_weighted_loss, stm
from .rows import Batch, Pair, Row, chunks, kinds_of
from .settings import Setting
from .world import Exam, World


@dataclass(frozen=True)
class Moment:
    """What a selection may see of a step.

    Attributes:
        kinds (`torch.Tensor`): `(B, T)` kinds of the labels, -1 where there is none.
        generator (`torch.Generator`): the run's own.
    """

    model: Any
    batch: Batch
    kinds: torch.Tensor
    generator: torch.Generator


def _stm(moment: Moment) -> torch.Tensor:
    with base_of(moment.model) as base:
        return stm(at_labels(base, moment.batch)[1]) * (moment.batch["labels"] != -100)


SAMPLE = 64  # training rows by which rho is chosen
# Selections that give `(B, T)` weights before the step. Those by the step's own logits are rivals.RULES.
SELECTIONS: dict[str, Callable[[Moment], torch.Tensor]] = {
    "random": lambda moment: random_weights(moment.batch, rho=0.5, generator=moment.generator),
    "rho1": lambda moment: excess_loss_weights(moment.model, None, moment.batch, rho=0.5),
    "log_ratio": lambda moment: log_ratio_weights(moment.model, None, moment.batch, rho=0.5),
    "oracle": lambda moment: (moment.kinds == 0).float().to(moment.batch["input_ids"].device),
    "stm": _stm,
}


def measure(model: Any, batches: Iterable[Batch]) -> tuple[float, float, float]:
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


def squared_deltas(model: Any) -> torch.Tensor:
    """Sum over LoRA layers of |s B A|^2, without forming B A."""
    total: Any = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            total = total + module.scaling["default"] ** 2 * ((b.T @ b) * (a @ a.T)).sum()
    return total


def make_optimizer(model: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def tune_reference(world: World, model: Any, validation: list[Batch]) -> None:
    """Give the model an adapter "ref", tuned on the validation examples: RHO-1's clean reference."""
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    optimizer = make_optimizer(model, world.plan.reference_lr)
    for step in range(world.plan.reference_steps):
        with world.autocast():
            loss = sft_loss(model, validation[step % len(validation)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_adapter("default")


_REFERENCE: dict[Hashable, tuple[float, float]] = {}
# Settings that decide where theta* is. The others say what is done with it.
_OF_THETA_STAR = ("path_steps", "path_rate", "path_beta", "path_likelihood", "path_holdout", "stability_weight",
                  "num_layers", "fisher")  # fmt: skip


class _Run:
    """What supervised and preference runs share: rows, clean rows, the model and what weighs its tokens."""

    def __init__(self, world: World, setting: Setting, lr: float, seed: int) -> None:
        self.world, self.plan, self.setting, self.lr, self.seed = world, world.plan, setting, lr, seed
        self.model = world.model(seed=seed, nf4=setting.nf4)
        self.rows, self.clean = world.training(setting, seed), world.validation(setting, seed)
        self.generator, self.rng = torch.Generator().manual_seed(seed), random.Random(seed)
        self.optimizer = make_optimizer(self.model, lr)
        self.key = world, setting.task, setting.nf4
        self.start = [setting.task, setting.nf4, *world.base_identity()]
        self.begun = time.perf_counter()

    def weigher(self, target: list[Batch]) -> AlphaToken | None:
        config = self.setting.config
        if config is None:
            return None
        given = self.optimizer if self.setting.precondition else None
        if self.setting.rho_of:
            some = [self.world.batch(rows) for rows in chunks(self.rows[:SAMPLE], self.plan.batch)]
            with self.world.autocast():
                gain = shared_gain(self.model, target, some, config=config, progress=False)
            by_share = min(max((1 + gain.share) / 2, 0.5), 1.0)
            config = replace(config, rho=by_share if self.setting.rho_of == "share" else gain.rho)
        fisher = self.world.fisher(config) if config.stability_weight > 0 else None
        path = self.theta_star(target, config, fisher) if config.estimator == "path" else None
        return AlphaToken(self.model, target=target, fisher=fisher, config=config, optimizer=given, path=path)

    def theta_star(self, target: list[Batch], config: AlphaTokenConfig, fisher: Fisher | None) -> Path:
        """What the first step would make, kept beside the base: settings that share it, at all rates, make it once. The
        time that it took counts in each."""
        settings = [getattr(config, name) for name in _OF_THETA_STAR]
        what = [self.start, self.seed, [repr(row) for row in self.clean], settings]
        file, times = self.world.kept("path", what, "safetensors"), self.world.kept("path", what, "json")
        if not times.is_file():
            started = time.perf_counter()
            with self.world.autocast():
                make_path(self.model, target, fisher=fisher, config=config, progress=False).save(file)
            took = json.dumps(time.perf_counter() - started)
            save_text(times, took)
        else:
            self.begun -= json.loads(times.read_text())
        return Path.load(file)

    def before(self, whole: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """The exam before the first step, kept beside the base. B = 0: every run starts from the same function."""
        file = self.world.kept("before", [self.start, self.world.identity(), asdict(self.plan)], "json")
        if not file.is_file():
            found = json.dumps(whole(self.model))
            save_text(file, found)
        return json.loads(file.read_text())

    def last_exam(self) -> Exam | None:
        return self.world.last_exam(self.setting)

    def train(self, steps: Iterable[Callable[[], torch.Tensor]], exam: Callable[[Any], dict[str, float]], count: int):
        """Take a step by each of the losses, and the exam on the way; `pace` is the median of a step's seconds, `once`
        those spent beside steps before the second one (on a reference of its own, theta*)."""
        last = self.last_exam()

        def whole(model: Any) -> dict[str, float]:
            with self.world.autocast():
                return {**exam(model), **(last(model) if last else {})}

        curve, seconds = [{"step": 0, "pace": 0.0, **self.before(whole)}], []
        for number, loss in enumerate(steps, start=1):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, number / 5)
            started = time.perf_counter()
            with self.world.autocast():
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            if number in self.plan.moments(count):
                with self.world.autocast():
                    found = exam(self.model) if number < count else whole(self.model)
                pace = statistics.median(seconds)
                once = self.prepared + seconds[0] - pace
                curve.append({"step": number, "pace": pace, "once": once, **found})
        return curve


class _Supervised(_Run):
    def __init__(self, world: World, setting: Setting, lr: float, seed: int) -> None:
        super().__init__(world, setting, lr, seed)
        validation = [world.batch(rows) for rows in chunks(self.clean, self.plan.batch)]
        self.values = self.weigher(validation)
        if setting.selection == "rho1":
            tune_reference(world, self.model, validation)
        apart = setting.kl_to_base and setting.kl
        self.base = world.load().to(world.device).eval() if apart else None
        self.counts = torch.zeros(2, len(world.kinds))
        self.seen: list[tuple[torch.Tensor, torch.Tensor | AlphaToken | None]] = []
        self.prepared = time.perf_counter() - self.begun

    def loss(self, number: int) -> torch.Tensor:
        setting, size = self.setting, self.plan.batch
        mine: list[Row] = self.rows[number * size : (number + 1) * size]
        if setting.selection == "only":
            mine = self.rng.sample(self.clean, size)
        kinds = kinds_of(mine)
        extra = self.rng.sample(self.clean, self.plan.mixed) if setting.selection == "mixed" else []
        batch = self.world.batch([*mine, *extra])
        if setting.selection in RULES:
            loss, weights = self_weighted_loss(self.model, batch, RULES[setting.selection])
        else:
            weights = self.values
            if setting.selection in SELECTIONS:
                weights = SELECTIONS[setting.selection](Moment(self.model, batch, kinds, self.generator))
            options = {"kl_coef": setting.kl, "ref_model": self.base} if setting.kl else {}
            if self.values is not None and weights is not self.values:
                loss = self._from_theta_star(batch, weights)
            else:
                loss = sft_loss(self.model, batch, weights, **options)
        if setting.l2:
            loss = loss + setting.l2 * squared_deltas(self.model)
        self.seen.append((kinds, weights))
        return loss

    def _from_theta_star(self, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        """What else a preset does, with a mask that is not by its values."""
        assert self.values is not None
        with self.values(batch, weights=weights, mean_over_kept=True) as step:
            loss = self.model(**batch, use_cache=False).loss
        return loss + step.kl

    def steps(self) -> Iterable[Callable[[], torch.Tensor]]:
        for number in range(self.plan.steps):
            yield functools.partial(self.loss, number)
            kinds, weights = self.seen.pop()  # the step was taken: an AlphaToken now has its mask
            kept = weights.weights if isinstance(weights, AlphaToken) else weights
            kept = (kinds >= 0).float() if kept is None else kept.float().cpu()[: len(kinds), : kinds.shape[1]]
            for kind in range(len(self.world.kinds)):
                of_kind = kinds == kind
                self.counts[:, kind] += torch.stack([kept[of_kind].sum(), of_kind.sum()])

    def run(self) -> dict[str, Any]:
        curve = self.train(self.steps(), self.world.exam(self.setting), self.plan.steps)
        shares = (self.counts[0] / self.counts[1].clamp(min=1)).tolist()
        there = self.counts[1] > 0
        kept = {kind: share for kind, share, any_ in zip(self.world.kinds, shares, there, strict=True) if any_}
        return {"curve": curve, "kept": kept}


class _Preferences(_Run):
    """The reference is the base."""

    def __init__(self, world: World, setting: Setting, lr: float, seed: int) -> None:
        super().__init__(world, setting, lr, seed)
        size = self.plan.batch
        if setting.flipped:
            self.rows = flipped(self.rows, random.Random(seed + 77), setting.flipped)
        self.values = self.weigher([world.pair_batch(pairs) for pairs in chunks(self.clean, size)])
        self.prepared = time.perf_counter() - self.begun

    def batch(self, pairs: list[Pair]) -> Batch:
        """With the reference's log-probabilities, which runs of one process share."""
        batch = self.world.pair_batch(pairs)
        keys = [(self.key, pair) for pair in pairs]
        if any(key not in _REFERENCE for key in keys):
            with base_of(self.model) as base:
                found = answer_logps(base, batch).chunk(2)
            _REFERENCE.update(zip(keys, zip(*(logps.tolist() for logps in found), strict=True), strict=True))
        known = torch.tensor([_REFERENCE[key] for key in keys], device=self.world.device)
        return {**batch, "ref_chosen_logps": known[:, 0], "ref_rejected_logps": known[:, 1]}

    def loss(self, number: int) -> torch.Tensor:
        setting, size = self.setting, self.plan.batch
        pairs = self.rows[number * size : (number + 1) * size]
        if setting.selection == "only":
            pairs = self.rng.sample(self.clean, size)
        batch = self.batch(pairs)
        if setting.likelihood or (setting.smoothing and setting.loss_type == "sigmoid"):
            more = {"smoothing": setting.smoothing, "likelihood": setting.likelihood}
            return pair_loss(self.model, batch, beta=self.plan.beta, **more)
        weights: torch.Tensor | AlphaToken | None = self.values
        if setting.selection in SELECTIONS:
            nothing = torch.empty(0)
            weights = SELECTIONS[setting.selection](Moment(self.model, batch, nothing, self.generator))
        options = {"loss_type": setting.loss_type, "label_smoothing": setting.smoothing}
        return dpo_loss(self.model, None, batch, weights, beta=self.plan.beta, **options)

    def exam(self) -> Exam:
        retained = self.world.exam(self.setting)  # "target" is the loss on clean answers that would be chosen
        sets = {"": self.world.test_pairs()[: self.plan.test], "dev ": self.world.dev_pairs()}
        return lambda model: {**self.judged(sets), **retained(model)}

    def last_exam(self) -> Exam:
        """Of all test pairs: what a run ends with."""
        more, sets = super().last_exam(), {"": self.world.test_pairs()[: self.plan.last_pairs]}
        return lambda model: {**self.judged(sets), **(more(model) if more else {})}

    def judged(self, sets: dict[str, list[Pair]]) -> dict[str, float]:
        """Accuracy, margin and DPO loss by the labels of these pairs."""
        found = {}
        for name, pairs in sets.items():
            margins = torch.cat([self.margins(some) for some in chunks(pairs, 2 * self.plan.batch)] or [_NONE])
            if len(margins):
                found[f"{name}accuracy"] = (margins > 0).float().mean().item()
                found[f"{name}margin"] = margins.mean().item()
                found[f"{name}pair loss"] = -F.logsigmoid(margins).mean().item()
        return found

    def margins(self, pairs: list[Pair]) -> torch.Tensor:
        """beta * (log-ratio of chosen - log-ratio of rejected), `(P,)`."""
        batch = self.batch(pairs)
        with torch.no_grad():
            chosen, rejected = answer_logps(self.model, batch).chunk(2)
        return self.plan.beta * (chosen - batch["ref_chosen_logps"] - rejected + batch["ref_rejected_logps"])

    def run(self) -> dict[str, Any]:
        if self.setting.selection != "only":
            with self.world.autocast():  # of all steps now: no step's time is that of its reference
                for pairs in chunks(self.rows, self.plan.batch):
                    self.batch(pairs)
        steps = (functools.partial(self.loss, number) for number in range(self.plan.pair_steps))
        return {"curve": self.train(steps, self.exam(), self.plan.pair_steps), "kept": {}}


_NONE = torch.empty(0)


def run(world: World, setting: Setting, lr: float, seed: int) -> dict[str, Any]:
    """Its `curve`, a list of figures by name at each measured step, and the share `kept` of each kind of token."""
    kind = _Preferences if setting.task == "dpo" else _Supervised
    return kind(world, setting, lr, seed).run()


def pace_of(world: World, setting: Setting, steps: int = 15) -> dict[str, float]:
    """Seconds of a `step` and those spent `once`, of some steps that nothing else is measured of."""
    plan = replace(world.plan, steps=steps, pair_steps=steps, measured_at=(1.0,), test=2, last_pairs=2)
    last = run(replace(world, plan=plan), setting, 1e-4, 0)["curve"][-1]
    return {"step": last["pace"], "once": last["once"]}
