"""Other selections: against explicit computations, alignment and signs, and in the trainers."""

from __future__ import annotations

import pytest
import reference
import torch
import tuning
from batches import pair_batch, response, segments, sft_batch, stacked
from models import lora_model, nf4_lora_model
from state import differences, snapshot
from tuning import arguments, base, dpo_data, lora, masked, sft_data, tokenizer, trained

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    AlphaTokenMixin,
    excess_loss_weights,
    log_ratio_weights,
    random_weights,
    selection,
    sft_loss,
)

SFT_KINDS = ("none", "right", "left", "ragged", "full", "packed")
PAIR_KINDS = ("stacked", "stacked_left", "stacked_ref", "separate", "separate_mask")


def losses(model, batch):
    """-log p of each label, from one forward per row over its own tokens: `(B, T)`, 0 where there is none."""
    plain = stacked(batch)
    ids, labels = plain["input_ids"], plain["labels"]
    out = torch.zeros(ids.shape, dtype=torch.float64)
    places = segments(batch)
    attended = plain.get("attention_mask", torch.ones_like(ids)).bool()
    for row in range(len(ids)):
        for place in places[row].unique():
            if place < 0:
                continue
            (columns,) = (attended[row] & (places[row] == place)).nonzero(as_tuple=True)
            with torch.no_grad():
                logp = model(input_ids=ids[row, columns][None], use_cache=False).logits[0].double().log_softmax(-1)
            for i, column in enumerate(columns.tolist()):
                if i > 0 and labels[row, column] != -100:
                    out[row, column] = -logp[i - 1, labels[row, column]]
    return out


def explicit(model, batch, pairs, *, sign=(1, 1)):
    """The excess loss of each token, from a model with its adapter on and with it off."""
    tuned = losses(model, batch)
    with model.disable_adapter():
        excess = tuned - losses(model, batch)
    half = len(excess) // 2 if pairs else len(excess)
    return torch.cat([sign[0] * excess[:half], sign[1] * excess[half:]])


def kept(values, batch, rho, scope):
    """Brute force: sort each group by hand, interpolate the quantile, keep what reaches it."""
    places, inside = segments(batch), response(batch)
    if scope == "batch":
        places = torch.zeros_like(places)
        if "completion_mask" in batch or "chosen_input_ids" in batch:
            places[len(places) // 2 :] = 1
    out = torch.zeros(values.shape)
    for place in places.unique():
        group = inside & (places == place)
        if group.any():
            out[group] = (values[group] >= values[group].quantile(1 - rho)).float()
    return out


CASES = [("excess", kind) for kind in (*SFT_KINDS, *PAIR_KINDS)] + [("log_ratio", kind) for kind in PAIR_KINDS]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_against_one_forward_per_row(name, kind, scope):
    pairs = kind in PAIR_KINDS
    batch = (pair_batch if pairs else sft_batch)(kind, seed=3)
    model = lora_model("llama", seed=3)
    choose = excess_loss_weights if name == "excess" else log_ratio_weights
    sign = (1, 1) if name == "excess" else (-1, 1)  # log-ratio is minus the excess; rejected: the lowest log-ratio
    weights = choose(model, None, batch, rho=0.4, threshold_scope=scope)
    expected = kept(explicit(model, batch, pairs, sign=sign), batch, 0.4, scope)
    assert weights.dtype == torch.float32 and torch.equal(weights, expected)
    assert not weights[:, 0].any() and not weights[~response(batch)].any()
    assert 0 < float(weights.sum()) < int(response(batch).sum())


@pytest.mark.parametrize("kind", ["right", "stacked"])
def test_wrong_signs_and_shifts_fail(kind):
    """What the test above would compare with, were it wrong."""
    pairs = kind == "stacked"
    batch = (pair_batch if pairs else sft_batch)(kind, seed=3)
    model = lora_model("llama", seed=3)
    weights = excess_loss_weights(model, None, batch, rho=0.4)
    values = explicit(model, batch, pairs)
    wrong = {"sign": -values, "shifted": values.roll(1, 1), "next": values.roll(-1, 1)}
    for name, value in wrong.items():
        assert not torch.equal(weights, kept(value, batch, 0.4, "batch")), name
    if pairs:
        ratio = log_ratio_weights(model, None, batch, rho=0.4)
        for sign in ((1, 1), (1, -1), (-1, -1)):
            assert not torch.equal(ratio, kept(explicit(model, batch, True, sign=sign), batch, 0.4, "batch")), sign


def test_a_separate_reference_and_the_adapter_ref():
    model, other = lora_model("llama", seed=3), lora_model("llama", seed=4)
    batch = sft_batch("right", seed=3)
    expected = kept(losses(model, batch) - losses(other, batch), batch, 0.5, "batch")
    assert torch.equal(excess_loss_weights(model, other, batch), expected)
    assert not torch.equal(excess_loss_weights(other, model, batch), expected)
    model.add_adapter("ref", model.peft_config["default"])
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.ref" in name:
                parameter.normal_(0, 0.3)
    tuned = losses(model, batch)
    found = excess_loss_weights(model, None, batch)
    model.set_adapter("ref")
    expected = kept(tuned - losses(model, batch), batch, 0.5, "batch")
    assert torch.equal(found, expected)


def test_rejects():
    model, batch = lora_model("llama"), sft_batch("right")
    with pytest.raises(ValueError, match="needed"):
        log_ratio_weights(model, None, batch)
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match="rho is"):
            random_weights(batch, rho=rho)
    with pytest.raises(ValueError, match="threshold_scope is 'row'"):
        excess_loss_weights(model, None, batch, threshold_scope="row")
    with pytest.raises(ValueError, match="no adapter to switch off"):
        excess_loss_weights(base(), None, batch)
    with pytest.raises(ValueError, match="selection is 'best'"):
        selection.selection_class("best")


