"""A number per token from the data set to the gradient: through TRL's preparing, truncating, packing and collating."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import tuning
from checks import error
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, KTOConfig, KTOTrainer, SFTConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from tuning import arguments, base, dpo_data, lora, masked, sft_data, tokenizer, trained

from alphatoken_loss import AlphaTokenArguments, AlphaTokenMixin
from alphatoken_loss.tools.score.parts import _schema
from alphatoken_loss.trl.columns import ColumnCollator, aligned

IGNORE = -100


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """TRL makes the output folder, though nothing is written."""
    monkeypatch.chdir(tmp_path)


def weight(token):
    """Of a token, so that a batch tells whether its weights stand where they should."""
    return ((token * 37) % 11) / 4


def weights_of(ids):
    return torch.where(ids >= 0, ((ids * 37) % 11) / 4, 0.0)


def expected(batch):
    """What a batch's weights should be, by its own tokens."""
    if "labels" in batch:
        inside = batch["labels"] != IGNORE
    else:
        inside = batch["completion_mask"] == 1
    return weights_of(batch["input_ids"]) * inside


def completions(form, rows, chosen="completion"):
    """The token ids of each row's completion as TRL tokenises it, from the stock trainer's own preparation."""
    kind = "sft" if chosen == "completion" else "dpo"
    _, stock = tuning.TRAINERS[kind]
    config = SFTConfig if kind == "sft" else DPOConfig
    extra = {"max_length": None, "shuffle_dataset": False} if kind == "sft" else {"max_length": None}
    if form == "messages":
        extra["assistant_only_loss"] = True
    trainer = stock(
        base(),
        args=config(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **extra),
        train_dataset=rows,
        processing_class=tokenizer(chat=form in ("chat", "messages")),
        peft_config=lora(),
    )
    return list(trainer.train_dataset)


def with_weights(form, count=12, *, whole=False):
    """SFT rows with a column of weights: one number per token of the completion, or of the whole row."""
    data = sft_data(form, count)
    column = []
    for row in completions(form, data):
        inside = [label != IGNORE for label in row["labels"]]
        numbers = [weight(token) if is_in else 0.0 for token, is_in in zip(row["input_ids"], inside, strict=True)]
        column.append(numbers if whole else [n for n, is_in in zip(numbers, inside, strict=True) if is_in])
    return data.add_column("token_weights", column)


def tokenised(count=12, *, mask="labels"):
    rows = completions("plain", sft_data("plain", count))
    out = []
    for row in rows:
        inside = [label != IGNORE for label in row["labels"]]
        new = {"input_ids": row["input_ids"]}
        new |= {"labels": row["labels"]} if mask == "labels" else {"completion_mask": [int(i) for i in inside]}
        new["token_weights"] = [weight(t) if i else 0.0 for t, i in zip(row["input_ids"], inside, strict=True)]
        out.append(new)
    return Dataset.from_list(out)


