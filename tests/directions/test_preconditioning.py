"""Values of the step that Adam takes: proportional to what one more gradient of each token changes in a real step."""

from __future__ import annotations

import copy

import bitsandbytes
import cases
import pytest
import reference
import torch
from batches import pair_batch, response, sft_batch
from checks import assert_close, error, spearman
from explicit import directions, norms_in_own_dtype, per_token
from models import lora_model, nf4_lora_model

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, Target, alphatoken_weights, sft_loss
from alphatoken_loss.directions import preconditioning as precondition
from alphatoken_loss.directions.preconditioning import preconditioned

EXACT = AlphaTokenConfig(estimator="exact", num_layers="all")


def trained(model, make, steps=6, seed=50):
    """An optimizer of the model's adapters that has taken some steps."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        sft_loss(model, sft_batch("ragged", seed=seed + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, **options)


def given(model, seed=0):
    """Target and Fisher of the tests, and the direction that they make."""
    target, drift = directions(model, "llama", "all", seed)
    fisher = cases.fisher_tensors(model, "llama", "all", seed=seed)
    total = {name: target[name] + 1.5 * drift[name] for name in target}
    fisher = Fisher.from_diagonals(fisher)
    return Target(target, 1.0), fisher, total


def effects_of_tokens(model, optimizer, batch, direction, share=1.0):
    """What the optimizer's own step does to <direction, parameters> when one token's gradient is added to a batch's:
    one backward and one step per token, on copies. The second moments are held where they are (beta2 -> 1)."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss = sft_loss(model, sft_batch("ragged", seed=99))
    base = torch.autograd.grad(loss, parameters)

    def after(gradients):
        fresh = [p.detach().clone().requires_grad_() for p in parameters]
        rest = iter(fresh)
        groups = [{"params": [next(rest) for _ in group["params"]]} for group in optimizer.param_groups]
        copied = type(optimizer)(groups, lr=1e-3, weight_decay=0.0)
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in copied.param_groups:
            # a change that is no rounding of the parameters
            group.update(betas=(0.9, 1 - 1e-14), eps=0.0, lr=1e9 * group["lr"])
        for p, g in zip(fresh, gradients, strict=True):
            p.grad = g.clone()
        copied.step()
        return sum((p * direction[names[id(old)]]).sum() for p, old in zip(fresh, parameters, strict=True)).detach()

    start, nll = after(base), reference.token_nll(model, batch)
    found = torch.zeros_like(nll)
    for b, t in response(batch).nonzero().tolist():
        own = torch.autograd.grad(nll[b, t], parameters, retain_graph=True)
        found[b, t] = after([g + share * o for g, o in zip(base, own, strict=True)]) - start
    return -found.detach() / share


def lora_plus(parameters):
    """A's and B's groups, 16 times apart as LoRA+ has them; B is (d_out, r), A is (r, d_in)."""
    b, a = ([p for p in parameters if (p.shape[1] < p.shape[0]) == is_b] for is_b in (True, False))
    assert a and b
    return torch.optim.AdamW([{"params": a}, {"params": b, "lr": 1.6e-2}], lr=1e-3, weight_decay=0.0, eps=1e-30)


