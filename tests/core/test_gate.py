"""The gate: the gradient of every adapter parameter is that of the written-out masked loss."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time

import cases
import pytest
import reference
import torch
import torch.nn.functional as F
from batches import pair_batch, response, sft_batch, stacked
from cases import expected_values
from checks import TOL64, TOL_NF4, assert_close, assert_same_grads, grads_of
from gates import CHECKPOINTING, checkpointed, gate_for, steady
from models import FAMILIES, add_lora, base_model, lora_model, nf4_base, nf4_lora_model
from peft import prepare_model_for_kbit_training

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, dpo_loss, random_weights, sft_loss

ALL = tuple(FAMILIES)


def expected_mask(model, family, batch, rho=0.5, **options):
    values = expected_values(model, family, batch, **options)
    return reference.keep(values.total, batch, rho)


def stacked_dpo(model, batch, beta=0.1, kind="sigmoid"):
    """A user's own DPO loss on logits, outside the library."""
    rows = stacked(batch)
    nll = reference.token_nll(model, rows)
    ref = reference.reference_logps(model, batch)
    lengths = batch["completion_mask"].sum(1)
    return reference.pair_losses(nll, ref, lengths, kind, beta, 0.0).mean()


# ---------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("family", ALL)
def test_context_with_the_models_own_loss(family, kind):
    """`model(**batch).loss`: gradient of sum(m * l) / N over all response tokens; value unmasked."""
    with steady(family):
        model = lora_model(family)
        batch = sft_batch(kind)
        mask = expected_mask(model, family, batch)
        value, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        gate = gate_for(model, family)
        inputs = {**batch, "use_cache": False} if kind == "packed" else batch
        with gate(batch):
            loss = model(**inputs).loss
            loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("closed_first", [False, True], ids=["inside", "after"])
@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_context_under_checkpointing(family, how, closed_first):
    model = lora_model(family)
    batch = sft_batch("right")
    mask = expected_mask(model, family, batch)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    checkpointed(model, how)
    gate = gate_for(model, family)
    with gate(batch):
        loss = model(**batch).loss
        if not closed_first:
            loss.backward()
    if closed_first:
        loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_context_in_either_mode(mode):
    model = getattr(lora_model("llama"), mode)()
    batch = sft_batch("left")
    mask = expected_mask(model, "llama", batch)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    with gate_for(model)(batch):
        model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("seed", range(20, 24))
@pytest.mark.parametrize("rho", [0.1, 0.3, 0.8])
def test_shares_and_seeds(seed, rho):
    model = lora_model("llama", seed=seed)
    batch = sft_batch("right", seed=seed)
    mask = expected_mask(model, "llama", batch, rho)
    assert 0 < int(mask.sum()) < int(response(batch).sum())
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    with gate_for(model, rho=rho)(batch):
        model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_any_loss_on_the_logits():
    """Weighted tokens, label smoothing and a squared penalty of the loss itself, all by the user."""
    model = lora_model("llama")
    batch = sft_batch("right")
    rows, columns = response(batch).nonzero(as_tuple=True)
    weight = torch.linspace(0.5, 2.0, len(rows), dtype=torch.float64)

    def user_loss(logits, hold=None):
        tokens = F.cross_entropy(
            logits[rows, columns - 1], batch["labels"][rows, columns], reduction="none", label_smoothing=0.1
        )
        tokens = tokens if hold is None else hold * tokens + (1 - hold) * tokens.detach()
        return (weight * tokens).sum() ** 2 / 50

    # the values of the user's loss: rows as they arrive at the gate
    family = FAMILIES["llama"]
    layers = reference.scored_layers(model, family, 2)
    work = reference.frozen_copy(model)
    loss_of = lambda: user_loss(reference.logits_of(work, batch))  # noqa: E731
    taps = reference.collect(work, [layer.name for layer in layers], loss_of)
    values = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    target = reference.target_gradient(model, cases.validation(), cases.factor_names(model, "llama", 2))
    drift = reference.drift_gradient(model, layers, cases.fisher_tensors(model, "llama", 2))
    for layer in layers:
        h, d = taps[layer.name]
        a, b = reference.weights_of(model, layer)
        for name, x, err in (
            (layer.a, h, layer.scale * d @ b),
            (layer.b, h @ a.T, layer.scale * d),
        ):
            direction = target[name].double() + 1.5 * drift[name]
            values[rows, columns] += torch.einsum(
                "no,oi,ni->n", err[rows, columns - 1], direction, x[rows, columns - 1]
            )
    mask = reference.keep(values, batch, 0.5)
    work = reference.frozen_copy(model)
    hold = mask[rows, columns].double()
    expected = reference.gradients(work, user_loss(reference.logits_of(work, batch), hold))

    config = AlphaTokenConfig(num_layers=2, causal_window=0)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2))
    gate = AlphaToken(model, target=cases.validation(), fisher=fisher, config=config)
    with gate(batch):
        user_loss(model(**batch).logits).backward()
    assert_same_grads(grads_of(model), expected, TOL64)