SFT = {
    "completion": (lambda: with_weights("plain"), {}),
    "whole rows": (lambda: with_weights("plain", whole=True), {}),
    "conversational": (lambda: with_weights("chat"), {}),
    "assistant tokens": (lambda: with_weights("messages"), {"assistant_only_loss": True}),
    "text": (lambda: with_weights("text"), {}),
    "tokenised": (tokenised, {}),
    "tokenised, completion_mask": (lambda: tokenised(mask="completion_mask"), {"completion_only_loss": True}),
    "every token": (lambda: with_weights("text", whole=True), {"completion_only_loss": False}),
    "keep_start": (lambda: with_weights("plain"), {"max_length": 13}),
    "keep_end": (lambda: with_weights("plain"), {"max_length": 9, "truncation_mode": "keep_end"}),
    "packing_bfd": (lambda: with_weights("plain"), {"packing": True, "max_length": 40}),
    "packing_bfd, cut": (lambda: with_weights("plain"), {"packing": True, "max_length": 13}),
    "packing_bfd_split": (lambda: with_weights("plain"),
                          {"packing": True, "packing_strategy": "bfd_split", "max_length": 10}),
    "packing_wrapped": (lambda: with_weights("plain"),
                        {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding_free": (lambda: with_weights("plain"), {"padding_free": True, "max_length": None}),
    "shuffled": (lambda: with_weights("plain"), {"shuffle_dataset": True}),
    "shuffled and packed": (lambda: with_weights("plain"),
                            {"shuffle_dataset": True, "packing": True, "max_length": 30}),
    "multiple of 8": (lambda: with_weights("plain"), {"pad_to_multiple_of": 8}),
    "all columns kept": (lambda: with_weights("plain"), {"remove_unused_columns": False}),
    "workers": (lambda: with_weights("plain"), {"dataloader_num_workers": 1}),
    "accumulation": (lambda: with_weights("plain"), {"gradient_accumulation_steps": 2}),
    "stream": (lambda: with_weights("plain").to_iterable_dataset(), {}),
}  # fmt: skip


def pairs(form="plain", *, whole=False):
    data = dpo_data(form)
    columns = {"chosen_token_weights": [], "rejected_token_weights": []}
    for row in completions(form, data, "chosen"):
        for branch in ("chosen", "rejected"):
            before = [0.0] * len(row["prompt_ids"]) if whole else []
            columns[f"{branch}_token_weights"].append(before + [weight(token) for token in row[f"{branch}_ids"]])
    for name, column in columns.items():
        data = data.add_column(name, column)
    return data


def tokenised_pairs(form):
    """As `score` writes them: whole sequences with labels, in its parts with the response beside; or ids apart."""
    out = []
    for row in completions("plain", dpo_data(), "chosen"):
        new = {"prompt_ids": row["prompt_ids"]} if form == "ids" else {}
        for branch in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{branch}_ids"]
            weights = [0.0] * len(prompt) + [weight(token) for token in answer]
            if form == "ids":
                new |= {f"{branch}_ids": answer, f"{branch}_token_weights": weights}
                continue
            new[f"{branch}_input_ids"] = prompt + answer
            new[f"{branch}_labels"] = [IGNORE] * len(prompt) + answer
            new[f"{branch}_response_mask"] = [0] * len(prompt) + [1] * len(answer)
            new[f"{branch}_token_weights"] = weights
        out.append(new)
    return Dataset.from_list(out)


DPO = {
    "completion": (pairs, {}),
    "whole rows": (lambda: pairs(whole=True), {}),
    "conversational": (lambda: pairs("chat"), {}),
    "keep_start": (pairs, {"max_length": 13}),
    "keep_end": (pairs, {"max_length": 9, "truncation_mode": "keep_end"}),
    "precomputed": (pairs, {"precompute_ref_log_probs": True}),
    "multiple of 8": (pairs, {"pad_to_multiple_of": 8}),
    "accumulation": (pairs, {"gradient_accumulation_steps": 2}),
    "tokenised": (lambda: tokenised_pairs("ids"), {}),
    "tokenised, cut": (lambda: tokenised_pairs("ids"), {"max_length": 13}),
    "as score writes": (lambda: tokenised_pairs("score"), {}),
    "stream": (lambda: pairs().to_iterable_dataset(), {}),
}
CASES = [("sft", name) for name in SFT] + [("dpo", name) for name in DPO]


def without(data):
    names = [name for name in data.column_names if "token_weights" in name]
    return data.remove_columns(names)


def keeping(trainer_class):
    class Keeping(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            batch = {key: value for key, value in inputs.items() if key != "use_cache"}
            self.batches = [*getattr(self, "batches", []), batch]
            loss = super().training_step(model, inputs, *args, **kwargs)
            gate = getattr(self, "alphatoken", None)
            if gate is not None:
                self.masks = [*getattr(self, "masks", []), gate.weights]
            return loss

    return Keeping


def make(kind, data, folder, cls=None, *, chat=False, options=None, **changes):
    ours, _ = tuning.TRAINERS[kind]
    args = arguments(kind, folder, **{"max_steps": 2, **changes})
    return (cls or ours)(
        base(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer(chat=chat),
        peft_config=lora(),
        **(options or {}),
    )


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_every_number_stays_with_its_token(kind, name, tmp_path, monkeypatch):
    """In every batch, which is the stock trainer's for the same data; and the steps are the weighted ones."""
    for part in ("_target_batches", "_estimate_fisher", "_held_out_rows"):
        monkeypatch.setattr(AlphaTokenMixin, part, lambda *args: pytest.fail("estimated or held out"))
    make_data, changes = (SFT if kind == "sft" else DPO)[name]
    data, chat = make_data(), name in ("conversational", "assistant tokens")
    ours, stock = tuning.TRAINERS[kind]
    trainer = make(kind, data, tmp_path, keeping(ours), chat=chat, **changes)
    before = dict(trained(trainer.model))
    trainer.train()
    seen = 0
    for batch, mask in zip(trainer.batches, trainer.masks, strict=True):
        found = batch["token_weights"]
        seen += int((found != 0).sum())
        wanted = expected(batch)
        if "position_ids" in batch:  # TRL takes the first label of each sequence away as it collates
            found = torch.where(batch["position_ids"] == 0, 0.0, found)
        assert torch.equal(found, wanted)
        wanted[:, 0] = 0  # what nothing predicts
        assert torch.equal(mask, wanted)
    assert seen > 5
    plain = {"tokenised", "tokenised, cut", "as score writes"}
    if kind == "dpo" and name in plain:  # TRL takes no tokenised pairs
        source, changes = dpo_data(), {key: value for key, value in changes.items()}
    else:
        source = without(data)
    other = make(kind, source, tmp_path, keeping(masked(stock, trainer.masks)), chat=chat, **changes)
    other.train()
    for batch, theirs in zip(trainer.batches, other.batches, strict=True):
        assert set(batch) - {"token_weights"} == set(theirs)
        for key in theirs:
            same = torch.equal(batch[key], theirs[key]) if isinstance(theirs[key], torch.Tensor) else True
            assert same, key
    after, wanted = dict(trained(trainer.model)), dict(trained(other.model))
    moved = max(float((wanted[key] - before[key]).abs().max()) for key in wanted)
    assert moved > 0
    for key in wanted:
        assert float((after[key] - wanted[key]).abs().max()) < 1e-4 * moved, key


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_a_column_by_another_name(kind, tmp_path, caplog):
    data = with_weights("plain") if kind == "sft" else pairs()
    prefixes = ("",) if kind == "sft" else ("chosen_", "rejected_")
    for prefix in prefixes:
        data = data.rename_column(f"{prefix}token_weights", f"{prefix}mine")
    trainer = make(kind, data, tmp_path, keeping(tuning.TRAINERS[kind][0]), options={"token_weights": "mine"})
    trainer.train()
    for batch in trainer.batches:
        assert torch.equal(batch["mine"], expected(batch))
    with pytest.raises(ValueError, match=r"names the column 'theirs', which the training data has not"):
        make(kind, data, tmp_path, options={"token_weights": "theirs"})


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_evaluation_is_the_stock_trainers(kind, tmp_path):
    """On data with the column, which no model sees."""
    make_data = (lambda: with_weights("plain")) if kind == "sft" else pairs
    trainer = make(kind, make_data(), tmp_path, options={"eval_dataset": make_data()})
    stock = tuning.TRAINERS[kind][1]
    other = make(kind, without(make_data()), tmp_path, stock, options={"eval_dataset": without(make_data())})
    losses = [t.evaluate()["eval_loss"] for t in (trainer, other)]
    assert losses[0] == losses[1]
    losses = [t.evaluate(make_data())["eval_loss"] for t in (trainer, other)]
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["column", "selection"])
def test_adams_step_of_tokens_that_are_not_valued_is_refused(other, tmp_path):
    data, options = (with_weights("plain"), {}) if other == "column" else (tuning.sft_data(), {"selection": "low_loss"})
    with pytest.raises(ValueError, match=r"precondition is True, but tokens are not chosen by their values\. Set"):
        make("sft", data, tmp_path, tuning.TRAINERS["sft"][0], precondition=True, **options)


@pytest.mark.filterwarnings("ignore")
def test_with_rho_1_the_column_is_left_alone(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trainer = make("sft", with_weights("plain"), tmp_path, keeping(tuning.TRAINERS["sft"][0]), rho=1.0)
    assert "token_weights are not used, since rho=1.0" in caplog.text
    trainer.train()
    assert trainer.alphatoken is None and all("token_weights" not in batch for batch in trainer.batches)


@pytest.mark.filterwarnings("ignore")
def test_the_log_says_that_weights_were_found(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        trainer = make("sft", with_weights("plain"), tmp_path)
    assert "Token weights of the training data are used (token_weights), and nothing is valued" in caplog.text
    assert len(trainer.train_dataset) == 12
    trainer.train()
    figures = [log for log in trainer.state.log_history if "alphatoken/kept" in log]
    assert figures and "alphatoken/target_age" not in figures[0] and "alphatoken/weight" in figures[0]


# ------------------------------------------------------------------------------------ as `score` writes them


@pytest.mark.filterwarnings("ignore")
def test_values_that_score_wrote_can_be_weights(tmp_path):
    """Its parts have a value for every response token, and labels of the kept ones alone: values decide, as weights."""
    names = set(_schema("sft", scored=True).names)
    rows = []
    for i, row in enumerate(tokenised()):
        inside = [int(label != IGNORE) for label in row["labels"]]
        labels = [
            token if keep and i % 2 else IGNORE
            for i, (token, keep) in enumerate(zip(row["input_ids"], inside, strict=True))
        ]
        rows.append({"row": i, "input_ids": row["input_ids"], "attention_mask": [1] * len(inside), "labels": labels,
                     "token_values": row["token_weights"], "response_mask": inside})  # fmt: skip
    assert set(rows[0]) <= names
    cls = keeping(tuning.TRAINERS["sft"][0])
    trainer = make("sft", Dataset.from_list(rows), tmp_path, cls, options={"token_weights": "token_values"})
    trainer.train()
    for batch in trainer.batches:
        assert torch.equal(batch["token_values"], expected(batch)) and float(batch["token_values"].sum()) > 0


@pytest.mark.filterwarnings("ignore")
def test_pairs_that_score_wrote_are_trained_on_the_tokens_it_kept(tmp_path):
    """Whole answers stand in the loss, whose gradient the labels decide."""
    names = set(_schema("pairs", scored=False).names)
    rows, kept = [], []
    for row in tokenised_pairs("score"):
        new = {}
        for branch in ("chosen", "rejected"):
            ids = row[f"{branch}_input_ids"]
            tokens = enumerate(zip(ids, row[f"{branch}_response_mask"], strict=True))
            labels = [token if is_in and place % 3 else IGNORE for place, (token, is_in) in tokens]
            new |= {f"{branch}_input_ids": ids, f"{branch}_attention_mask": [1] * len(ids), f"{branch}_labels": labels}
        rows.append(new)
        kept += [label for branch in ("chosen", "rejected") for label in new[f"{branch}_labels"] if label != IGNORE]
    assert set(rows[0]) <= names
    trainer = make("dpo", Dataset.from_list(rows), tmp_path, keeping(tuning.TRAINERS["dpo"][0]), max_steps=6)
    trainer.train()
    total = sum(float(batch["token_weights"].sum()) for batch in trainer.batches)
    assert total == len(kept)
    for batch in trainer.batches:
        assert set(batch["token_weights"].unique().tolist()) == {0.0, 1.0}
        assert int(batch["completion_mask"].sum()) > int(batch["token_weights"].sum())


# ------------------------------------------------------------------------------------ other trainers


@dataclass
class KTOArguments(AlphaTokenArguments, KTOConfig):
    pass


class AlphaTokenKTOTrainer(AlphaTokenMixin, KTOTrainer):
    def alphatoken_batch(self, inputs):
        if "completion_mask" not in inputs:
            return inputs
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}


@pytest.mark.parametrize("way", ["column", "function"])
@pytest.mark.filterwarnings("ignore")
def test_kto_through_the_mixin(way, tmp_path):
    data = with_weights("plain").add_column("label", [i % 2 == 0 for i in range(12)])
    data = without(data) if way == "function" else data
    args = KTOArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=2, seed=3,
                        learning_rate=0.3, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
                        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=3)  # fmt: skip
    common = {"args": args, "processing_class": tokenizer(), "peft_config": lora()}
    options = {"token_weights": lambda forward: 1 + forward.entropies} if way == "function" else {}
    trainer = keeping(AlphaTokenKTOTrainer)(base(), train_dataset=data, **options, **common)
    before = dict(trained(trainer.model))
    trainer.train()
    for batch, mask in zip(trainer.batches, trainer.masks, strict=True):
        if way == "column":
            assert torch.equal(batch["token_weights"], expected(batch))
            assert torch.equal(mask, expected(batch))
        else:
            assert float(mask[batch["completion_mask"] == 1].min()) > 1
    other = masked(KTOTrainer, trainer.masks)(
        base(), train_dataset=without(data) if way == "column" else data, **common
    )
    other.train()
    moved = max(float((wanted - before[key]).abs().max()) for key, wanted in trained(other.model))
    assert moved > 0
    for (key, after), (_, wanted) in zip(trained(trainer.model), trained(other.model), strict=True):
        assert float((after - wanted).abs().max()) < 1e-3 * moved, key


@dataclass
class PlainArguments(AlphaTokenArguments, TrainingArguments):
    pass


class AlphaTokenTrainer(AlphaTokenMixin, Trainer):
    pass


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_own_trainer_padding_on_either_side(side, tmp_path):
    """Tokenised rows, its own collator; gradients divided by all response tokens, as its loss is."""
    reader = tokenizer()
    reader.padding_side = side
    data = tokenised().map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    args = PlainArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, seed=3,
                          learning_rate=1.0, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
                          save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4,
                          gradient_accumulation_steps=2)  # fmt: skip
    trainer = keeping(AlphaTokenTrainer)(
        get_peft_model(base(), lora()), args=args, train_dataset=data, data_collator=DataCollatorForSeq2Seq(reader)
    )
    model = get_peft_model(base(), lora())
    model.load_state_dict(trainer.model.state_dict())
    trainer.train()
    padded = [batch["attention_mask"][:, 0 if side == "left" else -1].min() for batch in trainer.batches]
    assert 0 in padded
    tokens, loss = sum(int((batch["labels"] != IGNORE).sum()) for batch in trainer.batches), 0.0
    for batch in trainer.batches:
        assert torch.equal(batch["token_weights"], expected(batch))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        loss = loss + (nll * expected(batch)[:, 1:]).sum() / tokens
    loss.backward()
    for (name, before), (_, after) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        if before.requires_grad and float(before.grad.abs().max()) > 0:
            assert error(before.detach() - after.detach(), before.grad) < 1e-4, name


# ------------------------------------------------------------------------------------ the collator alone


def test_collators_lay_columns_out_as_ids():
    rows = [{"input_ids": [5, 6, 7], "token_weights": [0.0, 1.5, 2.5]}, {"input_ids": [8], "token_weights": [3.0]}]
    for free in (False, True):
        collator = ColumnCollator(DataCollatorForLanguageModeling(0, padding_free=free), ("token_weights",))
        found = collator(rows)["token_weights"]
        wanted = [[0.0, 1.5, 2.5, 3.0]] if free else [[0.0, 1.5, 2.5], [3.0, 0.0, 0.0]]
        assert torch.equal(found, torch.tensor(wanted))
        assert collator.padding_free == free  # it is asked for what the trainer's own is
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "chosen_token_weights": [0, 0, 3.0, 4.0],
             "rejected_token_weights": [0, 0, 5.0]}]  # fmt: skip
    collator = ColumnCollator(
        DataCollatorForPreference(0, max_length=3, truncation_mode="keep_end"), ("token_weights",)
    )
    assert torch.equal(collator(rows)["token_weights"], torch.tensor([[0.0, 3.0, 4.0], [0.0, 0.0, 5.0]]))
    two = [{"input_ids": [5, 6], "a": [1.0, 2.0], "b": [3.0, 4.0]}]
    found = ColumnCollator(DataCollatorForLanguageModeling(0, pad_to_multiple_of=4), ("a", "b"))(two)
    assert torch.equal(found["a"], torch.tensor([[1.0, 2.0, 0, 0]])) and found["b"][0, 1] == 4.0
    with pytest.raises(ValueError, match=r"A row has 2 tokens and 1 numbers in its column a"):
        ColumnCollator(DataCollatorForLanguageModeling(0), ("a",))([{"input_ids": [5, 6], "a": [1.0]}])