@pytest.mark.parametrize("make", [lambda p: adamw(p, eps=1e-30), lora_plus], ids=["one rate", "LoRA+"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_values_are_what_adams_step_does(monkeypatch, kind, seed, make):
    monkeypatch.setattr(precondition, "_FLOOR", 1e-12)
    model, batch = lora_model("llama", seed=seed), sft_batch(kind, seed=seed)
    with norms_in_own_dtype():
        optimizer = trained(model, make)
        target, fisher, direction = given(model, seed)
        wanted = effects_of_tokens(model, optimizer, batch, direction)
        options = {"target": target, "fisher": fisher, "config": EXACT, "return_values": True}
        _, values = alphatoken_weights(model, None, batch, optimizer=optimizer, **options)
        _, plain = alphatoken_weights(model, None, batch, **options)
    counted = response(batch)
    found, wanted = values.total[counted], wanted[counted]
    assert_close(found / found.abs().max(), wanted / wanted.abs().max(), 1e-6, "values")
    assert error(plain.total[counted] / plain.total.abs().max(), wanted / wanted.abs().max()) > 1e-2  # it matters


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"amsgrad": True}], ids=["plain", "large eps", "AMSGrad"])
@pytest.mark.parametrize("estimator", ["ghost", "difference", "exact"])
@pytest.mark.parametrize("kind", ["right", "stacked"])
def test_each_estimator_takes_the_scaled_direction(kind, estimator, options):
    """The same as a target, or as the drift in the place of a target, that was scaled by hand."""
    batch = pair_batch() if kind == "stacked" else sft_batch(kind)
    model = lora_model("llama")
    optimizer = trained(model, lambda p: adamw(p, **options))
    target, fisher, total = given(model)
    config = AlphaTokenConfig(estimator=estimator, num_layers="all")
    _, values = alphatoken_weights(
        model, None, batch, target=target, fisher=fisher, config=config, optimizer=optimizer, return_values=True
    )
    parameters = dict(model.named_parameters())
    moment = "max_exp_avg_sq" if "amsgrad" in options else "exp_avg_sq"
    eps = options.get("eps", 1e-8) * (1 - 0.999**6) ** 0.5
    root = {n: optimizer.state[parameters[n]][moment].sqrt() + eps for n in target.gradients}
    floor = 0.01 * torch.cat([r.flatten() for r in root.values()]).square().mean().sqrt()
    tol = 1e-4 if estimator == "difference" else 1e-9
    drift = {n: (total[n] - g) / 1.5 for n, g in target.gradients.items()}
    alone = AlphaTokenConfig(estimator=estimator, num_layers="all", stability_weight=0)
    for direction, found in ((target.gradients, values.adaptation), (drift, values.stability)):
        scaled = Target({n: g / root[n].clamp(min=float(floor)) for n, g in direction.items()}, 1.0)
        _, wanted = alphatoken_weights(model, None, batch, target=scaled, config=alone, return_values=True)
        assert_close(found, wanted.adaptation, tol, "adaptation or stability")
    assert_close(values.total, values.adaptation + 1.5 * values.stability, 1e-6, "total")


@pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.PagedAdamW8bit, "AdamW32bit"])
def test_second_moments_of_bitsandbytes(kind):
    """Of 8-bit Adam, what its own functions give back; of either, close to torch's after the same steps."""
    kind = getattr(bitsandbytes.optim, kind) if isinstance(kind, str) else kind
    ours = lora_model("llama", dtype=torch.float32, r=16, targets=["q_proj", "up_proj", "down_proj"])
    theirs = copy.deepcopy(ours)
    one = trained(ours, lambda p: kind(p, lr=1e-4, weight_decay=0.0, min_8bit_size=64))
    other = trained(theirs, lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0))
    if "8bit" in kind.__name__:
        assert any(state["state2"].dtype == torch.uint8 for state in one.state.values())
    for model, optimizer in ((ours, one), (theirs, other)):
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        ones = {n: torch.ones_like(p) for n, p in parameters.items()}
        scale = preconditioned({"target": ones}, parameters, optimizer)["target"]
        assert set(scale) == set(parameters)
        flat = torch.cat([scale[n].flatten() for n in parameters])
        assert bool((flat > 0).all()) and bool(flat.isfinite().all())
        if model is ours:
            first = flat
    # torch keeps v without its bias correction, bitsandbytes too: the same scale for all entries.
    agreement = spearman(first, flat)
    assert agreement > (0.95 if "8bit" in kind.__name__ else 0.9999), agreement


def test_entries_that_training_has_not_reached_do_not_make_up_the_direction():
    """After one step from B = 0, A's second moments are 0."""
    model = lora_model("llama")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    optimizer = trained(model, adamw, steps=1)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    scale = preconditioned({"target": ones}, parameters, optimizer)["target"]
    of_a = torch.cat([scale[n].flatten() for n in scale if "lora_A" in n])
    of_b = torch.cat([scale[n].flatten() for n in scale if "lora_B" in n])
    assert float(of_a.max()) < 1e3 * float(of_b.median())


def test_rates_that_are_zero():
    """A group that stands still moves nothing; where all do, as before a warm-up, one scale is as good as another."""
    model = lora_model("llama")
    optimizer = trained(model, lora_plus)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}

    def scale(*rates):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return preconditioned({"target": ones}, parameters, optimizer)["target"]

    still, alike, none = scale(0.0, 1e-3), scale(1e-3, 1e-3), scale(0.0, 0.0)
    for name in parameters:
        assert torch.equal(none[name], alike[name]), name
        assert torch.equal(still[name], torch.zeros_like(ones[name]) if "lora_A" in name else alike[name]), name


def test_before_the_first_step_directions_are_as_they_were():
    model = lora_model("llama")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = {"target": {n: torch.randn_like(p) for n, p in parameters.items()}}
    found = preconditioned(parts, parameters, adamw(parameters.values()))
    for name, tensor in parts["target"].items():
        assert torch.equal(found["target"][name], tensor)