@pytest.mark.parametrize("returned", ["dict", "tuple"])
@pytest.mark.parametrize("estimator", ["ghost", "exact", "difference", "path", "given"])
def test_a_loss_on_the_listed_hidden_states(estimator, returned):
    """A head that the user runs on the last of `hidden_states` is masked as one on `last_hidden_state` is."""
    model, batch = lora_model("llama"), sft_batch("right")
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    options = {"path_steps": 2, "path_kl": 0.5} if estimator == "path" else {}
    kind = "difference" if estimator == "given" else estimator
    config = AlphaTokenConfig(estimator=kind, stability_weight=0, **options)
    given = (torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    found = []
    for listed in (False, True):
        gate = AlphaToken(model, target=cases.validation(), config=config)
        with gate(batch, weights=given if estimator == "given" else None) as step:
            whole = model(**inputs, use_cache=False, output_hidden_states=True, return_dict=returned == "dict")
            logits, hidden = (whole.logits, whole.hidden_states) if returned == "dict" else (whole[0], whole[-1])
            logits = model.get_base_model().lm_head(hidden[-1]) if listed else logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            (loss if step.kl is None else loss + step.kl).backward()
        assert 0 < gate.metrics()["kept"] < 1
        found.append(grads_of(model))
        model.zero_grad()
    assert_same_grads(found[1], found[0], TOL64)
    F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    assert error_of(found[1], grads_of(model)) > 1e-2, "nothing was masked"


def error_of(found, wanted):
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def test_gradients_accumulate():
    """Two contexts without an optimizer step in between: `.grad` adds up."""
    model = lora_model("llama")
    total = None
    gate = gate_for(model)
    for seed in (0, 1):
        batch = sft_batch("right", seed=seed)
        mask = expected_mask(model, "llama", batch)
        _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        total = grads if total is None else {name: total[name] + grads[name] for name in grads}
        with gate(batch):
            model(**batch).loss.backward()
    assert_same_grads(grads_of(model), total, TOL64)


def test_scaling_the_loss_keeps_the_mask():
    model = lora_model("llama")
    batch = sft_batch("right")
    mask = expected_mask(model, "llama", batch)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()) / 1024.0)
    with gate_for(model)(batch):
        (1024.0 * model(**batch).loss).backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_one_sequence_with_a_target():
    model = lora_model("llama")
    batch = {key: value[:1] for key, value in sft_batch("none").items()}
    mask = expected_mask(model, "llama", batch)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    with gate_for(model)(batch):
        model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_other_forwards_without_grad_pass_through():
    """An evaluation inside the context is not the training forward."""
    model = lora_model("llama")
    batch = sft_batch("right")
    mask = expected_mask(model, "llama", batch)
    _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
    with gate_for(model)(batch):
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.long))
        loss = model(**batch).loss
        with torch.no_grad():
            model(input_ids=torch.ones(2, 5, dtype=torch.long))
        loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["right", "left", "packed", "ragged"])
