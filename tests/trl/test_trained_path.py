"""The path estimator in TRL's trainers: theta*, its precomputed column, what begins there and what holds there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import tuning
from checks import error
from datasets import Dataset
from trainer_cases import feature, make
from tuning import arguments, base, dpo_data, lora, masked, sft_data, tokenizer, trained

from alphatoken_loss import AlphaTokenConfig, Path, alphatoken_weights, make_path
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses.head import check_head
from alphatoken_loss.trl.path import PathColumn

IGNORE = -100
STEPS, RATE = 4, 5e-2


def path_feature(form="plain", *, model=base, options=None, peft=lora, **args):
    settings = {"estimator": "path", "num_layers": None, "path_steps": STEPS, "path_rate": RATE, **args}
    return feature(form, model=model, options=options, peft=peft, **settings)


def keeping(trainer_class):
    """The trainer, which keeps what each micro-batch was, and its weights and values."""

    class Keeping(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            batch = {key: value for key, value in inputs.items() if key != "use_cache"}
            loss = super().training_step(model, inputs, *args, **kwargs)
            gate = self.alphatoken
            self.batches = [*getattr(self, "batches", []), batch]
            self.masks = [*getattr(self, "masks", []), gate.weights]
            self.totals = [*getattr(self, "totals", []), gate.values.total]
            return loss

    return Keeping


def started(kind, case, folder, cls=None, **changes):
    trainer = make(kind, keeping(cls or tuning.TRAINERS[kind][0]), case, folder, **changes)
    trainer.before = dict(trained(trainer.model))
    trainer.train()
    return trainer


def assert_same_training(found, expected, tolerance=1e-4):
    """The same masks and values, and parameters that went the same way."""
    assert len(found.masks) == len(expected.masks) > 0
    for mask, wanted, total, values in zip(found.masks, expected.masks, found.totals, expected.totals, strict=True):
        largest = float(values.abs().max())  # 0 where theta is theta*
        assert float((total - values).abs().max()) <= tolerance * largest
        assert torch.equal(mask, wanted)
    assert_same_parameters(found.model, expected.model, found.before, tolerance)


def assert_same_parameters(found, expected, start, tolerance=1e-4):
    after, wanted = dict(trained(found)), dict(trained(expected))
    assert set(after) == set(wanted)
    moved = max(float((wanted[key] - start[key]).abs().max()) for key in wanted)
    assert moved > 0
    for key in wanted:
        assert float((after[key] - wanted[key]).abs().max()) < tolerance * moved, key


# ------------------------------------------------------------------------------------ theta*


def encoded(prompt, completion):
    tok = tokenizer()
    prompt, answer = tok(prompt)["input_ids"], [*tok(completion)["input_ids"], tok.eos_token_id]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def padded(rows):
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pairs_of(rows, chosen="chosen", rejected="rejected"):
    """Stacked pairs, made by hand."""
    both = padded([encoded(r["prompt"], r[answer]) for answer in (chosen, rejected) for r in rows])
    labels = both.pop("labels")
    return {**both, "completion_mask": (labels != IGNORE).long()}


@pytest.mark.parametrize(("kind", "form"), [("sft", "sft"), ("dpo", "sft"), ("dpo", "pairs")])
@pytest.mark.filterwarnings("ignore")
def test_theta_star_is_led_to_by_the_target(kind, form, tmp_path):
    """Two rows a step, with the trainer's own Fisher; a DPO trainer takes pairs as well as answers."""
    data = sft_data(count=4, first=50) if form == "sft" else dpo_data(count=4)
    trainer = started(kind, path_feature(options=lambda: {"target_dataset": data}, max_steps=1), tmp_path)
    rows = list(data)
    halves = [rows[:2], rows[2:]]
    if form == "sft":
        made = [[padded([encoded(r["prompt"], r["completion"]) for r in half]) for half in halves]]
    else:
        made = [[pairs_of(half) for half in halves], [pairs_of(half, "rejected", "chosen") for half in halves]]
    errors = []
    for batches in made:
        fresh, gate = tuning.get_peft_model(base(), lora()), trainer.alphatoken
        Path(trainer.before).apply(fresh)
        wanted = make_path(fresh, batches, fisher=gate.fisher, config=gate.config, progress=False)
        own = dict(fresh.named_parameters())
        errors.append(
            max(
                error(gate.path.parameters[name] - own[name].detach(), there - own[name].detach())
                for name, there in wanted.parameters.items()
                if float((there - own[name].detach()).abs().max()) > 0
            )
        )
    assert errors[0] < 1e-3, errors
    assert all(wrong > 0.1 for wrong in errors[1:])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_with_rho_1_theta_star_is_begun_at_and_held_to(kind, tmp_path):
    """No token is masked; what is not asked of theta* is TRL's own."""
    trainer = started(kind, path_feature(rho=1.0, path_start=True, path_kl=0.6, logging_steps=1), tmp_path)
    assert not trainer.totals[0].any() and trainer.totals[1].abs().max() > 1e-4
    assert all(weights.any() and set(weights.unique().tolist()) <= {0.0, 1.0} for weights in trainer.masks)
    logged = [log for log in trainer.state.log_history if "alphatoken/kept" in log]
    assert logged and all(log["alphatoken/kept"] == 1.0 for log in logged)
    assert logged[-1]["alphatoken/path_kl"] > 0
    assert make(kind, tuning.TRAINERS[kind][0], path_feature(rho=1.0), tmp_path).alphatoken is None


