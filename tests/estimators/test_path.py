"""Values along the path, against two explicit forwards; what is trained by them; the KL to theta*."""

from __future__ import annotations

import pathlib

import cases
import pytest
import reference
import torch
from batches import is_pairs, pair_batch, response, sft_batch, stacked
from checks import TOL64, TOL_NF4, assert_close, assert_same_grads, error, grads_of
from explicit import norms_in_own_dtype
from gates import CHECKPOINTING, checkpointed
from models import base_model, lora_model, nf4_lora_model
from paths import at, explicit_path, explicit_values, given_fisher
from peft import PrefixTuningConfig, get_peft_model
from penalties import kl_sum
from state import differences, snapshot

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Path,
    alphatoken_weights,
    dpo_loss,
    make_path,
    random_weights,
    sft_loss,
    target_gradient,
)
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.directions.fisher import check_same_base
from alphatoken_loss.losses.head import check_head

KINDS = ("none", "right", "left", "ragged", "full", "packed")
PAIRS = ("stacked", "stacked_left", "stacked_ref", "separate", "separate_mask")
KL = 0.6


def config_of(**changes):
    return AlphaTokenConfig(**{"estimator": "path", **changes})


def some_path(model, seed=0):
    """Somewhere else than where the adapter is, but not far."""
    generator = torch.Generator().manual_seed(400 + seed)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            found[name] = parameter.detach().double() + 0.1 * noise
    return Path(found)


def gate_of(model, path=None, **changes):
    return AlphaToken(model, path=path or some_path(model), config=config_of(**changes))


def batch_of(kind, seed=0):
    return pair_batch(kind, seed=seed) if kind in PAIRS else sft_batch(kind, seed=seed)


# ------------------------------------------------------------------------------------------ values


def told(model):
    """The model, whose head was seen to make its logits: this takes a forward, once."""
    check_head(model, read_batch(sft_batch("none")))
    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", [*KINDS, *PAIRS])
def test_against_two_forwards(kind, seed, monkeypatch):
    monkeypatch.setattr("alphatoken_loss.losses.compare.ROWS", 5)
    model, batch = lora_model("llama", seed=seed), batch_of(kind, seed)
    path, config = some_path(model, seed), config_of()
    weights, values = alphatoken_weights(model, None, batch, path=path, config=config, return_values=True)
    expected = explicit_values(model, path.parameters, batch)
    assert_close(values.total, expected, TOL64)
    assert float(values.total[~response(batch)].abs().sum()) == 0
    assert values.adaptation is None and values.stability is None and values.direct_target is None
    assert torch.equal(weights, reference.keep(expected, batch, 0.5).float())
    for wrong in ("sign", "shift", *(["branch"] if is_pairs(batch) else [])):
        assert error(values.total, explicit_values(model, path.parameters, batch, wrong=wrong)) > 1e-2, wrong


@pytest.mark.parametrize("kind", ["right", "packed", "stacked"])
@pytest.mark.parametrize("how", CHECKPOINTING)
def test_the_gate_has_the_same(kind, how):
    """The values in its own forward, and the gradient of the loss masked by them, to the bit."""
    model, batch = lora_model("llama"), batch_of(kind)
    path = some_path(model)
    weights, values = alphatoken_weights(model, None, batch, path=path, config=config_of(), return_values=True)
    checkpointed(model, how)
    before = snapshot(model)
    alphatoken = gate_of(model, path)
    loss_of = dpo_loss if is_pairs(batch) else sft_loss
    arguments = (model, None, batch) if is_pairs(batch) else (model, batch)
    loss_of(*arguments, alphatoken).backward()
    assert differences(before, snapshot(model), ignore=(": grad",)) == []
    assert torch.equal(alphatoken.weights, weights)
    assert_close(alphatoken.values.total, values.total, TOL64)
    found = grads_of(model)
    model.zero_grad()
    known = AlphaToken(model, config=AlphaTokenConfig(estimator="difference", stability_weight=0))
    with known(batch, weights=weights, mean_over_kept=not is_pairs(batch)):
        loss_of(*arguments).backward()
    for name, gradient in grads_of(model).items():
        assert torch.equal(found[name], gradient), name
    model.zero_grad()
    if is_pairs(batch):
        expected = reference.masked_dpo(model, batch, weights.bool(), beta=0.1)[-1]
    else:
        expected = reference.masked_sft(model, batch, weights.bool(), float(weights.sum()))[-1]
    assert_same_grads(found, expected, TOL64)


def test_an_adapter_that_an_invocation_in_the_input_switches_on():
    """PEFT hands the place of the invocation to its layers in the model's own forward (aLoRA)."""
    model, batch = lora_model("llama", alora_invocation_tokens=[7]), sft_batch("none")
    batch["input_ids"][:, 1] = 7
    batch["labels"][:, 1] = -100
    path = some_path(model)
    _, values = alphatoken_weights(model, None, batch, path=path, config=config_of(), return_values=True)
    assert_close(values.total, explicit_values(model, path.parameters, batch), TOL64)
    gate = gate_of(model, path)
    sft_loss(model, batch, gate).backward()
    assert_close(gate.values.total, values.total, TOL64)


def test_thresholds_and_scopes():
    model, batch = lora_model("llama"), sft_batch("right")
    path = some_path(model)
    expected = explicit_values(model, path.parameters, batch)
    for changes, wanted in (
        ({"threshold": "zero"}, response(batch) & (expected > 0)),
        ({"rho": 0.3, "threshold_scope": "sequence"}, reference.keep(expected, batch, 0.3, "sequence")),
    ):
        found = alphatoken_weights(model, None, batch, path=path, config=config_of(**changes))
        assert torch.equal(found, wanted.float()), changes
        assert 0 < float(found.sum()) < float(response(batch).sum())