def test_sft_loss_with_the_gate(kind, how):
    """Eq. 13: gradient of the mean over the kept tokens, value of the mean over all."""
    model = lora_model("llama")
    batch = sft_batch(kind)
    mask = expected_mask(model, "llama", batch)
    value, grads = reference.masked_sft(model, batch, mask, float(mask.sum()))
    checkpointed(model, how)
    loss = sft_loss(model, batch, gate_for(model))
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("family", ALL)
def test_sft_loss_with_the_gate_in_every_family(family):
    with steady(family):
        model = lora_model(family, seed=7)
        batch = sft_batch("right", seed=7)
        mask = expected_mask(model, family, batch)
        value, grads = reference.masked_sft(model, batch, mask, float(mask.sum()))
        loss = sft_loss(model, batch, gate_for(model, family))
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["stacked", "stacked_left", "stacked_ref", "separate", "separate_mask"])
def test_dpo_loss_with_the_gate(kind, how):
    """Eq. 14: the value of the full loss, the gradient of the kept tokens."""
    model = lora_model("llama")
    batch = pair_batch(kind)
    mask = expected_mask(model, "llama", batch)
    value, grads = reference.masked_dpo(model, batch, mask)
    assert_same_grads(reference.eq14(model, batch, mask), grads, TOL64)
    checkpointed(model, how)
    loss = dpo_loss(model, None, batch, gate_for(model))
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("family", ALL)
def test_dpo_loss_with_the_gate_in_every_family(family):
    with steady(family):
        model = lora_model(family, seed=8)
        batch = pair_batch("stacked", seed=8)
        mask = expected_mask(model, family, batch)
        value, grads = reference.masked_dpo(model, batch, mask)
        loss = dpo_loss(model, None, batch, gate_for(model, family))
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_context_with_a_preference_loss(how):
    """Pairs in the context: each branch has its own threshold."""
    model = lora_model("llama")
    batch = pair_batch()
    mask = expected_mask(model, "llama", batch)
    value, grads = reference.masked_dpo(model, batch, mask)
    checkpointed(model, how)
    with gate_for(model)(batch):
        loss = stacked_dpo(model, batch)
        loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("kind", ["hinge", "ipo", "robust", "exo_pair"])