# ------------------------------------------------------------------------------------ what is refused


def one(**changes):
    row = {"input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, 7, 8], "token_weights": [0.0, 0.0, 1.0, 2.0]}
    return Dataset.from_list([row, {**row, **changes}])


WRONG = {
    "length": ([1.0, 2.0, 3.0], "holds 3 numbers, but the row has 4 tokens, 2 of them in its completion"),
    "nothing": (None, "holds nothing, but the row has 4 tokens"),
    "prompt": ([0.0, 0.5, 1.0, 2.0], r"is 0\.5 for token 1, which is part of the prompt"),
    "nan": ([0.0, 0.0, float("nan"), 2.0], "holds a number that is not finite"),
    "inf": ([1.0, float("inf")], "holds a number that is not finite"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_columns_are_named_by_their_row(what):
    column, message = WRONG[what]
    with pytest.raises(ValueError, match=f"Row 1: token_weights {message}"):
        aligned(one(token_weights=column), ["token_weights"])


def test_a_column_of_zeros_is_refused_and_a_row_of_them_is_not():
    zeros = one().map(lambda row: {"token_weights": [0.0] * 4})
    with pytest.raises(ValueError, match=r"token_weights: 0 for every token of all 2 rows"):
        aligned(zeros, ["token_weights"])
    assert aligned(one(token_weights=[0.0, 0.0]), ["token_weights"])["token_weights"][1] == [0.0] * 4


@pytest.mark.filterwarnings("ignore")
def test_what_trainers_refuse(tmp_path):
    """Before anything is trained."""
    model = get_peft_model(base(), lora())
    cls = tuning.TRAINERS["sft"][0]
    common = {"args": arguments("sft", tmp_path), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match=r"Row 1: token_weights is 0\.5"):
        cls(model, train_dataset=one(token_weights=WRONG["prompt"][0]), **common)
    common["args"] = arguments("sft", tmp_path, selection="random")
    with pytest.raises(ValueError, match=r"has token weights \(token_weights\), and selection='random' chooses others"):
        cls(get_peft_model(base(), lora()), train_dataset=one(), **common)
    negative = one().map(lambda row: {"token_weights": [0.0, 0.0, -1.0, 1.0]})
    common["args"] = arguments("sft", tmp_path)
    with pytest.raises(ValueError, match=r"token_weights are below 0.*negative_weights=True"):
        cls(get_peft_model(base(), lora()), train_dataset=negative, **common).train()
    common["args"] = arguments("sft", tmp_path, negative_weights=True, max_steps=1)
    trainer = cls(get_peft_model(base(), lora()), train_dataset=negative, **common)
    trainer.train()
    assert float(trainer.alphatoken.weights.min()) == -1
