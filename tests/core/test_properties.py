"""What holds for any batch: properties of values and masks, on batches, shares and targets that hypothesis draws."""

from __future__ import annotations

import functools
from dataclasses import replace

import cases
import pytest
import reference
import torch
from batches import response
from checks import TOL64, assert_close, assert_same_grads, grads_of
from explicit import norms_in_own_dtype
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, lora_model
from paths import given_fisher

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Path, alphatoken_weights, target_gradient

SEEDS = st.integers(0, 2**16)
VALUED = ("ghost", "difference", "exact")
ALL = (*VALUED, "path")
# A nudge is finite: it measures a derivative up to its own curvature. Positions are turned in float32 (padding).
TOLERANCES = {"ghost": 1e-5, "exact": 1e-5, "difference": 2e-3, "path": 1e-5}
drawn = settings(max_examples=8, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize("estimator", ALL)


@pytest.fixture(autouse=True, scope="module")
def _double():
    with norms_in_own_dtype():
        yield


@functools.cache
def model():
    return lora_model("llama", layers=2)


@functools.cache
def validation():
    return cases.validation()


@functools.cache
def fisher():
    return given_fisher(model())


@functools.cache
def path():
    generator = torch.Generator().manual_seed(5)
    trained = {name: p.detach() for name, p in model().named_parameters() if p.requires_grad}
    return Path({n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in trained.items()})


def directions_of(estimator, target=None):
    """The fixed theta*, or the fixed Fisher and a target."""
    return {"path": path()} if estimator == "path" else {"target": target or validation(), "fisher": fisher()}


def config_of(estimator, **changes):
    layers = {} if estimator == "path" else {"num_layers": "all", "causal_window": cases.WINDOW}
    nudge = {"difference_rms": 1e-5} if estimator == "difference" else {}
    return AlphaTokenConfig(estimator=estimator, **layers, **nudge, **changes)


def values_of(batch, estimator, target=None, **changes):
    """(weights, values)."""
    directions, config = directions_of(estimator, target), config_of(estimator, **changes)
    return alphatoken_weights(model(), None, batch, **directions, config=config, return_values=True)


@st.composite
def batches(draw, fewest=1):
    """Padded rows with a prompt each, of up to nine tokens, padded on either side."""
    sizes = draw(st.lists(st.tuples(st.integers(2, 4), st.integers(1, 5)), min_size=fewest, max_size=4))
    left, generator = draw(st.booleans()), torch.Generator().manual_seed(draw(SEEDS))
    width = max(map(sum, sizes))
    ids = torch.randint(1, VOCAB, (len(sizes), width), generator=generator)
    columns = torch.arange(width)
    mask, labels = torch.zeros_like(ids), ids.clone()
    for row, (prompt, answer) in enumerate(sizes):
        start = width - prompt - answer if left else 0
        mask[row] = (columns >= start) & (columns < start + prompt + answer)
        labels[row, (columns < start + prompt) | (mask[row] == 0)] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@every
@drawn
@given(batch=batches(), rho=st.floats(0.05, 0.95))
def test_the_gradient_is_that_of_the_masked_loss(estimator, batch, rho):
    gate = AlphaToken(model(), **directions_of(estimator), config=config_of(estimator, rho=rho))
    model().zero_grad()
    with gate(batch):
        model()(**batch, use_cache=False).loss.backward()
    count = int(response(batch).sum())
    assert 1 <= int(gate.weights.sum()) <= count
    assert not gate.weights[~response(batch)].any()
    _, expected = reference.masked_sft(model(), batch, gate.weights, count)
    assert_same_grads(grads_of(model()), expected, TOL64)


@every
@drawn
@given(batch=batches(fewest=2), data=st.data())
def test_permuting_rows_permutes_values(estimator, batch, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch["labels"])))))
    weights, values = values_of(batch, estimator)
    moved_weights, moved = values_of({key: tensor[order] for key, tensor in batch.items()}, estimator)
    assert_close(moved.total, values.total[order], TOLERANCES[estimator])
    assert estimator == "difference" or torch.equal(moved_weights, weights[order])


@every
@drawn
@given(batch=batches(), before=st.integers(0, 3), after=st.integers(0, 3))
def test_padding_changes_nothing(estimator, batch, before, after):
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {key: torch.nn.functional.pad(batch[key], (before, after), value=fill) for key, fill in fills.items()}
    weights, values = values_of(batch, estimator)
    wide_weights, wide = values_of(wider, estimator)
    own = slice(before, before + batch["labels"].shape[1])
    assert_close(wide.total[:, own], values.total, TOLERANCES[estimator])
    assert float(wide.total.abs().sum() - wide.total[:, own].abs().sum()) == pytest.approx(0, abs=1e-12)
    assert estimator == "difference" or torch.equal(wide_weights[:, own], weights)
    assert wide_weights.sum() == weights.sum()


@every
@drawn
@given(
    batch=batches(),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    scope=st.sampled_from(["batch", "sequence"]),
)
def test_a_smaller_rho_keeps_a_subset(estimator, batch, shares, scope):
    few, many = (values_of(batch, estimator, rho=rho, threshold_scope=scope)[0] for rho in sorted(shares))
    assert 1 <= few.sum() <= many.sum() <= response(batch).sum()
    assert (few <= many).all()


@pytest.mark.parametrize("estimator", VALUED)
@drawn
@given(batch=batches(), factors=st.tuples(st.floats(0.1, 3), st.floats(-3, -0.1)))
def test_values_are_linear_in_the_target(estimator, batch, factors):
    """A weighted sum of targets has the weighted sum of their values, and leaves the drift's part alone."""
    targets = [target_gradient(model(), [one], config=config_of(estimator)) for one in validation()]
    names = targets[0].gradients
    mixed = {n: sum(f * t.gradients[n] for f, t in zip(factors, targets, strict=True)) for n in names}
    first, second = (values_of(batch, estimator, target)[1] for target in targets)
    found = values_of(batch, estimator, replace(targets[0], gradients=mixed))[1]
    expected = factors[0] * first.adaptation + factors[1] * second.adaptation
    # The sum may be far smaller than its parts, whose errors it keeps.
    scale = float((factors[0] * first.adaptation).abs().max() + (factors[1] * second.adaptation).abs().max())
    assert scale > 0 and float((found.adaptation - expected).abs().max()) < TOLERANCES[estimator] * scale
    assert_close(found.stability, first.stability, TOLERANCES[estimator])