def test_other_preference_losses_mask_the_same_way(kind):
    """Values come from the loss in use: its own errors, its own mask."""
    model = lora_model("llama")
    batch = pair_batch("stacked", seed=2)
    eps = 0.1 if kind in ("robust", "exo_pair") else 0.0
    family = FAMILIES["llama"]
    layers = reference.scored_layers(model, family, 2)
    ref = reference.reference_logps(model, batch)
    lengths = batch["completion_mask"].sum(1)
    rows, columns = response(batch).nonzero(as_tuple=True)
    work = reference.frozen_copy(model)

    def loss_of():
        nll = reference.token_nll(work, stacked(batch))
        return reference.pair_losses(nll, ref, lengths, kind, 0.1, eps).sum()

    taps = reference.collect(work, [layer.name for layer in layers], loss_of)
    target = reference.target_gradient(model, cases.validation(), cases.factor_names(model, "llama", 2))
    drift = reference.drift_gradient(model, layers, cases.fisher_tensors(model, "llama", 2))
    values = torch.zeros(response(batch).shape, dtype=torch.float64)
    for layer in layers:
        h, d = taps[layer.name]
        a, b = reference.weights_of(model, layer)
        for name, x, err in ((layer.a, h, layer.scale * d @ b), (layer.b, h @ a.T, layer.scale * d)):
            direction = target[name].double() + 1.5 * drift[name]
            values[rows, columns] += torch.einsum(
                "no,oi,ni->n", err[rows, columns - 1], direction, x[rows, columns - 1]
            )
    mask = reference.keep(values, batch, 0.5)
    value, grads = reference.masked_dpo(model, batch, mask, kind=kind, eps=eps)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2))
    config = AlphaTokenConfig(num_layers=2, causal_window=0)
    gate = AlphaToken(model, target=cases.validation(), fisher=fisher, config=config)
    loss = dpo_loss(model, None, batch, gate, loss_type=kind, label_smoothing=eps)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_dpo_against_an_adapter_called_ref():
    model = lora_model("llama", others=["ref"])
    batch = pair_batch()
    mask = expected_mask(model, "llama", batch)
    value, grads = reference.masked_dpo(model, batch, mask)
    loss = dpo_loss(model, None, batch, gate_for(model))
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_dpo_against_a_separate_model():
    base = base_model("llama", seed=3)
    ref_model = copy.deepcopy(base)
    with torch.no_grad():
        ref_model.lm_head.weight.mul_(1.3)
    model = add_lora(base, "llama", seed=3)
    batch = pair_batch()
    mask = expected_mask(model, "llama", batch, ref_model=ref_model)
    value, grads = reference.masked_dpo(model, batch, mask, ref_model=ref_model)
    config = AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2))
    gate = AlphaToken(model, ref_model, target=cases.validation(), fisher=fisher, config=config)
    loss = dpo_loss(model, ref_model, batch, gate)
    loss.backward()
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("k", [1, "all"])
@pytest.mark.parametrize("window", [0, 32])
def test_blocks_and_windows(k, window):
    model = lora_model("llama")
    batch = sft_batch("right")
    mask = expected_mask(model, "llama", batch, k=k, window=window)
    _, grads = reference.masked_sft(model, batch, mask, float(mask.sum()))
    config = AlphaTokenConfig(num_layers=k, causal_window=window)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", k))
    sft_loss(model, batch, AlphaToken(model, target=cases.validation(), fisher=fisher, config=config)).backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("kind", ["right", "packed", "stacked"])
def test_thresholds_by_sequence(kind):
    model = lora_model("llama")
    batch = pair_batch() if kind == "stacked" else sft_batch(kind)
    mask = reference.keep(expected_values(model, "llama", batch).total, batch, 0.5, "sequence")
    assert not torch.equal(mask, expected_mask(model, "llama", batch))
    gate = gate_for(model, threshold_scope="sequence")
    if kind == "stacked":
        _, grads = reference.masked_dpo(model, batch, mask)
        dpo_loss(model, None, batch, gate).backward()
    else:
        _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        with gate(batch):
            model(**batch, use_cache=False).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("kind", ["right", "packed", "stacked"])
def test_without_a_target(kind):
    """Each sequence against the rest of its batch, in the backward as well."""
    model = lora_model("llama")
    batch = pair_batch() if kind == "stacked" else sft_batch(kind)
    names = cases.factor_names(model, "llama", 2)
    target = reference.left_out_targets(model, batch, names)
    mask = expected_mask(model, "llama", batch, target=target)
    config = AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW)
    gate = AlphaToken(model, fisher=Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2)), config=config)
    if kind == "stacked":
        _, grads = reference.masked_dpo(model, batch, mask)
        dpo_loss(model, None, batch, gate).backward()
    else:
        _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        with gate(batch):
            model(**batch, use_cache=False).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_with_nothing_given():
    """Target and Fisher from the batch itself: still a mask, still its exact gradient."""
    model = lora_model("llama")
    batch = sft_batch("right")
    gate = AlphaToken(model)
    with gate(batch):
        model(**batch).loss.backward()
    mask = gate.weights
    kept, number = float(mask.sum()), float(response(batch).sum())
    assert number / 2 <= kept <= number / 2 + 1
    assert float(mask[~response(batch)].abs().sum()) == 0
    _, grads = reference.masked_sft(model, batch, mask, number)
    assert_same_grads(grads_of(model), grads, TOL64)