def test_ends():
    """All with rho 1, without a forward; nothing of a batch without a response; ties stay."""
    batch = sft_batch("ragged")
    inside = response(batch).float()
    assert torch.equal(excess_loss_weights(None, None, batch, rho=1.0), inside)
    assert torch.equal(random_weights(batch, rho=1.0), inside)
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert not excess_loss_weights(lora_model("llama"), None, empty).any() and not random_weights(empty).any()
    model = lora_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(excess_loss_weights(model, None, batch), inside)


@pytest.mark.parametrize("kind", ["left", "packed", "separate"])
def test_random_keeps_its_share_evenly_and_by_its_generator(kind):
    batch = (pair_batch if kind == "separate" else sft_batch)(kind, seed=1)
    inside = response(batch)
    generator = torch.Generator().manual_seed(0)
    draws = [random_weights(batch, rho=0.5, generator=generator) for _ in range(400)]
    for draw in draws:
        assert not draw[~inside].any()
    mean = torch.stack(draws).mean(0)[inside]
    assert float((mean - mean.mean()).abs().max()) < 0.15 and 0.45 < float(mean.mean()) < 0.6
    again = random_weights(batch, rho=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0]) and not torch.equal(draws[0], draws[1])
    each = random_weights(batch, rho=0.5, threshold_scope="sequence", generator=generator)
    for place in segments(batch)[inside].unique():
        group = inside & (segments(batch) == place)
        assert int(each[group].sum()) in (int(group.sum()) // 2, (int(group.sum()) + 1) // 2)


@pytest.mark.parametrize("name", ["excess", "log_ratio"])
def test_leave_no_trace(name):
    model, batch = lora_model("llama", lora_dropout=0.5).train(), pair_batch("stacked")
    before = snapshot(model)
    choose = excess_loss_weights if name == "excess" else log_ratio_weights
    first = choose(model, None, batch)
    assert torch.equal(first, choose(model, None, batch))  # without dropout
    assert not differences(before, snapshot(model))
    with pytest.raises(IndexError):
        choose(model, None, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert not differences(before, snapshot(model))


def test_a_4_bit_model_can_still_be_trained():
    """On a CPU, bitsandbytes would repack weights of linears that run in evaluation mode, and end the backward."""
    model, batch = nf4_lora_model("llama", seed=3), sft_batch("right", seed=3)
    for mode in (True, False):
        model.train(mode)
        weights = excess_loss_weights(model, None, batch, rho=0.4)
        assert model.training == mode
        assert torch.equal(weights, kept(explicit(model.train(), batch, False).float(), batch, 0.4, "batch"))
        sft_loss(model, batch, weights).backward()


# ------------------------------------------------------------------------------------ the gate


@pytest.mark.parametrize("estimator", ["ghost", "difference"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_the_gate_masks_by_given_weights(kind, estimator):
    model, batch = lora_model("llama", seed=2).train(), sft_batch(kind, seed=2)
    weights = random_weights(batch, generator=torch.Generator().manual_seed(1))
    gate = AlphaToken(model, config=AlphaTokenConfig(estimator=estimator, num_layers=2))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with gate(batch, weights=weights):
        logits = model(**inputs, use_cache=False).logits
    sft = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    found = reference.gradients(model, sft)
    expected = reference.gradients(
        model, sft_loss(model, batch, weights, num_items_in_batch=int(response(batch).sum()))
    )
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-9), name
    metrics = gate.metrics()
    assert gate.fisher is None and gate.target is None and gate.values is None
    assert torch.equal(gate.weights, weights) and set(metrics) == {"kept", "seconds"}
    assert metrics["kept"] == pytest.approx(float(weights.sum() / response(batch).sum()))
    with pytest.raises(ValueError, match="they must agree"), gate(batch, weights=weights[:, 1:]):
        pass
    off = AlphaToken(model, config=AlphaTokenConfig(rho=1.0))
    with pytest.raises(ValueError, match="switches the gate off"), off(batch, weights=weights):
        pass


# ------------------------------------------------------------------------------------ trainers


def trainer_of(kind, selection, folder, *, trainer_class=None, **changes):
    data = sft_data() if kind == "sft" else dpo_data()
    model = tuning.with_adapter() if selection in ("excess_loss", "log_ratio") and kind == "sft" else base()
    args = arguments(kind, folder, **{"selection": selection, **changes})
    peft = None if hasattr(model, "peft_config") else lora()
    cls = trainer_class or tuning.TRAINERS[kind][0]
    return cls(model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft)


def keeping(trainer_class):
    """The trainer, which also keeps each step's mask and what the selection gives for its batch."""

    class Keeping(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            batch = {k: v for k, v in inputs.items() if k != "use_cache"}
            name = self.args.selection
            by = {"excess_loss": excess_loss_weights, "log_ratio": log_ratio_weights}.get(name)
            if by is not None:
                expected = by(self.model, None, batch, rho=self.args.rho)
                self.expected = [*getattr(self, "expected", []), expected]
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.masks = [*getattr(self, "masks", []), self.alphatoken.weights]
            return loss

    return Keeping


@pytest.mark.parametrize(
    ("kind", "selection"),
    [("sft", "random"), ("sft", "excess_loss"), ("dpo", "random"), ("dpo", "excess_loss"), ("dpo", "log_ratio")],
)
@pytest.mark.filterwarnings("ignore")
def test_trainers_take_the_masked_steps(kind, selection, tmp_path, monkeypatch):
    """Those of the stock trainer with the mask written into its log-probabilities; nothing is held out or estimated."""
    for name in ("_target_batches", "_estimate_fisher", "_held_out_rows"):
        monkeypatch.setattr(AlphaTokenMixin, name, lambda *args: pytest.fail("estimated or held out"))
    ours, stock = tuning.TRAINERS[kind]
    trainer = trainer_of(kind, selection, tmp_path, trainer_class=keeping(ours), gradient_accumulation_steps=2)
    before = dict(trained(trainer.model))
    trainer.train()
    assert len(trainer.train_dataset) == 12 and len(trainer.masks) == 6
    if selection != "random":
        assert all(torch.equal(a, b) for a, b in zip(trainer.masks, trainer.expected, strict=True))
    figures = [log for log in trainer.state.log_history if "alphatoken/kept" in log]
    assert len(figures) == 3 and "alphatoken/target_age" not in figures[0]
    assert 0.4 < figures[-1]["alphatoken/kept"] < 0.75
    other = trainer_of(
        kind, selection, tmp_path, trainer_class=masked(stock, trainer.masks), gradient_accumulation_steps=2
    )
    other.train()
    after, expected = dict(trained(trainer.model)), dict(trained(other.model))
    moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
    assert moved > 0
    for key in expected:
        assert float((after[key] - expected[key]).abs().max()) < 1e-4 * moved, key


@pytest.mark.filterwarnings("ignore")
def test_random_masks_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    cls = keeping(tuning.TRAINERS["sft"][0])
    whole = trainer_of("sft", "random", tmp_path, trainer_class=cls, **options)
    whole.train()
    assert not torch.equal(whole.masks[0], whole.masks[1])
    rest = trainer_of("sft", "random", tmp_path, trainer_class=cls, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.masks[4:], rest.masks, strict=True)) and len(rest.masks) == 4
    assert not list(tmp_path.rglob("*alphatoken.safetensors")) and not (tmp_path / "fisher.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_a_selection_refuses(tmp_path):
    with pytest.raises(ValueError, match="selection is 'best'"):
        arguments("sft", tmp_path, selection="best")
    with pytest.raises(ValueError, match="has none"):
        trainer_of("sft", "log_ratio", tmp_path)
    cls, _ = tuning.TRAINERS["sft"]
    model = tuning.partly_trained()
    with pytest.raises(ValueError, match="Pass ref_model"):
        cls(model, args=arguments("sft", tmp_path, selection="excess_loss"), train_dataset=sft_data(),
            processing_class=tokenizer())  # fmt: skip