def test_theta_star_is_made_when_it_is_needed():
    """From the target and the Fisher, once; it is the explicit one, and later steps do not move it."""
    with norms_in_own_dtype():
        model, fisher, batch = lora_model("llama"), given_fisher(lora_model("llama")), sft_batch("right")
        config = config_of(path_steps=4, path_rate=1e-2)
        alphatoken = AlphaToken(model, target=cases.validation(), fisher=fisher, config=config)
        assert alphatoken.path is None
        expected = explicit_path(model, cases.validation(), steps=4, rate=1e-2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(3):
            wanted = explicit_values(model, expected, batch)
            sft_loss(model, batch, alphatoken).backward()
            assert_close(alphatoken.values.total, wanted, 1e-7)
            assert alphatoken.metrics()["target_age"] == step
            optimizer.step()
            optimizer.zero_grad()
        for name, tensor in expected.items():
            assert_close(alphatoken.path.parameters[name], tensor, 1e-8, name)
        options = {"target": cases.validation(), "fisher": fisher, "config": config, "return_values": True}
        fresh = lora_model("llama")
        assert_close(
            alphatoken_weights(fresh, None, batch, **options)[1].total, explicit_values(fresh, expected, batch), 1e-7
        )


def test_it_is_made_anew():
    """After `path_every` optimizer steps, from where the adapter then is, by the settings of a renewal."""
    with norms_in_own_dtype():
        model, batch = lora_model("llama"), sft_batch("right")
        settings = {"path_every": 2, "path_steps": 4, "path_rate": 1e-2, "path_renewal_steps": 2}
        config = config_of(**settings, path_renewal_rate=5e-3)
        alphatoken = AlphaToken(model, target=cases.validation(), fisher=given_fisher(model), config=config)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        expected = explicit_path(model, cases.validation(), steps=4, rate=1e-2)
        for step in range(4):
            if step == 2:
                expected = explicit_path(model, cases.validation(), steps=2, rate=5e-3)
            wanted = explicit_values(model, expected, batch)
            for _ in range(2):  # accumulation is no step
                sft_loss(model, batch, alphatoken).backward()
                assert_close(alphatoken.values.total, wanted, 1e-7)
            optimizer.step()
            optimizer.zero_grad()


def test_given_as_an_adapter():
    model, batch = lora_model("llama"), sft_batch("right")
    model.add_adapter("star", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".star." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    values = alphatoken_weights(model, None, batch, path="star", config=config_of(), return_values=True)[1]
    with torch.no_grad():
        here, there = (reference.token_nll(reference.frozen_copy(model, name), batch) for name in ("default", "star"))
    assert_close(values.total, here - there, TOL64)


def test_nf4():
    model, batch = nf4_lora_model("llama"), sft_batch("left")
    path = some_path(model)
    before = snapshot(model)
    values = alphatoken_weights(model, None, batch, path=path, config=config_of(), return_values=True)[1]
    assert differences(before, snapshot(model)) == []
    assert_close(values.total, explicit_values(model, path.parameters, batch), TOL_NF4)


def test_virtual_tokens():
    prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(base_model("llama"), prefix).train()
    batch = sft_batch("right")
    path = some_path(model)
    with torch.no_grad():
        here = -path_free_logps(model, batch)
        own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        path.apply(model)
        there = -path_free_logps(model, batch)
        Path(own).apply(model)
    alphatoken = gate_of(model, path)
    sft_loss(model, batch, alphatoken).backward()
    assert_close(alphatoken.values.total, here - there, TOL64)


def path_free_logps(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logps = logits[:, -batch["labels"].shape[1] :].log_softmax(-1)
    picked = logps[:, :-1].gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.masked_fill(batch["labels"][:, 1:] == -100, 0), (1, 0))


# ------------------------------------------------------------------------------------------ precomputed


@pytest.mark.parametrize("kind", ["right", "left", "packed", "stacked_left", "separate"])
def test_precomputed(kind):
    """With theta*'s log-probabilities in the batch: the same values, one forward, and no theta* needed."""
    model, batch = told(lora_model("llama")), batch_of(kind)
    path = some_path(model)
    expected = explicit_values(model, path.parameters, batch)
    logps = path.logps(model, batch)
    if kind == "separate":
        widths = [batch[f"{branch}_input_ids"].shape[1] for branch in ("chosen", "rejected")]
        halves = logps.chunk(2)
        more = {f"{b}_path_logps": h[:, :w] for b, h, w in zip(("chosen", "rejected"), halves, widths, strict=True)}
    else:
        more = {"path_logps": logps}
    forwards = []
    decoder = model.get_base_model().get_decoder()
    hook = decoder.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    with_column = {**batch, **more}
    found = alphatoken_weights(model, None, with_column, config=config_of(), return_values=True)[1]
    assert_close(found.total, expected, TOL64)
    assert forwards == [False]
    alphatoken = AlphaToken(model, config=config_of())
    forwards.clear()
    with alphatoken(with_column):
        logits = model(**{k: stacked(batch)[k] for k in ("input_ids",)}, **_mask(batch), use_cache=False).logits
    hook.remove()
    assert forwards == [True]
    logits.sum().backward()
    assert_close(alphatoken.values.total, expected, TOL64)


def _mask(batch):
    rows = stacked(batch)
    return {k: rows[k] for k in ("attention_mask", "position_ids") if k in rows}


def test_precomputed_where_training_begins():
    """While theta is theta* no value is rounding of the column's; then the column is all that there is."""
    model, batch = told(lora_model("llama")), sft_batch("right")
    path = some_path(model)
    noise = 1e-8 * torch.randn(batch["labels"].shape, dtype=torch.float64)
    with_column = {**batch, "path_logps": path.logps(model, batch) + noise}
    alphatoken = gate_of(model, path, path_start=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    decoder, forwards = model.get_base_model().get_decoder(), []
    decoder.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    for step in range(3):
        wanted = explicit_values(model, path.parameters, batch)
        for _ in range(2):  # accumulation
            forwards.clear()
            sft_loss(model, with_column, alphatoken).backward()
            found = alphatoken.values.total
            if step == 0:
                assert torch.equal(_own(model, path), _flat(path)) and sorted(forwards) == [False, True]
                assert not found.any() and torch.equal(alphatoken.weights.bool(), response(batch))
            else:
                assert forwards == [True]
                assert 0 < error(found, wanted) < 1e-4
        optimizer.step()
        optimizer.zero_grad()
        assert alphatoken.metrics()["target_age"] == step


# ------------------------------------------------------------------------------------------ KL to theta*


def _expected_kl(model, path, batch, weights, on, over):
    """Loss and gradients of the masked mean and KL * the mean KL to theta*, through whole logits."""
    work, rows = reference.frozen_copy(model), stacked(batch)
    mask = response(batch)
    taken = mask if on == "all" else mask & (weights == 0)
    total = explicit_kl(work, at(model, path.parameters), rows, taken, over)
    return work, KL * total / mask.sum()


def explicit_kl(work, other, rows, mask, over):
    """sum over tokens of KL(other || work), the label's column left out and the rest normalised where asked."""
    with torch.no_grad():
        wanted = reference.logits_of(other, rows)
    logits = reference.logits_of(work, rows)
    total = torch.zeros((), dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        p, q = wanted[b, t - 1].softmax(-1), logits[b, t - 1].softmax(-1)
        if over == "without_label":
            rest = torch.arange(len(p)) != rows["labels"][b, t]
            p, q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        total = total + (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("over", ["vocabulary", "without_label"])
@pytest.mark.parametrize("on", ["all", "dropped"])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_kl_to_theta_star(kind, on, over, monkeypatch):
    monkeypatch.setattr("alphatoken_loss.losses.compare.ROWS", 5)
    model, batch = lora_model("llama"), sft_batch(kind)
    path = some_path(model)
    alphatoken = gate_of(model, path, path_kl=KL)
    with alphatoken(batch, mean_over_kept=True, kl_on=on, kl_over=over) as step:
        loss = model(**batch, use_cache=False).loss
    (loss + step.kl).backward()
    work, kl = _expected_kl(model, path, batch, alphatoken.weights, on, over)
    assert_close(step.kl.detach(), kl.detach(), TOL64)
    nll = (alphatoken.weights * reference.token_nll(work, batch)).sum() / alphatoken.weights.sum()
    assert_same_grads(grads_of(model), reference.gradients(work, nll + kl), TOL64)
    assert alphatoken.metrics()["path_kl"] == pytest.approx(float(kl.detach()) / KL, rel=1e-6)


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["left", "stacked"])
def test_losses_add_it(kind, how):
    model, batch = lora_model("llama"), batch_of(kind)
    path = some_path(model)
    checkpointed(model, how)
    alphatoken = gate_of(model, path, path_kl=KL)
    if is_pairs(batch):
        loss = dpo_loss(model, None, batch, alphatoken)
    else:
        loss = sft_loss(model, batch, alphatoken)
    loss.backward()
    work, kl = _expected_kl(model, path, batch, alphatoken.weights, "all", "vocabulary")
    if is_pairs(batch):
        value, grads = reference.masked_dpo(model, batch, alphatoken.weights.bool(), beta=0.1)[-2:]
    else:
        kept = float(alphatoken.weights.sum())
        _, grads = reference.masked_sft(model, batch, alphatoken.weights.bool(), kept)
        value = reference.token_nll(work, batch).sum() / response(batch).sum()
    assert_close(loss.detach(), value.detach() + kl.detach(), TOL64)
    more = reference.gradients(work, kl)
    assert_same_grads(grads_of(model), {name: g + more[name] for name, g in grads.items()}, TOL64)


def test_both_kls():
    """That to theta* and that to the reference add up; weights that are given need the first all the same."""
    model, batch = lora_model("llama"), sft_batch("right")
    path = some_path(model)
    weights = response(batch).float()
    weights[0] = 0
    alphatoken = gate_of(model, path, path_kl=KL)
    with alphatoken(batch, weights=weights, kl_coef=0.2) as step:
        model(**batch)
    work = reference.frozen_copy(model)
    to_star = explicit_kl(work, at(model, path.parameters), batch, response(batch), "vocabulary")
    expected = (KL * to_star + 0.2 * kl_sum(work, batch)) / response(batch).sum()
    assert_close(step.kl.detach(), expected.detach(), TOL64)
    assert set(alphatoken.metrics()) >= {"kl", "path_kl"}


def test_one_forward_without_grad_is_all_that_it_takes():
    model, batch = told(lora_model("llama")), sft_batch("right")
    alphatoken = gate_of(model, path_kl=KL)
    forwards, heads = [], []
    base = model.get_base_model()
    hooks = [
        base.get_decoder().register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled())),
        base.lm_head.register_forward_hook(lambda m, args, out: heads.append(tuple(out.shape[:-1]))),
    ]
    with alphatoken(batch) as step:
        loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    (loss + step.kl).backward()
    tokens = int(response(batch).sum())
    assert sorted(forwards) == [False, True]
    assert sorted(heads) == sorted([(tokens,), (tokens,), tuple(batch["labels"].shape)])  # theta, theta*, the loss


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("how", ["model's loss", "own head", "column"])
def test_without_a_kl_the_head_does_not_run_again(family, how):
    """Values begin with the log-probabilities of the model's own logits, capped where it caps them; only a loss that
    runs the head itself leaves none."""
    model = told(lora_model(family))
    batch = sft_batch("none" if family == "gemma2" else "left")  # padded, it makes nan
    path = some_path(model)
    expected = explicit_values(model, path.parameters, batch)
    given = {**batch, "path_logps": path.logps(model, batch)} if how == "column" else batch
    alphatoken = AlphaToken(model, config=config_of()) if how == "column" else gate_of(model, path)
    rows, base = [], model.get_base_model()
    hook = base.lm_head.register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))
    with alphatoken(given):
        if how == "own head":
            hidden = base.get_decoder()(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
            loss = base.lm_head(hidden).square().mean()
        else:
            loss = model(**batch, use_cache=False).loss
    loss.backward()
    hook.remove()
    tokens, whole = int(response(batch).sum()), batch["labels"].numel()
    of_path = [] if how == "column" else [tokens]
    assert rows == [*of_path, whole, *([tokens] if how == "own head" else [])]
    assert_close(alphatoken.values.total, expected, TOL64)


def test_a_kl_that_was_left_out_is_an_error():
    model, batch = lora_model("llama"), sft_batch("right")
    alphatoken = gate_of(model, path_kl=KL)
    with alphatoken(batch):
        model(**batch)  # nothing goes backward: no error
    with alphatoken(batch) as step:
        loss = model(**batch).loss
    (loss + step.kl).backward()
    with alphatoken(batch):
        model(**batch).loss.backward()
    with pytest.raises(RuntimeError, match=r"path_kl is 0.6, but .*loss \+ step.kl.*path_kl=0"), alphatoken(batch):
        pass


# ------------------------------------------------------------------------------------------ starting there


def test_training_starts_at_theta_star():
    model, batch = lora_model("llama"), sft_batch("right")
    path = some_path(model)
    alphatoken = gate_of(model, path, path_start=True)
    alphatoken_weights(model, None, batch, path=path, config=config_of(path_start=True))
    assert not torch.equal(_own(model, path), _flat(path))  # valuing writes nothing
    with torch.no_grad(), alphatoken(batch):
        model(**batch)
    assert not torch.equal(_own(model, path), _flat(path))  # nor does what is no training
    sft_loss(model, batch, alphatoken).backward()
    assert torch.equal(_own(model, path), _flat(path))
    assert float(alphatoken.values.total.abs().max()) == 0 and torch.equal(alphatoken.weights.bool(), response(batch))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    sft_loss(model, batch, alphatoken).backward()
    assert not torch.equal(_own(model, path), _flat(path))  # once
    assert alphatoken.metrics()["target_age"] == 1


@pytest.mark.parametrize(("kind", "scope"), [("right", "batch"), ("left", "sequence"), ("stacked", "sequence"),
                                             ("stacked", "pair")])  # fmt: skip
def test_a_threshold_of_zero_does_not_hold_training_at_theta_star(kind, scope):
    """There all values are 0, and so is the gradient of the KL: if no token were kept, no step would lead away."""
    model, batch = lora_model("llama"), batch_of(kind)
    alphatoken = gate_of(model, path_start=True, path_kl=KL, threshold="zero", threshold_scope=scope)
    loss = dpo_loss(model, None, batch, alphatoken) if is_pairs(batch) else sft_loss(model, batch, alphatoken)
    loss.backward()
    assert torch.equal(alphatoken.weights.bool(), response(batch))
    assert max(float(gradient.abs().max()) for gradient in grads_of(model).values()) > 0


@pytest.mark.parametrize("made", [False, True])
def test_training_starts_at_theta_star_with_weights_that_are_given_too(made):
    """Else the first batch that is valued would undo the steps before it."""
    model, batch = lora_model("llama"), sft_batch("right")
    given = {"fisher": given_fisher(model), "config": config_of(path_start=True, path_steps=2, path_rate=1e-2)}
    path = make_path(model, cases.validation(), progress=False, **given) if made else some_path(model)
    alphatoken = AlphaToken(model, target=cases.validation(), **given, **({} if made else {"path": path}))
    with alphatoken(batch, weights=response(batch).double()):
        model(**batch, use_cache=False).loss.backward()
    assert torch.equal(_own(model, path), _flat(path))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = _own(model, path)
    sft_loss(model, batch, alphatoken).backward()
    assert torch.equal(_own(model, path), moved) and not torch.equal(moved, _flat(path))


def _own(model, path):
    own = dict(model.named_parameters())
    return torch.cat([own[name].detach().flatten() for name in path.parameters])


def _flat(path):
    return torch.cat([tensor.flatten() for tensor in path.parameters.values()])


def test_resumed():
    """From the state of a run, another goes on with the same theta*, weights and age, and does not start anew."""
    config = config_of(path_steps=2, path_every=3, path_start=True)
    batches = [sft_batch("right", seed=seed) for seed in range(6)]

    def run(model, alphatoken, some):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        found = []
        for batch in some:
            sft_loss(model, batch, alphatoken).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((alphatoken.weights, alphatoken.values.total))
        return found

    def made(model):
        return AlphaToken(model, target=cases.validation(), fisher=given_fisher(model), config=config)

    model = lora_model("llama")
    whole = run(model, made(model), batches)
    model = lora_model("llama")
    first = made(model)
    run(model, first, batches[:2])
    state = first.state_dict()
    again = made(model)
    again.load_state_dict(state)
    rest = run(model, again, batches[2:])
    for (weights, values), (wanted_weights, wanted_values) in zip(rest, whole[2:], strict=True):
        assert torch.equal(weights, wanted_weights) and torch.equal(values, wanted_values)


def test_a_resumed_path_still_tells_how_it_was_made_and_for_which_base():
    config, batch = config_of(path_steps=2, path_rate=1e-3), sft_batch("right")
    model = lora_model("llama")
    first = AlphaToken(model, target=cases.validation(), fisher=given_fisher(model), config=config)
    sft_loss(model, batch, first).backward()
    again = AlphaToken(model, target=cases.validation(), fisher=given_fisher(model), config=config)
    again.load_state_dict(first.state_dict())
    there, made = again.path, first.path
    assert (there.steps, there.rate, there.base) == (made.steps, made.rate, made.base) == (2, 1e-3, made.base)
    assert made.base and all(torch.equal(tensor, there.parameters[n]) for n, tensor in made.parameters.items())
    other = lora_model("llama", seed=3)
    moved = AlphaToken(other, target=cases.validation(), fisher=given_fisher(other), config=config)
    moved.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="made for another base"):
        sft_loss(other, batch, moved)
    for name, parameter in other.named_parameters():  # an embedding that is trained tells no base
        parameter.requires_grad_(parameter.requires_grad or "embed_tokens" in name)
    check_same_base(made.base, other, "path")
    earlier = first.state_dict()
    for name in ("steps", "rate", "base"):
        del earlier["steps"][name]
    again.load_state_dict(earlier)
    assert (again.path.steps, again.path.rate, again.path.base) == (0, 0.0, ())