# ---------------------------------------------------------------------------------------------- 4-bit


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("loss_kind", ["context", "sft_loss", "dpo_loss"])
def test_nf4(loss_kind, how):
    model = nf4_lora_model("llama")
    batch = pair_batch() if loss_kind == "dpo_loss" else sft_batch("left")
    mask = expected_mask(model, "llama", batch)
    if loss_kind == "dpo_loss":
        _, grads = reference.masked_dpo(model, batch, mask)
    else:
        number = response(batch).sum() if loss_kind == "context" else mask.sum()
        _, grads = reference.masked_sft(model, batch, mask, float(number))
    checkpointed(model, how)
    gate = gate_for(model)
    if loss_kind == "dpo_loss":
        dpo_loss(model, None, batch, gate).backward()
    elif loss_kind == "sft_loss":
        sft_loss(model, batch, gate).backward()
    else:
        with gate(batch):
            model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL_NF4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nf4_prepared_for_kbit_training(reentrant):
    base = nf4_base("llama")
    prepared = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model = add_lora(prepared, "llama")
    batch = sft_batch("right")
    mask = expected_mask(model, "llama", batch)
    _, grads = reference.masked_sft(model, batch, mask, float(mask.sum()))
    assert model.is_gradient_checkpointing
    sft_loss(model, batch, gate_for(model)).backward()
    assert_same_grads(grads_of(model), grads, TOL_NF4)


# ---------------------------------------------------------------------------------------------- rho = 1


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_rho_one_is_the_plain_step(how):
    """Loss and every gradient, bit for bit."""
    batch = sft_batch("right")
    plain, gated = (checkpointed(lora_model("llama"), how) for _ in range(2))
    first = plain(**batch).loss
    first.backward()
    with gate_for(gated, rho=1.0)(batch):
        second = gated(**batch).loss
        second.backward()
    assert torch.equal(first, second)
    for name, grad in grads_of(plain).items():
        assert torch.equal(grad, grads_of(gated)[name]), name


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_rho_one_is_the_plain_loss(loss):
    plain, gated = (lora_model("llama") for _ in range(2))
    gate = gate_for(gated, rho=1.0)
    if loss == "sft":
        batch = sft_batch("right")
        results = [sft_loss(plain, batch), sft_loss(gated, batch, gate)]
    else:
        batch = pair_batch()
        results = [dpo_loss(plain, None, batch), dpo_loss(gated, None, batch, gate)]
    for result in results:
        result.backward()
    assert torch.equal(results[0], results[1])
    for name, grad in grads_of(plain).items():
        assert torch.equal(grad, grads_of(gated)[name]), name


# ---------------------------------------------------------------------------- target refreshes, metrics


