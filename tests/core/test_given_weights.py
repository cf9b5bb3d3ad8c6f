"""Real weights through the gate: the gradient of the explicitly weighted loss, whatever is trained."""

from __future__ import annotations

import pytest
import reference
import torch
from batches import pair_batch, response, sft_batch
from checks import TOL64, TOL_NF4, assert_close, assert_same_grads, grads_of
from gates import CHECKPOINTING, checkpointed, steady
from models import FAMILIES, base_model, lora_model, nf4_lora_model
from peft import IA3Config, PrefixTuningConfig, get_peft_model
from state import differences, snapshot

from alphatoken_loss import AlphaToken, AlphaTokenConfig, dpo_loss, sft_loss

SFT = ("none", "right", "left", "ragged", "full", "packed")
PAIRS = ("stacked", "stacked_left", "stacked_ref", "separate", "separate_mask")


def some_weights(batch, seed=0, *, negative=False):
    """Of every size, some of them 0, and not 0 where there is no label."""
    generator = torch.Generator().manual_seed(700 + seed)
    shape = response(batch).shape
    weights = 3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    weights[torch.rand(shape, generator=generator) < 0.3] = 0
    return -weights + 0.5 if negative else weights


def given(model, **options):
    return AlphaToken(model, selection="given", **options)


def weighted_sft(model, batch, weights, items=None):
    """Value of the plain mean, and gradients of sum(w * l) / N, each token's loss multiplied by its weight."""
    counted = weights.double() * response(batch)
    return reference.masked_sft(model, batch, counted, items or float(response(batch).sum()))


@pytest.mark.parametrize("kind", SFT)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_models_own_loss(family, kind):
    with steady(family):
        model, batch = lora_model(family), sft_batch(kind)
        weights = some_weights(batch)
        value, grads = weighted_sft(model, batch, weights)
        with given(model)(batch, weights=weights):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("closed_first", [False, True], ids=["inside", "after"])
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_under_checkpointing(how, closed_first):
    model, batch = lora_model("llama"), sft_batch("right")
    weights = some_weights(batch)
    _, grads = weighted_sft(model, batch, weights)
    checkpointed(model, how)
    with given(model)(batch, weights=weights):
        loss = model(**batch).loss
        if not closed_first:
            loss.backward()
    if closed_first:
        loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("estimator", ["ghost", "difference", "exact"])
def test_a_gate_that_values_takes_weights_too(estimator, seed):
    model, batch = lora_model("llama", seed=seed), sft_batch("left", seed=seed)
    weights = some_weights(batch, seed)
    value, grads = weighted_sft(model, batch, weights)
    gate = AlphaToken(model, config=AlphaTokenConfig(estimator=estimator, num_layers=2))
    with gate(batch, weights=weights):
        loss = model(**batch).loss
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)
    assert gate.fisher is None and gate.target is None and gate.values is None


def test_wrong_ways_to_weigh_would_be_seen():
    model, batch = lora_model("llama"), sft_batch("right")
    weights = some_weights(batch)
    with given(model)(batch, weights=weights):
        model(**batch).loss.backward()
    wrong = {
        "a mask": (weights != 0).double(),
        "shifted": weights.roll(1, 1),
        "its square": weights**2,
        "divided by its sum": weights * response(batch).sum() / (weights * response(batch)).sum(),
    }
    for name, weight in wrong.items():
        _, grads = weighted_sft(model, batch, weight)
        with pytest.raises(AssertionError):
            assert_same_grads(grads_of(model), grads, 1e-3)
            pytest.fail(name)


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "exo_pair"])
def test_every_preference_loss(kind, form):
    """`dpo_loss` in a context, and with the weights handed to it: the same value and gradient."""
    batch = pair_batch(form)
    eps = 0.2 if kind in ("robust", "exo_pair") else 0.0
    weights = some_weights(batch)
    for how in ("gate", "tensor"):
        model = lora_model("llama")
        value, grads = reference.masked_dpo(
            model, batch, weights * response(batch), beta=0.3, kind=kind, eps=eps
        )  # a weight w: w * logp + (1 - w) * logp held constant
        options = {"beta": 0.3, "loss_type": kind, "label_smoothing": eps}
        if how == "tensor":
            loss = dpo_loss(model, None, batch, weights, **options)
        else:
            with given(model)(batch, weights=weights):
                loss = dpo_loss(model, None, batch, **options)
        loss.backward()
        assert_close(loss.detach(), value, TOL64)
        assert_same_grads(grads_of(model), grads, TOL64)


def test_nf4():
    model, batch = nf4_lora_model("llama"), sft_batch("right")
    weights = some_weights(batch)
    value, grads = weighted_sft(model, batch, weights)
    with given(model)(batch, weights=weights):
        loss = model(**batch).loss
        loss.backward()
    assert_close(loss.detach(), value, TOL_NF4)
    assert_same_grads(grads_of(model), grads, TOL_NF4)