def test_the_age_of_a_given_path_is_resumed():
    model, batch, config = lora_model("llama"), sft_batch("right"), config_of()
    path = some_path(model)
    first, second = (AlphaToken(model, path=path, config=config) for _ in range(2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sft_loss(model, batch, first).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = first.state_dict()
    assert state["age"] == 3
    second.load_state_dict(state)
    assert second.metrics()["target_age"] == 3.0


@pytest.mark.parametrize("apart", [False, True])
def test_pairs_ask_their_reference_once(apart):
    """Kept whole, pairs are valued by the sums that the loss has of them; with another reference, by its own."""
    model, batch = lora_model("llama"), pair_batch("stacked")
    config = config_of(path_from="reference", threshold_scope="pair", stability_weight=0.0)
    alphatoken = AlphaToken(model, path=some_path(model), config=config)
    reference = lora_model("llama", seed=1).requires_grad_(False) if apart else None
    runs = []
    for each in (model, reference):
        if each is not None:
            decoder = each.get_base_model().get_decoder()
            decoder.register_forward_pre_hook(lambda module, args: runs.append(module))
    check_head(model, read_batch(batch))
    runs.clear()
    dpo_loss(model, reference, batch, alphatoken).backward()
    # Its reference, the policy and theta*; and the reference of the values, where that is another.
    assert len(runs) == 3 + apart


# ------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    target = target_gradient(model, cases.validation(), config=config_of())
    path = some_path(model)
    with pytest.raises(ValueError, match=r"target is a Target, one gradient.*make_path"):
        AlphaToken(model, target=target, config=config_of())
    with pytest.raises(ValueError, match=r"target is a Target, one gradient"):
        alphatoken_weights(model, None, batch, target=target, config=config_of())
    optimizer = torch.optim.Adam(path.parameters.values())
    with pytest.raises(ValueError, match=r"An optimizer was given, but.*precondition=False"):
        AlphaToken(model, target=cases.validation(), optimizer=optimizer, config=config_of())
    with pytest.raises(ValueError, match=r"path_every is 3.*no target batches"):
        AlphaToken(model, path=path, config=config_of(path_every=3))
    with pytest.raises(ValueError, match=r'path was given, but estimator="ghost".*estimator="path"'):
        AlphaToken(model, path=path)
    with pytest.raises(ValueError, match=r"neither a target nor a path.*no path_logps"):
        alphatoken_weights(model, None, batch, config=config_of())
    alphatoken = AlphaToken(model, config=config_of())
    with pytest.raises(ValueError, match=r"neither a target nor a path"), alphatoken(batch):
        pass
    other = some_path(lora_model("llama", layers=2))
    with pytest.raises(ValueError, match=r"The path moves .*which is not scored.*make_path"):
        alphatoken_weights(model, None, batch, path=other, config=config_of())
    wrong = Path({name: torch.full_like(t, torch.nan) for name, t in path.parameters.items()})
    with pytest.raises(ValueError, match=r"The path's .* is not finite.*path_rate"):
        alphatoken_weights(model, None, batch, path=wrong, config=config_of())
    elsewhere = make_path(lora_model("llama", layers=1, seed=5), cases.validation(), steps=1, progress=False)
    with pytest.raises(ValueError, match=r"The path was made for another base model"):
        alphatoken_weights(model, None, batch, path=elsewhere, config=config_of())
    ghost = AlphaToken(model, target=target, config=AlphaTokenConfig(num_layers=1, stability_weight=0))
    with pytest.raises(ValueError, match=r'kl_on is "dropped", but which .*estimator="path"'):
        sft_loss(model, batch, ghost, kl_coef=0.1, kl_on="dropped")
    with pytest.raises(ValueError, match=r"path_kl is 0.1 and path_start False, but tokens are not chosen by their"):
        AlphaToken(model, selection="eaft", config=config_of(path_kl=0.1))
    off = AlphaToken(model, config=config_of(rho=1.0))
    with pytest.raises(ValueError, match=r'kl_on is "dropped", but rho=1.0'), off(batch, kl_coef=0.1, kl_on="dropped"):
        pass


def test_arguments_of_another_type():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    path = some_path(model)
    for given in (pathlib.Path("path.safetensors"), dict(path.parameters)):
        with pytest.raises(TypeError, match=r"path is a .*Path\.load"):
            AlphaToken(model, path=given, config=config_of())
    with pytest.raises(TypeError, match=r"fisher is a builtins.str.*Fisher\.load"):
        AlphaToken(model, target=[batch], fisher="fisher.safetensors", config=config_of())
    with pytest.raises(TypeError, match=r"config is a dict; it must be an AlphaTokenConfig"):
        AlphaToken(model, target=[batch], config={"rho": 0.5})
    with pytest.raises(TypeError, match=r"batches is a NoneType; it must be validation batches"):
        make_path(model, None)
    with pytest.raises(ValueError, match=r"no parameter base_model.* of shape .*make_path"):
        path.logps(base_model("llama"), batch)
    column = {**batch, "path_logps": path.logps(model, batch).tolist()}
    with pytest.raises(TypeError, match=r"path_logps is a list; it must be a tensor"):
        alphatoken_weights(model, None, column, config=config_of())


def test_columns_that_cannot_be():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    path = some_path(model)
    logps = path.logps(model, batch)
    for changes in ({"path_kl": 0.1}, {"path_start": True}):
        alphatoken = AlphaToken(model, target=cases.validation(), config=config_of(**changes))
        with pytest.raises(ValueError, match=rf"bring path_logps, but {next(iter(changes))}=.*"):
            sft_loss(model, {**batch, "path_logps": logps}, alphatoken)
    with pytest.raises(ValueError, match=r"path_logps have shape \(3, 10\) and the labels \(3, 11\)"):
        alphatoken_weights(model, None, {**batch, "path_logps": logps[:, 1:]}, config=config_of())
    logps[:, -3:] = torch.nan
    with pytest.raises(FloatingPointError, match="path_logps is not finite at a response token"):
        alphatoken_weights(model, None, {**batch, "path_logps": logps}, config=config_of())


def test_values_that_are_not_finite():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    path = some_path(model)
    with torch.no_grad():
        dict(model.named_parameters())[next(iter(path.parameters))][:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"adapter weight .*lora_A.* is not finite"):
        alphatoken_weights(model, None, batch, path=path, config=config_of())


def test_whose_log_probabilities_are_not_finite():
    """The forward's own are named first: where the model overflows, theta* does too."""
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    path, column = some_path(model), torch.zeros(batch["labels"].shape)
    column[0, -1] = torch.nan
    with pytest.raises(FloatingPointError, match="path_logps is not finite at a response token"):
        alphatoken_weights(model, None, {**batch, "path_logps": column}, config=config_of())
    far = Path({name: tensor.mul(torch.inf).nan_to_num() for name, tensor in path.parameters.items()})
    with pytest.raises(FloatingPointError, match=r"Log-probabilities at theta\* are not finite"):
        alphatoken_weights(model, None, batch, path=far, config=config_of())
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="Log-probabilities of the batch are not finite"):
        sft_loss(model, batch, gate_of(model, path)).backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path_steps": 0}, r"path_steps is 0; .*at least 1"),
        ({"path_every": 2.5}, r"path_every is 2.5; .*Use None"),
        ({"path_renewal_steps": True}, r"path_renewal_steps is True"),
        ({"path_rate": 0.0}, r"path_rate is 0.0; .*above 0"),
        ({"path_renewal_rate": None}, r"path_renewal_rate is None"),
        ({"path_beta": float("inf")}, r"path_beta is inf"),
        ({"path_likelihood": -1}, r"path_likelihood is -1; .*at least 0"),
        ({"path_kl": float("nan")}, r"path_kl is nan"),
        ({"path_holdout": 1.0}, r"path_holdout is 1.0; .*\[0, 1\)"),
        ({"path_start": 1}, r"path_start is 1; .*True or False"),
        ({"path_kl": 0.3, "estimator": "ghost"}, r'path_kl is 0.3, but estimator="ghost" has no theta\*'),
        ({"path_start": True, "estimator": "exact"}, r"path_start is True, but"),
        ({"path_every": 2, "estimator": "difference"}, r"path_every is 2, but"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_with_rho_1_nothing_is_done():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    alphatoken = AlphaToken(model, config=config_of(rho=1.0))
    with alphatoken(batch) as step:
        model(**batch).loss.backward()
    assert step.kl is None and alphatoken.path is None and alphatoken.metrics() == {"kept": 1.0}


@pytest.mark.parametrize("threshold", ["quantile", "zero", "soft"])
@pytest.mark.parametrize(("kind", "scope"), [("left", "batch"), ("stacked", "pair")])
def test_with_rho_1_training_begins_at_theta_star_and_is_held_there_all_the_same(kind, scope, threshold):
    model, batch = lora_model("llama"), batch_of(kind)
    path = some_path(model)
    settings = {"rho": 1.0, "threshold": threshold, "threshold_scope": scope}
    alphatoken = gate_of(model, path, path_start=True, path_kl=KL, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(2):
        loss = dpo_loss(model, None, batch, alphatoken) if is_pairs(batch) else sft_loss(model, batch, alphatoken)
        assert torch.equal(_own(model, path), _flat(path)) == (step == 0)
        everything = response(batch)
        if is_pairs(batch):
            grads = reference.masked_dpo(model, batch, everything, beta=0.1)[-1]
        else:
            grads = reference.masked_sft(model, batch, everything, float(everything.sum()))[1]
        work = reference.frozen_copy(model)
        kl = KL * explicit_kl(work, at(model, path.parameters), stacked(batch), everything, "vocabulary")
        more = reference.gradients(work, kl / everything.sum())
        loss.backward()
        assert torch.equal(alphatoken.weights, everything.float())
        assert_same_grads(grads_of(model), {name: g + more[name] for name, g in grads.items()}, TOL64)
        optimizer.step()
        optimizer.zero_grad()
    assert alphatoken.metrics()["kept"] == 1.0
    nothing = config_of(rho=1.0, threshold=threshold, threshold_scope=scope)
    for options in ({"return_values": True}, {}):  # a threshold has no say
        found = alphatoken_weights(model, None, batch, path=path, config=nothing, **options)
        assert torch.equal(found[0] if options else found, everything.float())


def test_with_rho_1_and_no_kl_theta_star_is_only_where_training_begins():
    """No forward runs there, and nothing is masked."""
    model, batch = lora_model("llama"), sft_batch("left")
    path, forwards = some_path(model), []
    alphatoken = gate_of(model, path, rho=1.0, path_start=True)
    model.get_base_model().get_decoder().register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    everything = response(batch)
    for step in range(2):
        forwards.clear()
        sft_loss(model, batch, alphatoken).backward()
        assert forwards == [True]
        assert torch.equal(_own(model, path), _flat(path)) == (step == 0)
        assert_same_grads(
            grads_of(model), reference.masked_sft(model, batch, everything, float(everything.sum()))[1], TOL64
        )
        optimizer.step()
        optimizer.zero_grad()
    assert alphatoken.metrics()["kept"] == 1.0 and torch.equal(alphatoken.weights, everything.float())


def test_with_rho_1_nothing_is_run_that_nothing_needs():
    """Values choose no token then: no reference runs for them, and theta* is not renewed."""
    model, batch = lora_model("llama"), sft_batch("left")
    forwards, path = [], some_path(model)
    held = gate_of(model, path, rho=1.0, path_start=True, path_kl=KL, path_from="reference")
    config = config_of(rho=1.0, path_start=True, path_every=1, path_steps=2, path_rate=1e-2)
    begun = AlphaToken(model, target=cases.validation(), fisher=given_fisher(model), config=config)
    sft_loss(model, batch, held).backward()
    sft_loss(model, batch, begun).backward()
    model.get_base_model().get_decoder().register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    sft_loss(model, batch, held).backward()
    assert forwards == [False, True]
    forwards.clear()
    theta = begun.path
    sft_loss(model, batch, begun).backward()
    assert forwards == [True] and begun.path is theta


def test_without_grad_a_loss_with_its_kl_is_the_plain_one():
    model, batch = lora_model("llama"), sft_batch("right")
    alphatoken = gate_of(model, path_kl=KL)
    with torch.no_grad():
        with alphatoken(batch) as step:
            loss = model(**batch).loss
            assert loss + step.kl == loss == sft_loss(model, batch, alphatoken)
        with alphatoken(batch, kl_coef=0.5) as step:
            model(**batch)
        assert_close(step.kl, 0.5 * kl_sum(model, batch) / response(batch).sum(), TOL64)


@pytest.mark.parametrize("trained", [False, True])
def test_a_state_tells_whether_training_has_begun(trained):
    """Saved before the first step it does not keep training from beginning at theta*."""
    model, batch, path = lora_model("llama"), sft_batch("right"), some_path(lora_model("llama"))
    alphatoken = gate_of(model, path, path_start=True)
    if trained:
        sft_loss(model, batch, alphatoken).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    state, own = alphatoken.state_dict(), _own(model, path)
    other = gate_of(model, path, path_start=True)
    other.load_state_dict(state)
    sft_loss(model, batch, other).backward()
    assert torch.equal(_own(model, path), own if trained else _flat(path))
    empty = gate_of(lora_model("llama"), path, path_start=True)
    empty.load_state_dict({"target": None, "age": 0, "turn": 0, "steps": {}})
    sft_loss(empty.model, batch, empty).backward()
    assert torch.equal(_own(empty.model, path), _flat(path))


def test_what_is_trained_after_a_step_and_is_no_part_of_theta_star_is_told():
    model, batch = lora_model("llama"), sft_batch("right")
    late = [p for name, p in model.named_parameters() if p.requires_grad and "layers.0." in name]
    for parameter in late:
        parameter.requires_grad_(False)
    alphatoken = gate_of(model, some_path(model), path_start=True)
    sft_loss(model, batch, alphatoken).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for parameter in late:
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The path has nothing for the scored parameter .*layers\.0\."):
        sft_loss(model, batch, alphatoken)


# ------------------------------------------------------------------------------------------ whole pairs, from the start


def _from_reference(model, path, batch):
    """log p* - log p_ref with the branch's sign."""
    rows = stacked(batch)
    other = reference.frozen_copy(model, reference.reference_adapter(model))
    with torch.no_grad():
        values = reference.token_nll(other, rows) - reference.token_nll(at(model, path.parameters), rows)
    if is_pairs(batch):
        values[len(values) // 2 :] *= -1
    return values


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["left", "packed", "stacked_left", "separate"])
def test_from_the_reference(kind, how):
    """Values that do not change as the adapter moves."""
    model, batch = lora_model("llama"), batch_of(kind)
    path, config = some_path(model), config_of(path_from="reference")
    expected = _from_reference(model, path, batch)
    values = alphatoken_weights(model, None, batch, path=path, config=config, return_values=True)[1]
    assert_close(values.total, expected, TOL64)
    checkpointed(model, how)
    before = snapshot(model)
    alphatoken = gate_of(model, path, path_from="reference")
    if is_pairs(batch):
        dpo_loss(model, None, batch, alphatoken).backward()
    else:
        sft_loss(model, batch, alphatoken).backward()
    assert differences(before, snapshot(model), ignore=(": grad",)) == []
    assert_close(alphatoken.values.total, expected, TOL64)


@pytest.mark.parametrize("path_kl", [0.0, KL])
def test_dropout_does_not_change_values_from_the_reference(path_kl):
    """The training forward has its noise; theta* and the reference have none."""
    model, batch = lora_model("llama", lora_dropout=0.5), pair_batch("stacked")
    path = some_path(model)
    still = reference.frozen_copy(model)
    expected = _from_reference(still.eval(), path, batch)
    alphatoken = gate_of(model.train(), path, path_from="reference", path_kl=path_kl)
    dpo_loss(model, None, batch, alphatoken).backward()
    assert_close(alphatoken.values.total, expected, TOL64)
    assert any(module.training for name, module in model.named_modules() if "lora_dropout" in name)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_whole_pairs(seed):
    model, batch = lora_model("llama", seed=seed), pair_batch("stacked", seed=seed)
    path = some_path(model, seed)
    half = len(batch["input_ids"]) // 2
    sums = _from_reference(model, path, batch).sum(1)
    pairs = sums[:half] + sums[half:]
    for changes, kept in (
        ({"threshold": "zero"}, pairs >= 0),
        ({"rho": 0.5}, pairs >= torch.quantile(pairs, 0.5)),
    ):
        config = config_of(path_from="reference", threshold_scope="pair", **changes)
        weights = alphatoken_weights(model, None, batch, path=path, config=config)
        assert torch.equal(weights.bool(), response(batch) & kept.repeat(2)[:, None]), changes
    refs = reference.reference_logps(model, batch)
    brought = {**batch, "ref_chosen_logps": refs[:half], "ref_rejected_logps": refs[half:]}
    config = config_of(path_from="reference", threshold_scope="pair", threshold="zero")
    weights, values = alphatoken_weights(model, None, brought, path=path, config=config, return_values=True)
    found = values.total.sum(1)
    assert_close(found[:half] + found[half:], pairs, TOL64)
    assert torch.equal(weights.bool(), response(batch) & (pairs > 0).repeat(2)[:, None])


def test_whole_pairs_of_pairs_alone():
    model, batch = lora_model("llama", layers=1), sft_batch("right")
    with pytest.raises(ValueError, match=r'threshold_scope is "pair", but the batch holds no preference pairs'):
        alphatoken_weights(model, None, batch, path=some_path(model), config=config_of(threshold_scope="pair"))
    with pytest.raises(ValueError, match=r'threshold_scope is "pair", which only values have'):
        random_weights(pair_batch(), threshold_scope="pair")
    with pytest.raises(ValueError, match=r"path_from is 'there'; it must be one of 'present', 'reference'"):
        config_of(path_from="there")


def test_the_presets():
    best, pairs = AlphaTokenConfig.best(), AlphaTokenConfig.best(pairs=True)
    assert (best.estimator, best.path_start, best.path_kl) == ("path", True, 0.6)
    assert (best.rho, best.threshold, best.path_from) == (0.5, "quantile", "present")
    assert (pairs.threshold, pairs.threshold_scope, pairs.path_from) == ("zero", "pair", "reference")
    former = AlphaTokenConfig.best(estimator="difference")
    assert former == AlphaTokenConfig(estimator="difference", target_parts=1, target_decay=None)


# ------------------------------------------------------------------------------------------ KL variants


@pytest.mark.parametrize("over", ["vocabulary", "without_label"])
@pytest.mark.parametrize("on", ["all", "dropped"])
def test_variants_of_the_kl_to_the_reference(on, over):
    """sft_loss with weights that are given: those of weight 0 are dropped."""
    model, batch = lora_model("llama"), sft_batch("right")
    weights = response(batch).float() * (torch.rand(batch["labels"].shape) < 0.5)
    loss = sft_loss(model, batch, weights, kl_coef=KL, kl_on=on, kl_over=over)
    loss.backward()
    work, other = reference.frozen_copy(model), reference.frozen_copy(model, "off")
    taken = response(batch) if on == "all" else response(batch) & (weights == 0)
    kl = KL * explicit_kl(work, other, batch, taken, over) / response(batch).sum()
    nll = (weights * reference.token_nll(work, batch)).sum() / weights.sum()
    assert_close(loss.detach(), (nll + kl).detach(), TOL64)
    assert_same_grads(grads_of(model), reference.gradients(work, nll + kl), TOL64)
    for name, value in (("kl_on", "some"), ("kl_over", "words")):
        with pytest.raises(ValueError, match=rf"{name} is '{value}'; it must be one of"):
            sft_loss(model, batch, kl_coef=KL, **{name: value})
    with pytest.raises(ValueError, match=r'kl_on is "dropped", but without weights nothing is'):
        sft_loss(model, batch, kl_coef=KL, kl_on="dropped")