def step_by_hand(model, seed):
    """Move the adapter a good way, the way an optimizer does: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise)


@pytest.mark.parametrize("every", [1, 2])
def test_target_is_refreshed_every_so_many_steps(every):
    """After one optimizer step: fresh for target_every=1, the old one for 2; after two fresh for both."""
    model = lora_model("llama")
    names = cases.factor_names(model, "llama", 2)
    gate = gate_for(model, target_every=every, target_decay=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    kept, differs = None, False
    for step in range(4):
        batch = sft_batch("none", seed=step)
        if step % every == 0:
            kept = reference.target_gradient(model, cases.validation(), names)
        mask = expected_mask(model, "llama", batch, target=kept)
        fresh = expected_mask(model, "llama", batch)
        differs |= not torch.equal(mask, fresh)
        _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        model.zero_grad()
        with gate(batch):
            model(**batch).loss.backward()
        assert_same_grads(grads_of(model), grads, TOL64)
        optimizer.step()
        step_by_hand(model, step)
    assert differs == (every == 2), "the test has no power: choose other seeds"


@pytest.mark.parametrize("every", [1, 2])
def test_target_as_a_running_average(every):
    """Of sums over validation tokens, one batch in turn, over one of their numbers; the first takes all batches."""
    model, decay = lora_model("llama"), 0.7
    names = cases.factor_names(model, "llama", 2)
    gate = gate_for(model, target_every=every, target_decay=decay, target_parts=2)
    counts = [int(response(batch).sum()) for batch in cases.validation()]
    assert counts[0] != counts[1]
    sums, count, turn = {}, 0.0, 0
    for step in range(6):
        if not step:
            count = sum(counts) / 2
            mean = reference.target_gradient(model, cases.validation(), names)
            sums = {name: gradient * count for name, gradient in mean.items()}
        elif step % every == 0:
            mean = reference.target_gradient(model, [cases.validation()[turn % 2]], names)
            added = counts[turn % 2]
            sums = {name: decay * sums[name] + (1 - decay) * added * mean[name] for name in names}
            count = decay * count + (1 - decay) * added
            turn += 1
        with gate(sft_batch("right")):
            model(**sft_batch("right")).loss.backward()
        for name in names:
            assert_close(gate.target.gradients[name], sums[name] / count, TOL64, name)
        step_by_hand(model, step)
    assert turn >= 2


def test_no_refresh_without_a_step():
    """Micro-batches of one accumulation share the target: one forward each, and two more per refresh."""
    model = lora_model("llama")
    gate = gate_for(model, target_decay=None)
    forwards = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    handle = model.get_input_embeddings().register_forward_hook(count)
    counts = []
    for seed, step_before in enumerate([False, False, False, True, False]):
        if step_before:
            step_by_hand(model, 0)
        batch = sft_batch("right", seed=seed)
        forwards = 0
        with gate(batch):
            model(**batch).loss.backward()
        counts.append(forwards)
    handle.remove()
    assert len(cases.validation()) == 2
    assert counts == [3, 1, 1, 3, 1]


@pytest.mark.parametrize("how", ["off", "non_reentrant"])
def test_saved_tensors_that_hooks_give_back_only_once(how):
    """As TRL's activation offloading does: valuing leaves each to the ordinary backward."""
    batch = sft_batch("right")
    plain, offloaded = (checkpointed(lora_model("llama"), how) for _ in range(2))
    kept = {}

    ids = itertools.count()

    def pack(tensor):
        kept[key := next(ids)] = tensor
        return key

    for model, hooks in (
        (plain, contextlib.nullcontext()),
        (offloaded, torch.autograd.graph.saved_tensors_hooks(pack, kept.pop)),
    ):
        gate = gate_for(model)
        with hooks:
            with gate(batch):
                loss = model(**batch).loss
            loss.backward()
    assert not kept
    assert_same_grads(grads_of(offloaded), grads_of(plain), TOL64)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_state_dict_resumes_the_target_and_its_age(stop):
    """Masks, targets and parameters after an interruption are those of an uninterrupted run, bit for bit."""

    def steps(model, gate, which):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for seed in which:
            batch = sft_batch("right", seed=seed)
            with gate(batch):
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, first, second = (lora_model("llama") for _ in range(3))
    gates = [gate_for(model, target_every=3) for model in (whole, first, second)]
    steps(whole, gates[0], range(6))
    steps(first, gates[1], range(stop))
    state = copy.deepcopy(gates[1].state_dict())
    assert gates[1].state_dict()["age"] == state["age"]  # a second call counts no second step
    assert state["age"] == (stop - 1) % 3 + 1
    second.load_state_dict(first.state_dict())
    gates[2].load_state_dict(state)
    steps(second, gates[2], range(stop, 6))
    assert torch.equal(gates[0].weights, gates[2].weights)
    for name, gradient in gates[0].target.gradients.items():
        assert torch.equal(gradient, gates[2].target.gradients[name]), name
    for (name, p), q in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("estimator", ["ghost", "path"])