@pytest.mark.parametrize("estimator", ["ghost", "difference"])
def test_in_a_loop_masks_are_those_of_the_functional_form(estimator):
    model = nf4_lora_model("llama")
    optimizer = trained(model, adamw)
    target, fisher, _ = given(model)
    config = AlphaTokenConfig(estimator=estimator, num_layers="all")
    options = {"target": target, "fisher": fisher, "config": config, "optimizer": optimizer}
    batch = sft_batch("right")
    wanted = alphatoken_weights(model, None, batch, **options)
    alphatoken = AlphaToken(model, **options)
    with alphatoken(batch):
        model(**batch, use_cache=False).loss.backward()
    assert torch.equal(alphatoken.weights, wanted)
    options.pop("optimizer")
    assert not torch.equal(alphatoken_weights(model, None, batch, **options), wanted)


def test_the_nudge_is_measured_anew_when_the_direction_is_scaled_for_the_first_time():
    """The length of a nudge belongs to a direction: after the first step it is another one."""
    model, batch = lora_model("llama", dtype=torch.float32), sft_batch("right")
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    target, fisher, _ = given(model)
    config = AlphaTokenConfig(estimator="difference", difference_rms=1e-3)
    alphatoken = AlphaToken(model, target=target, fisher=fisher, config=config, optimizer=optimizer)
    for _ in range(3):
        with alphatoken(batch):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert alphatoken.metrics()["difference_rms"] == pytest.approx(1e-3, rel=0.3)


def test_mistakes_with_optimizers():
    model = lora_model("llama")
    sgd = trained(model, lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    target, fisher, _ = given(model)
    with pytest.raises(ValueError, match=r"SGD keeps no second moment of .*lora_A.*momentum_buffer"):
        alphatoken_weights(model, None, sft_batch(), target=target, fisher=fisher, config=EXACT, optimizer=sgd)
    adafactor = trained(model, lambda p: torch.optim.Adafactor(p))
    with pytest.raises(ValueError, match="Adafactor keeps no second moment of"):
        alphatoken_weights(model, None, sft_batch(), target=target, fisher=fisher, config=EXACT, optimizer=adafactor)
    with pytest.raises(ValueError, match="optimizer was given without a target"):
        alphatoken_weights(model, None, sft_batch(), config=EXACT, optimizer=sgd)
    with pytest.raises(ValueError, match="optimizer was given without a target"):
        AlphaToken(model, optimizer=sgd)


# -------------------------------------------------------------------------------------------- threshold at zero


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["right", "left", "packed", "stacked"])
def test_above_zero_keeps_what_has_a_positive_value(kind, seed):
    batch = pair_batch(seed=seed) if kind == "stacked" else sft_batch(kind, seed=seed)
    model = lora_model("llama", seed=seed)
    target, fisher, direction = given(model, seed)
    config = AlphaTokenConfig(estimator="exact", num_layers="all", threshold="zero")
    with norms_in_own_dtype():
        weights = alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config)
        (wanted,) = per_token(model, batch, direction)
    assert torch.equal(weights, ((wanted > 0) & response(batch)).float())
    assert 0 < float(weights.sum()) < float(response(batch).sum())


def test_unknown_thresholds():
    with pytest.raises(ValueError, match="threshold is 'half'; it must be one of 'quantile', 'zero'"):
        AlphaTokenConfig(threshold="half")


@pytest.mark.parametrize("make", [adamw, lambda ps: bitsandbytes.optim.AdamW8bit(ps, lr=1e-3)])
def test_a_parameter_without_a_gradient_so_far_has_no_second_moment_yet(make):
    """Adam makes no state for it: of an adapter on a module that the batches have not run. A stranger's is an error."""
    model = lora_model("llama", dtype=torch.float32)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (idle, idle_too), steps = list(parameters)[:2], list(parameters.values())
    optimizer = make(steps)
    for seed in (50, 51):
        sft_loss(model, sft_batch("ragged", seed=seed)).backward()
        parameters[idle].grad = parameters[idle_too].grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert parameters[idle] not in optimizer.state
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}
    found = preconditioned({"target": ones}, parameters, optimizer)["target"]
    roots = {name: 1 / tensor for name, tensor in found.items()}
    whole = torch.cat([root.flatten() for root in roots.values()])
    assert torch.equal(roots[idle], torch.full_like(roots[idle], float(whole.min())))  # the floor: as if v were 0
    assert float(whole.max()) > 10 * float(whole.min())
    with pytest.raises(ValueError, match="keeps no second moment of stranger"):
        preconditioned({"target": {}}, {**parameters, "stranger": torch.nn.Parameter(torch.ones(2))}, optimizer)