ADAPTERS = {
    "ia3": lambda: get_peft_model(
        base_model("llama"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ),
    "dora": lambda: lora_model("llama", use_dora=True),
    "embeddings": lambda: lora_model("llama", targets=["embed_tokens", "q_proj"]),
    "two blocks of three trained": lambda: partly("layers.0", "layers.1"),
    "the last norm and the embeddings": lambda: partly("model.norm", "embed_tokens"),
}


def partly(*parts):
    model = base_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts) and "lm_head" not in name)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_whatever_is_trained_before_the_head(name):
    model, batch = ADAPTERS[name](), sft_batch("left")
    weights = some_weights(batch)
    value, grads = weighted_sft(model, batch, weights)
    with given(model)(batch, weights=weights):
        loss = model(**batch).loss
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_virtual_tokens():
    model = get_peft_model(base_model("llama"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    batch = sft_batch("right")
    weights = some_weights(batch)
    value, grads = weighted_sft(model, batch, weights)
    with given(model)(batch, weights=weights):
        loss = model(**batch).loss
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_a_trained_head_is_refused_by_name():
    model = base_model("llama")
    with pytest.raises(ValueError, match=r"lm_head.*trained.*decoder.*Freeze"):
        given(model)


def test_micro_batches_add_up():
    """Each divided by the response tokens of all of them, as a loss divides: not by the sum of weights."""
    whole, parts = lora_model("llama"), lora_model("llama")
    batch = sft_batch("right")
    weights = some_weights(batch)
    tokens = int(response(batch).sum())
    _, grads = weighted_sft(whole, batch, weights, items=float(tokens))
    gate = given(parts)
    for row in range(3):
        piece = {key: value[row : row + 1] for key, value in batch.items()}
        with gate(piece, weights=weights[row : row + 1]):
            parts(**piece, num_items_in_batch=tokens).loss.backward()
    assert_same_grads(grads_of(parts), grads, TOL64)


def test_sft_loss_divides_by_the_sum_of_weights():
    """With an AlphaToken in the place of weights: Eq. 13's gradient, as with the tensor, and the plain loss's value."""
    batch = sft_batch("right")
    weights = some_weights(batch)
    tensor, column = lora_model("llama"), lora_model("llama")
    sft_loss(tensor, batch, weights).backward()
    gate = AlphaToken(column, token_weights="my_weights")
    loss = sft_loss(column, {**batch, "my_weights": weights}, gate)
    loss.backward()
    assert_close(loss.detach(), sft_loss(column, batch).detach(), TOL64)
    assert_same_grads(grads_of(column), grads_of(tensor), TOL64)


@pytest.mark.parametrize("form", ["stacked", "separate"])
def test_a_column_of_pairs(form):
    batch = pair_batch(form)
    weights = some_weights(batch)
    tensor, column = lora_model("llama"), lora_model("llama")
    dpo_loss(tensor, None, batch, weights).backward()
    columns = {"token_weights": weights}
    if form == "separate":
        halves = dict(zip(("chosen", "rejected"), weights.chunk(2), strict=True))
        columns = {
            f"{name}_token_weights": half[:, : batch[f"{name}_input_ids"].shape[1]] for name, half in halves.items()
        }
    gate = AlphaToken(column, token_weights="token_weights")
    dpo_loss(column, None, {**batch, **columns}, gate).backward()
    assert_same_grads(grads_of(column), grads_of(tensor), TOL64)


@pytest.mark.parametrize("use", ["gate", "sft_loss"])
def test_negative_weights_where_they_are_meant(use):
    model, batch = lora_model("llama"), sft_batch("right")
    weights = some_weights(batch, negative=True)
    if use == "sft_loss":
        with pytest.raises(ValueError, match=r"below 0.*negative_weights=True"):
            sft_loss(model, batch, weights)
        loss = sft_loss(model, batch, weights, num_items_in_batch=7, negative_weights=True)
        _, grads = weighted_sft(model, batch, weights, items=7.0)
    else:
        with pytest.raises(ValueError, match=r"below 0.*negative_weights=True"), given(model)(batch, weights=weights):
            pass
        _, grads = weighted_sft(model, batch, weights)
        with given(model, negative_weights=True)(batch, weights=weights):
            loss = model(**batch).loss
    loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_negative_weights_of_pairs():
    model, batch = lora_model("llama"), pair_batch()
    weights = some_weights(batch, negative=True)
    with pytest.raises(ValueError, match="negative_weights=True"):
        dpo_loss(model, None, batch, weights)
    value, grads = reference.masked_dpo(model, batch, weights * response(batch))
    loss = dpo_loss(model, None, batch, weights, negative_weights=True)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


WRONG = {
    "shape": (lambda w: w[:, 1:], ValueError, "they must agree"),
    "flat": (lambda w: w.flatten(), ValueError, "they must agree"),
    "nan": (lambda w: w.index_fill(1, torch.tensor([5]), torch.nan), ValueError, "not all finite"),
    "inf": (lambda w: w.index_fill(1, torch.tensor([5]), torch.inf), ValueError, "not all finite"),
    "complex": (lambda w: w.to(torch.complex64), ValueError, "complex"),
    "list": (lambda w: w.tolist(), TypeError, "is a list; it must be a tensor"),
}


WHERE = ("context", "column", "function", "sft_loss", "dpo_loss")
# A loss says of what is no tensor that it is no AlphaToken either.
BAD = [(what, where) for what in WRONG for where in WHERE if what != "list" or where[-4:] != "loss"]


@pytest.mark.parametrize(("what", "where"), BAD)
def test_bad_weights(what, where):
    """A clear error, and nothing left behind."""
    change, error, message = WRONG[what]
    model = lora_model("llama")
    batch = pair_batch() if where == "dpo_loss" else sft_batch("right")
    wrong = change(some_weights(batch))
    if where == "context":
        gate = given(model)
    elif where == "column":
        gate = AlphaToken(model, token_weights="mine")
    elif where == "function":
        gate = AlphaToken(model, token_weights=lambda forward: wrong)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        if where == "sft_loss":
            sft_loss(model, batch, wrong)
        elif where == "dpo_loss":
            dpo_loss(model, None, batch, wrong)
        else:
            options = {"weights": wrong} if where == "context" else {}
            with gate({**batch, "mine": wrong} if where == "column" else batch, **options):
                model(**batch).loss.backward()
    assert not differences(before, snapshot(model))


def test_weights_that_are_all_zero_train_nothing():
    model, batch = lora_model("llama"), sft_batch("right")
    nothing = torch.zeros(batch["labels"].shape)
    with pytest.raises(ValueError, match=r"0 for every label.*Leave this batch out"):
        with given(model)(batch, weights=nothing + 2 * ~response(batch)):
            pass
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with given(model)(empty, weights=nothing):  # there is nothing to weigh
        sft_loss(model, empty).backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


def test_what_does_not_go_together():
    model, batch = lora_model("llama"), sft_batch("right")
    with pytest.raises(ValueError, match=r"No weights were given.*weights="), given(model)(batch):
        pass
    with (
        pytest.raises(ValueError, match=r"no column 'mine'.*chosen_mine"),
        AlphaToken(model, token_weights="mine")(batch),
    ):
        pass
    with pytest.raises(ValueError, match=r"Both selection='random' and token_weights"):
        AlphaToken(model, selection="random", token_weights="mine")
    with pytest.raises(ValueError, match="switches the gate off"):
        AlphaToken(model, token_weights="mine", config=AlphaTokenConfig(rho=1.0))
    with pytest.raises(TypeError, match=r"token_weights is a Tensor.*weights=\.\.\."):
        AlphaToken(model, token_weights=torch.ones(2))
    with pytest.raises(ValueError, match="selection is 'best'"):
        AlphaToken(model, selection="best")
    with pytest.raises(ValueError, match=r"'random' has no option 'share'; it has none"):
        AlphaToken(model, selection="random", selection_options={"share": 1})
    with pytest.raises(ValueError, match=r"'stm' has no option 'threshold'; its options are perplexity, of"):
        AlphaToken(model, selection="stm", selection_options={"threshold": 1})


def test_figures_have_the_mean_weight():
    model, batch = lora_model("llama"), sft_batch("right")
    weights, gate = some_weights(batch), given(model)
    with gate(batch, weights=weights):
        model(**batch).loss.backward()
    figures, inside = gate.metrics(), response(batch)
    assert set(figures) == {"kept", "weight", "seconds"}
    assert figures["weight"] == pytest.approx(float(weights[inside].mean()), rel=1e-5)
    assert figures["kept"] == pytest.approx(float((weights[inside] != 0).double().mean()))
    assert torch.equal(gate.weights, (weights * inside).float())
    with gate(batch, weights=(weights > 1).float()):
        model(**batch).loss.backward()
    assert set(gate.metrics()) == {"kept", "seconds"}


@pytest.mark.parametrize("family", FAMILIES)
def test_leaves_nothing_behind(family):
    with steady(family):
        model, batch = lora_model(family), sft_batch("right")
        gate, before = given(model), snapshot(model)
        with gate(batch, weights=some_weights(batch)):
            loss = model(**batch).loss
        assert not differences(before, snapshot(model))
        loss.backward()
        assert not differences(before, snapshot(model), ignore=(": grad",))