def test_a_state_goes_through_a_file_and_to_the_device(estimator, tmp_path):
    """`torch.load` reads it as it does by default; tensors that were read on one device go to the model's."""
    model, batch = lora_model("llama"), sft_batch("right")
    options = {"path_steps": 2} if estimator == "path" else {}
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0, **options)
    first, second = (AlphaToken(model, target=cases.validation(), config=config) for _ in range(2))
    sft_loss(model, batch, first).backward()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    second.load_state_dict(state)
    sft_loss(model, batch, second).backward()
    assert torch.equal(second.values.total, first.values.total)
    if estimator == "ghost":
        away = AlphaToken(model.to("meta"), target=cases.validation(), config=config)
        away.load_state_dict(state)
        assert {gradient.device.type for gradient in away.target.gradients.values()} == {"meta"}


@pytest.mark.parametrize("estimator", ["difference", "path"])
def test_what_could_not_be_made_anew_is_made_at_the_next_try(estimator, monkeypatch):
    model, batch = lora_model("llama"), sft_batch("right")
    options = {"path_steps": 2, "path_every": 2} if estimator == "path" else {"target_every": 2}
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0, **options)
    gate = AlphaToken(model, target=cases.validation(), config=config)
    made = "estimators.path.follow" if estimator == "path" else "directions.source.estimate_target"
    held = lambda: gate.path if estimator == "path" else gate.target  # noqa: E731
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step():
        sft_loss(model, batch, gate).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    before = held()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(f"alphatoken_loss.{made}", fail)
        with pytest.raises(torch.OutOfMemoryError):
            step()
    assert held() is before and gate.source.age == 2
    step()
    assert held() is not before and gate.source.age == 0


def test_steps_in_contexts_with_given_weights_count():
    model, batch = lora_model("llama"), sft_batch("right")
    gate = gate_for(model, target_every=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for weights in (None, torch.ones(batch["labels"].shape), torch.ones(batch["labels"].shape)):
        with gate(batch, weights=weights):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = gate.target
    with gate(batch):
        model(**batch).loss.backward()
    assert gate.target is not before and gate.source.age == 0


def test_metrics_report_the_share_and_the_terms():
    model = lora_model("llama")
    batch = sft_batch("right")
    expected = expected_values(model, "llama", batch)
    mask = reference.keep(expected.total, batch, 0.5)
    gate = gate_for(model)
    with gate(batch):
        model(**batch).loss.backward()
    metrics = gate.metrics()
    assert all(isinstance(value, float) for value in metrics.values()), metrics
    share = float(mask.sum() / response(batch).sum())
    assert any(abs(value - share) < 1e-6 for value in metrics.values()), (share, metrics)
    for term in ("direct_target", "causal_target", "direct_drift", "causal_drift"):
        assert any(term in name for name in metrics), (term, metrics)
    assert any("age" in name for name in metrics), metrics


def test_metrics_count_the_seconds_of_valuing_and_start_again():
    """They grow with the target's estimate and with valuing in the backward, and not with what the user does."""
    model = lora_model("llama")
    batch = sft_batch("right")
    gate = gate_for(model)
    started = time.perf_counter()
    with gate(batch):
        entered = gate.metrics()["seconds"]
        loss = model(**batch).loss
        time.sleep(0.05)
    assert gate.metrics()["seconds"] == 0.0
    loss.backward()
    valued = gate.metrics()["seconds"]
    assert entered > 0 and valued > 0
    assert entered + valued < time.perf_counter() - started - 0.05
    assert gate.metrics()["seconds"] == 0.0


def test_metrics_count_the_forward_at_theta_star_of_a_batch_whose_weights_are_known():
    """It is run for the KL alone then, and takes as long."""
    model, batch = lora_model("llama"), sft_batch("right")
    config = AlphaTokenConfig(estimator="path", path_kl=0.5, stability_weight=0.0, path_steps=1, path_rate=1e-3)
    gate = AlphaToken(model, target=[sft_batch("left")], config=config)
    sft_loss(model, batch, gate).backward()
    gate.metrics()
    decoder = model.get_base_model().get_decoder()
    handle = decoder.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    weights = random_weights(batch, rho=0.5)
    with gate(batch, weights=weights) as step:
        (model(**batch).loss + step.kl).backward()
    handle.remove()
    assert gate.metrics()["seconds"] > 0.05


def test_state_of_the_random_generator_is_that_of_a_plain_step():
    """With dropout, the gated step draws the same noise as the plain one and leaves the generator alike."""
    batch = sft_batch("right")
    plain, gated = (lora_model("llama", lora_dropout=0.3) for _ in range(2))
    gate = gate_for(gated)
    with gate(batch):
        gated(**batch).loss.backward()
    gated.zero_grad()
    torch.manual_seed(5)
    first = plain(**batch).loss
    first.backward()
    after_plain = torch.get_rng_state()
    torch.manual_seed(5)
    with gate(batch):
        second = gated(**batch).loss
        second.backward()
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), after_plain)