@pytest.mark.parametrize(("kind", "estimator", "message"), [
    ("sft", "path", r"holds preference pairs, and .* has no loss for them.*DPOTrainer with estimator=.path"),
    ("sft", "ghost", "holds preference pairs, and .* has no loss for them"),
    ("dpo", "ghost", r'of which estimator="ghost" would see the chosen answers alone.*estimator="path"'),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_pairs_as_a_target_of_what_cannot_use_them(kind, estimator, message, tmp_path):
    case = feature(estimator=estimator, options=lambda: {"target_dataset": dpo_data(count=4)})
    with pytest.raises(ValueError, match=message):
        make(kind, tuning.TRAINERS[kind][0], case, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_target_pairs_that_truncation_leaves_nothing_of(tmp_path, caplog):
    long = {"prompt": "x" * 40, "chosen": "yes", "rejected": "no"}
    data = Dataset.from_list([long, *dpo_data(count=2)])
    case = path_feature(options=lambda: {"target_dataset": data}, max_length=30)
    with caplog.at_level("WARNING"):
        trainer = make("dpo", tuning.TRAINERS["dpo"][0], case, tmp_path)
    assert "1 of 3 target pairs have no response token within max_length=30" in caplog.text
    assert [len(batch["input_ids"]) for batch in trainer.alphatoken.source.batches] == [4]
    case = path_feature(options=lambda: {"target_dataset": Dataset.from_list([long])}, max_length=30)
    with pytest.raises(ValueError, match=r"1 of 1 target pairs .*Raise max_length"):
        make("dpo", tuning.TRAINERS["dpo"][0], case, tmp_path)


# ------------------------------------------------------------------------------------ computed once


SFT = {
    "plain": path_feature(),
    "conversational": path_feature("chat"),
    "assistant tokens": path_feature("messages", assistant_only_loss=True),
    "every token": path_feature("text", completion_only_loss=False),
    "keep_end": path_feature(max_length=9, truncation_mode="keep_end"),
    "packing_bfd": path_feature(packing=True, max_length=40),
    "packing_bfd_split": path_feature(packing=True, packing_strategy="bfd_split", max_length=16),
    "packing_wrapped": path_feature(packing=True, packing_strategy="wrapped", max_length=16),
    "padding_free": path_feature(padding_free=True, max_length=None),
    "multiple of 8": path_feature(pad_to_multiple_of=8),
    "all columns kept": path_feature(remove_unused_columns=False),
    "workers": path_feature(dataloader_num_workers=1),
    "accumulation": path_feature(gradient_accumulation_steps=2, max_steps=2),
    "begun at theta*": path_feature(path_start=True),
    "from the reference": path_feature(path_from="reference"),
    "reentrant": path_feature(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "held out": path_feature(options=lambda: {"target_dataset": None}),
}
DPO = {
    "plain": path_feature(),
    "conversational": path_feature("chat"),
    "keep_start": path_feature(max_length=13),
    "keep_end": path_feature(max_length=9, truncation_mode="keep_end"),
    "precomputed references": path_feature(precompute_ref_log_probs=True),
    "accumulation": path_feature(gradient_accumulation_steps=2, max_steps=2),
    "whole pairs": path_feature(path_from="reference", threshold="zero", threshold_scope="pair"),
    "held out": path_feature(options=lambda: {"target_dataset": None}),
}
CASES = [("sft", name) for name in SFT] + [("dpo", name) for name in DPO]


def pair_of_trainers(kind, case, folder, **changes):
    """The same training with a forward at theta* in each step, and with the column."""
    return [
        started(kind, {**case, "args": {**case["args"], "precompute_path_log_probs": once}}, folder, **changes)
        for once in (False, True)
    ]


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_computed_once_it_is_the_same_training(kind, name, tmp_path):
    case = (SFT if kind == "sft" else DPO)[name]
    each, once = pair_of_trainers(kind, case, tmp_path, evaluate=True)
    assert not any("path_logps" in batch for batch in each.batches)
    for batch, other in zip(once.batches, each.batches, strict=True):
        assert set(batch) - {"path_logps"} == set(other)
        assert torch.equal(batch["input_ids"], other["input_ids"])
        assert batch["path_logps"].shape == batch["input_ids"].shape and float(batch["path_logps"].abs().max()) > 0.1
    assert_same_training(once, each)
    assert once.evaluate()["eval_loss"] == pytest.approx(each.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_the_column_is_each_tokens_own(kind, tmp_path, monkeypatch):
    """Row by row, by a forward of an ordinary model with theta* in it; a column that is shifted shows."""
    case = path_feature(precompute_path_log_probs=True)
    trainer = started(kind, case, tmp_path)
    work = tuning.get_peft_model(base(), lora()).eval()
    trainer.alphatoken.path.apply(work)
    prefixes = ("",) if kind == "sft" else ("chosen_", "rejected_")
    for row in trainer.train_dataset:
        for prefix in prefixes:
            ids = row["input_ids"] if kind == "sft" else row["prompt_ids"] + row[f"{prefix}ids"]
            answer = sum(label != IGNORE for label in row["labels"]) if kind == "sft" else len(row[f"{prefix}ids"])
            with torch.no_grad():
                logps = work(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            own = logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[-answer:, 0]
            found = torch.tensor(row[f"{prefix}path_logps"])
            assert error(found[-answer:], own) < 1e-4
            assert not found[:-answer].any()
            assert error(found[-answer:].roll(1), own) > 1e-2
    assert "list<item: float>" in str(trainer.train_dataset.data.schema.field(f"{prefixes[0]}path_logps").type).replace(
        "element", "item"
    )

    right = PathColumn._path_logps

    def shifted(self, path):
        return {name: [np.roll(row, 1) for row in column] for name, column in right(self, path).items()}

    monkeypatch.setattr(PathColumn, "_path_logps", shifted)
    wrong = started(kind, case, tmp_path)
    assert error(wrong.totals[0], trainer.totals[0]) > 0.1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_a_step_with_the_column_runs_the_model_as_a_plain_one_does(kind, tmp_path):
    counts = {}
    once = {"precompute_path_log_probs": True}
    for name, args in (("plain", {"rho": 1.0, **once}), ("each", {}), ("once", once)):
        trainer = make(kind, tuning.TRAINERS[kind][0], path_feature(gradient_checkpointing=False, **args), tmp_path)
        if name == "once":
            trainer.get_train_dataloader()
        seen = []
        check_head(trainer.model, read_batch({"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long()}))
        decoder = trainer.model.get_base_model().get_decoder()
        decoder.register_forward_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        if name == "each":
            trainer.alphatoken.source.path = make_path(trainer.model, trainer.alphatoken.source.batches, steps=1,
                                                       config=trainer.alphatoken.config, progress=False)  # fmt: skip
            seen.clear()
        trainer.train()
        counts[name] = (seen.count(True), seen.count(False))
    references = 3 if kind == "dpo" else 0
    assert counts["plain"] == counts["once"] == (3, references)
    assert counts["each"] == (3, 3 + references)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_nf4_and_bf16(kind, tmp_path):
    """In the precision of the training forward: what is left is rounding, of other batches."""
    for case, tolerance in ((path_feature(model=tuning.nf4), 1e-3), (path_feature(bf16=True), 0.2)):
        each, once = pair_of_trainers(kind, {**case, "args": {**case["args"], "max_steps": 1}}, tmp_path)
        (found,), (expected,) = once.totals, each.totals
        assert error(found, expected) < tolerance
        logps = once.batches[0]["path_logps"]
        assert float(logps.abs().max()) > 1


@pytest.mark.filterwarnings("ignore")
def test_a_column_that_the_data_bring(tmp_path, monkeypatch):
    """From `Path.logps`, in a data set of its own: no target, no Fisher, no row held out, and the same values."""
    case = path_feature(precompute_path_log_probs=True)
    once = started("sft", case, tmp_path)
    monkeypatch.setattr(tuning.TRAINERS["sft"][0], "_estimate_fisher", lambda self: pytest.fail("estimated"))
    column = [[n for n, label in zip(row["path_logps"], row["labels"], strict=True) if label != IGNORE]
              for row in once.train_dataset]  # fmt: skip
    data = sft_data().add_column("path_logps", column)
    trainer = keeping(tuning.TRAINERS["sft"][0])(
        base(), args=arguments("sft", tmp_path, **path_feature()["args"]), train_dataset=data,
        processing_class=tokenizer(), peft_config=lora(),
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(data) and trainer.alphatoken.source.batches is None
    trainer.before = dict(trained(trainer.model))
    trainer.train()
    assert_same_training(trainer, once)


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_told(tmp_path, caplog):
    for peft, told in ((lambda: lora(lora_dropout=0.1), True), (lora, False)):
        caplog.clear()
        trainer = make("sft", tuning.TRAINERS["sft"][0], path_feature(peft=peft, precompute_path_log_probs=True),
                       tmp_path)  # fmt: skip
        with caplog.at_level("WARNING"):
            trainer.get_train_dataloader()
        assert ("computed once, have none" in caplog.text) == told
        assert not trainer.model.training or trainer.model.training == trainer.model.base_model.training


@pytest.mark.parametrize(("changes", "message"), [
    ({"path_kl": 0.5}, r"precompute_path_log_probs is True, but path_kl=0.5 needs theta\* itself.*default"),
    ({"path_every": 2}, r"precompute_path_log_probs is True, but path_every=2 needs theta\* itself"),
    ({"estimator": "ghost"}, r'precompute_path_log_probs is True, but estimator="ghost" has no theta\*'),
])  # fmt: skip
def test_settings_that_need_theta_star_itself(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments("sft", tmp_path, **{"precompute_path_log_probs": True, "estimator": "path", **changes})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_theta_star_of_some_blocks_is_not_computed_once(kind, tmp_path):
    """Log-probabilities at theta* change with what is trained beside it."""
    case = path_feature(precompute_path_log_probs=True, num_layers=2)
    trainer = make(kind, tuning.TRAINERS[kind][0], case, tmp_path)
    with pytest.raises(
        ValueError, match=r"computed once, but .*layers\.0.* is trained and no part of theta\*.*num_layers=N"
    ):
        trainer.train()
    assert "path_logps" not in trainer.train_dataset.column_names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("changes", [{}, {"precompute_path_log_probs": True}, {"smoothing": 1}, {"threshold": "soft"}])
def test_at_theta_star_a_step_at_a_rate_of_0_drops_nothing(kind, changes, tmp_path):
    """The first step of a warm-up moves nothing: at the second the model is still at theta*, and values are 0."""
    case = path_feature(path_start=True, path_kl=0.0, warmup_steps=2, optim="adamw_torch", **changes)
    trainer = started(kind, {**case, "args": {**case["args"], "lr_scheduler_type": "linear"}}, tmp_path)
    largest = [float(values.abs().max()) for values in trainer.totals]
    assert largest[:2] == [0.0, 0.0] and largest[2] > 1e-4
    for mask, batch in zip(trainer.masks[:2], trainer.batches[:2], strict=True):
        assert torch.equal(mask[:, 1:] > 0, read_batch(batch).labels[:, 1:] != IGNORE)


def columned(**changes):
    case = path_feature(**changes)
    return case, sft_data().map(lambda row: {"path_logps": [-1.0] * (len(row["completion"]) + 1)})


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_computed_once(tmp_path):
    once = path_feature(precompute_path_log_probs=True)
    sft = tuning.TRAINERS["sft"][0]
    with pytest.raises(ValueError, match=r"train_dataset is a IterableDataset, to which no column.*datasets.Dataset"):
        make("sft", sft, {**once, "options": lambda: {"stream": True}}, tmp_path)
    with pytest.raises(ValueError, match=r"precompute_path_log_probs is True, but tokens are not chosen by their val"):
        make("sft", sft, path_feature(precompute_path_log_probs=True, selection="random"), tmp_path)

    class Deep(tuning.TRAINERS["sft"][1]):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_deepspeed_enabled = True

    class Ours(sft.__mro__[1], Deep):
        pass

    with pytest.raises(ValueError, match=r"precompute_path_log_probs is not offered under DeepSpeed"):
        make("sft", Ours, once, tmp_path)
    with pytest.raises(ValueError, match=r"path_start is True, but .* DeepSpeed.*path_start=False"):
        make("sft", Ours, path_feature(path_start=True), tmp_path)
    for changes, message in (
        ({"path_kl": 0.5}, r"The data bring path_logps, but path_kl=0.5 needs theta\* itself"),
        ({"path_start": True}, r"The data bring path_logps, but path_start=True needs theta\* itself"),
    ):
        case, data = columned(**changes)
        with pytest.raises(ValueError, match=message):
            sft(base(), args=arguments("sft", tmp_path, **case["args"]), train_dataset=data,
                processing_class=tokenizer(), peft_config=lora())  # fmt: skip
    case, data = columned()
    with pytest.raises(ValueError, match=r"training data bring path_logps.*target_dataset would lead to another"):
        sft(base(), args=arguments("sft", tmp_path, **case["args"]), train_dataset=data, target_dataset=sft_data(),
            processing_class=tokenizer(), peft_config=lora())  # fmt: skip


# ------------------------------------------------------------------------------------ begun at theta*, held there


def explicit_masks(trainer_class):
    """Of each micro-batch of a run, by `alphatoken_weights` at the parameters that it ran with."""

    class Explicit(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            batch = {key: value for key, value in inputs.items() if key != "use_cache"}
            loss = super().training_step(model, inputs, *args, **kwargs)
            gate = self.alphatoken
            config = dataclasses.replace(gate.config, path_every=None)
            weights = alphatoken_weights(self.model, gate.ref_model, batch, path=gate.path, config=config)
            self.expected = [*getattr(self, "expected", []), weights]
            return loss

    return Explicit


def with_kl(trainer_class, theta_star, coef):
    """A trainer that adds coef * KL(theta* || model), through whole logits."""

    class WithKL(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batch, here = dict(inputs), Path(dict(trained(self.model)))
            given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
            theta_star.apply(self.model)
            with torch.no_grad():
                wanted = self.model(**given, use_cache=False).logits.log_softmax(-1)
            here.apply(self.model)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            logps = self.model(**given, use_cache=False).logits.log_softmax(-1)
            inside = batch["labels"] != IGNORE if "labels" in batch else batch["completion_mask"] == 1
            kl = (wanted.exp() * (wanted - logps)).sum(-1)[:, :-1][inside[:, 1:]].sum()
            items = kwargs.get("num_items_in_batch")
            return loss + coef * kl / (inside[:, 1:].sum() if items is None else items)

    return WithKL


def settings_of(config):
    """A preset as arguments; theta* near, so that little models tell."""
    return dataclasses.asdict(dataclasses.replace(config, path_steps=STEPS, path_rate=RATE))


BEST, PAIRS = settings_of(AlphaTokenConfig.best()), settings_of(AlphaTokenConfig.best(pairs=True))
HELD = {
    "start": ("sft", {"path_start": True}),
    "start, pairs": ("dpo", {"path_start": True}),
    "kl": ("sft", {"path_kl": 0.6}),
    "kl, accumulation": ("sft", {"path_kl": 0.6, "gradient_accumulation_steps": 2}),
    "kl, pairs, accumulation": ("dpo", {"path_kl": 0.6, "gradient_accumulation_steps": 2}),
    "best": ("sft", BEST),
    "best, accumulation": ("sft", {**BEST, "gradient_accumulation_steps": 2}),
    "best, packing": ("sft", {**BEST, "packing": True, "max_length": 40}),
    "best for pairs": ("dpo", PAIRS),
    "best for pairs, accumulation": ("dpo", {**PAIRS, "gradient_accumulation_steps": 2}),
    "best for pairs, precomputed": ("dpo", {**PAIRS, "precompute_ref_log_probs": True}),
    "theta* anew": ("sft", {"path_every": 2, "path_renewal_steps": 2}),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.filterwarnings("ignore")
def test_steps_are_the_explicit_ones(name, tmp_path):
    """Masked loss + coefficient * KL to theta*, from where training should begin."""
    kind, settings = HELD[name]
    target = dpo_data(count=4) if "best for pairs" in name else sft_data(count=4, first=50)
    options = {"options": lambda: {"target_dataset": target}, "learning_rate": 0.1}
    case = path_feature(**{"gradient_checkpointing": False, **options, **settings})
    ours, stock = tuning.TRAINERS[kind]
    trainer = make(kind, explicit_masks(keeping(ours)), case, tmp_path)
    before = dict(trained(trainer.model))
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append(dict(trained(module))) if
                                            torch.is_grad_enabled() and trainer.alphatoken.path is not None
                                            else None)  # fmt: skip
    trainer.train()
    assert len(trainer.masks) == 3 * settings.get("gradient_accumulation_steps", 1)
    for mask, expected in zip(trainer.masks, trainer.expected, strict=True):
        assert torch.equal(mask, expected)
    theta_star = trainer.alphatoken.path
    first = seen[0]
    begun = theta_star.parameters if settings.get("path_start") else before
    assert set(first) == set(begun) and all(torch.equal(first[key], begun[key]) for key in begun)
    assert not all(torch.equal(theta_star.parameters[key], before[key]) for key in before)

    cls, plain = masked(stock, trainer.masks), {**case, "options": dict}
    if settings.get("path_kl"):
        cls = with_kl(cls, theta_star, settings["path_kl"])
    other = make(kind, cls, plain, tmp_path, ours=False)
    Path(begun).apply(other.model)
    other.train()
    assert_same_parameters(trainer.model, other.model, begun)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (trainer, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    logged = [log for log in trainer.state.log_history if "alphatoken/kept" in log]
    assert ("alphatoken/path_kl" in logged[-1]) == bool(settings.get("path_kl"))
    if settings.get("path_kl"):  # and without it the steps are others
        other = make(kind, masked(stock, trainer.masks), plain, tmp_path, ours=False)
        Path(begun).apply(other.model)
        other.train()
        with pytest.raises(AssertionError):
            assert_same_parameters(trainer.model, other.model, begun, 1e-2)


@pytest.mark.filterwarnings("ignore")
def test_trls_sums_with_ld_alpha_are_no_log_probabilities(tmp_path):
    """Computed beforehand, they leave out a part of the longer answer's end; values and theta* do without them."""
    found, expected = (
        started("dpo", path_feature(**PAIRS, ld_alpha=0.5, precompute_ref_log_probs=once), tmp_path)
        for once in (True, False)
    )
    assert "ref_chosen_logps" in found.train_dataset.column_names
    assert_same_training(found, expected)
    kept = torch.cat([mask.bool().any(1) for mask in found.masks])
    assert bool(kept.any())


# ------------------------------------------------------------------------------------ resumed


RESUMED = {
    "plain": ("sft", {}),
    "best": ("sft", BEST),
    "best for pairs": ("dpo", PAIRS),
    "accumulation": ("sft", {**BEST, "gradient_accumulation_steps": 2}),
    "theta* anew": ("sft", {"path_every": 2, "path_renewal_steps": 2}),
    "computed once": ("sft", {"precompute_path_log_probs": True}),
    "computed once, begun at theta*": ("dpo", {"precompute_path_log_probs": True, "path_start": True}),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    kind, settings = RESUMED[name]
    common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    case = path_feature(**{"gradient_checkpointing": not settings.get("path_kl"), **common, **settings})
    whole = started(kind, case, tmp_path)
    resumed = make(kind, keeping(tuning.TRAINERS[kind][0]), case, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    count = 2 * settings.get("gradient_accumulation_steps", 1)
    assert len(resumed.masks) == count
    for i in range(-count, 0):
        assert torch.equal(resumed.masks[i], whole.masks[i]) and torch.equal(resumed.totals[i], whole.totals[i])
    for (key, after), (_, expected) in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(after, expected), key
    ages = [
        [log["alphatoken/target_age"] for log in t.state.log_history if "alphatoken/kept" in log]
        for t in (whole, resumed)
    ]
    assert ages[0] == ages[1] == ([0, 1, 0, 1, 0] if name == "theta* anew" else [0, 1, 2, 3, 4])


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_theta_star_is_not_overwritten_by_one(tmp_path, caplog):
    """Training began at theta* once; a run that goes on does not go back there."""
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    case = path_feature(**common, path_start=True)
    started("sft", case, tmp_path)
    (tmp_path / "checkpoint-1" / "alphatoken.safetensors").unlink()
    saved = {}
    resumed = make("sft", keeping(tuning.TRAINERS["sft"][0]), case, tmp_path)

    def note(module, args):
        if torch.is_grad_enabled() and resumed.alphatoken.path is not None:
            saved.setdefault("at", dict(trained(module)))

    resumed.model.register_forward_pre_hook(note)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "has no alphatoken.safetensors" in caplog.text
    again = make("sft", tuning.TRAINERS["sft"][0], case, tmp_path)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for key, there in trained(again.model):
        assert torch.equal(saved["at"][key], there), key