@pytest.mark.parametrize("how", CHECKPOINTING)
def test_dropout_gradients_are_those_of_some_mask(how):
    """With dropout the gradient is still a sum of whole token gradients, drawn with the same noise."""
    model = lora_model("llama", lora_dropout=0.3)
    batch = {key: value[:2, :6] for key, value in sft_batch("none").items()}
    checkpointed(model, how)
    gate = gate_for(model)
    torch.manual_seed(7)
    with gate(batch):
        model(**batch).loss.backward()
    found = torch.cat([g.flatten() for g in grads_of(model).values()])
    columns = []
    spots = response(batch).nonzero().tolist()
    for row, column in spots:
        only = torch.full_like(batch["labels"], -100)
        only[row, column] = batch["labels"][row, column]
        model.zero_grad()
        torch.manual_seed(7)
        (model(**{**batch, "labels": only}).loss / len(spots)).backward()
        columns.append(torch.cat([g.flatten() for g in grads_of(model).values()]))
    basis = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(basis, found[:, None]).solution[:, 0]
    assert float((basis @ solution - found).abs().max()) < 1e-6 * float(found.abs().max())
    assert float((solution - solution.round()).abs().max()) < 1e-4
    assert set(solution.round().tolist()) == {0.0, 1.0}


def test_autocast():
    """Under bf16 autocast the gated step has the gradient of the mask that the weights function finds."""
    model = lora_model("llama", dtype=torch.float32)
    other = copy.deepcopy(model)
    batch = sft_batch("right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, _ = cases.found_values(model, "llama", batch)
        sft_loss(other, batch, weights).backward()
        loss = sft_loss(model, batch, gate_for(model))
        loss.backward()
    found = torch.cat([g.flatten() for g in grads_of(model).values()])
    expected = torch.cat([g.flatten() for g in grads_of(other).values()])
    assert torch.isfinite(found).all()
    assert float(F.cosine_similarity(found, expected, dim=0)) > 0.999


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"config": AlphaTokenConfig(stability_weight=0)}, "model.norm.weight"),
        ({"config": AlphaTokenConfig(estimator="difference", stability_weight=0)}, "lm_head.weight"),
        ({"selection": "eaft"}, "lm_head.weight"),
        ({"selection": "given"}, "lm_head.weight"),
    ],
)
def test_what_becomes_trainable_behind_the_gate_later_is_refused(options, name):
    """Gradual unfreezing: the gate could not mask its gradient."""
    model, batch = lora_model("llama"), sft_batch("right")
    given = {} if "selection" in options else {"target": cases.validation()}
    gate = AlphaToken(model, **given, **options)
    weights = {"weights": response(batch).float()} if options.get("selection") == "given" else {}

    def step():
        with gate(batch, **weights):
            model(**batch).loss.backward()

    step()
    (late,) = (p for own, p in model.named_parameters() if own.endswith(name))
    late.requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} is trained and lies behind"):
        step()
    late.requires_grad_(False)
    step()
