"""What theta* gains in training rows and in clean ones, against explicit sums; and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from batches import pair_batch, response, sft_batch
from explicit import norms_in_own_dtype
from models import lora_model, nf4_lora_model
from scipy.stats import t
from state import differences, snapshot

from alphatoken_loss import AlphaTokenConfig, SharedGain, make_path, shared_gain
from alphatoken_loss.tools import gain

CONFIG = AlphaTokenConfig(estimator="path", path_steps=4, path_rate=2e-2)


def logps(model, batch):
    """`(B, T - 1)` log-probabilities of the labels, by the definition."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits.double().log_softmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    return found.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)


def mean_gain(model, path, batches):
    """The mean over response tokens, with theta* written into the model and taken out again."""
    before = [logps(model, batch) for batch in batches]
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in path.parameters}
    path.apply(model)
    after = [logps(model, batch) for batch in batches]
    with torch.no_grad():
        for name, tensor in own.items():
            model.get_parameter(name).copy_(tensor)
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    return sum(float((a - b).sum()) for a, b in zip(after, before, strict=True)) / count


def part(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def labelled(batch, row):
    return bool((batch["labels"][row, 1:] != -100).any())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
def test_gains_are_means_over_response_tokens(kind, seed):
    """Of every fourth clean row, at the theta* of the others, four times; and of training rows at all four."""
    with norms_in_own_dtype():
        model = lora_model("llama", seed=seed)
        target = [sft_batch("right", seed=seed), sft_batch("left", seed=seed + 10)]
        training = [sft_batch(kind, seed=seed + 20), sft_batch("right", seed=seed + 30)]
        found = shared_gain(model, target, training, config=CONFIG, progress=False)
        config = AlphaTokenConfig(estimator="path", path_steps=4, path_rate=2e-2, stability_weight=0.0)
        leaked = make_path(model, target, config=config, progress=False)
        rows = [(batch, row) for batch in target for row in range(len(batch["input_ids"])) if labelled(batch, row)]
        gained, known, gains, tokens = 0.0, 0.0, [], 0
        for fold in range(4):
            made, held = [], []
            for batch in target:
                out = [row for number, (b, row) in enumerate(rows) if b is batch and number % 4 == fold]
                left = [row for number, (b, row) in enumerate(rows) if b is batch and number % 4 != fold]
                made += [part(batch, left)] if left else []
                held += [part(batch, out)] if out else []
            path = make_path(model, made, config=config, progress=False)
            count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in held)
            gained, tokens = gained + count * mean_gain(model, path, held), tokens + count
            known += count * mean_gain(model, leaked, held)
            gains.append(mean_gain(model, path, training))
        assert found.clean == pytest.approx(gained / tokens, rel=1e-6, abs=1e-9)
        assert found.training == pytest.approx(sum(gains) / 4, rel=1e-6, abs=1e-9)
        assert abs(known / tokens - found.clean) > 1e-3, "the rows held out have no part in theta*"
    low, high = found.interval
    if found.clean > 0:
        assert found.share == found.training / found.clean and low < high


def test_a_batch_is_a_list_of_one():
    model, target, training = lora_model("llama"), sft_batch("right"), sft_batch("left", seed=1)
    alone = shared_gain(model, target, training, config=CONFIG, progress=False)
    assert alone == shared_gain(model, [target], [training], config=CONFIG, progress=False)


def test_the_interval_is_one_over_rows():
    """Against the normal approximation of a ratio of means, for many rows of one length."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.stack([10 + torch.randn(400, generator=generator).double(), torch.full((400,), 10.0).double()], 1)
    training = torch.stack([4 + torch.randn(900, generator=generator).double(), torch.full((900,), 10.0).double()], 1)
    low, high = gain._interval(clean, training)
    error = 0.4 * math.hypot(1 / (4 * 30), 1 / (10 * 20))
    assert (low + high) / 2 == pytest.approx(0.4, abs=0.01)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    # A row counts by its tokens: long rows without gain pull the mean down.
    long = torch.tensor([[0.0, 90.0]]).double().expand(10, 2)
    low, high = gain._interval(clean, torch.cat([training[:90], long]))
    assert low < 0.2 < high < 0.32


def test_few_clean_rows_do_not_hide_that_training_rows_lose():
    """The mean of few clean rows may be 0 or below by chance, and then a ratio to it says nothing: a hundred training
    rows that lose are told from clean ones all the same, as by the interval of the difference."""
    spread = torch.tensor([-1.0, -0.5, 0.0, 0.2, 0.4, 0.6, 0.8, 1.3]).double()

    def rows(gains):
        return torch.stack([10 * gains, torch.full_like(gains, 10.0)], 1)

    clean = rows(spread)  # +0.225 +- 0.26
    low, high = gain._interval(clean, rows(torch.linspace(-1.2, -0.8, 100).double()))
    assert low == -math.inf and high < 1
    assert gain.SharedGain(0.225, -1.0, (low, high)).rho == 0.5
    # Rows that gain what clean ones do are not told from them, nor are those that may gain more.
    for mean in (0.225, 0.0):
        low, high = gain._interval(clean, rows(torch.linspace(mean - 0.1, mean + 0.1, 100).double()))
        assert low < 1 <= high, (mean, low, high)
    assert high == math.inf and gain.SharedGain(0.225, 0.0, (low, high)).rho == 1.0
    # At the edge it is the difference that decides: one is excluded where its own interval leaves 0 out.
    half = float(t.ppf(0.975, 7) * spread.std() / math.sqrt(8))
    for mean in (0.225 - 0.98 * half, 0.225 - 1.02 * half):
        training = rows(torch.full((100,), mean).double())
        assert (gain._interval(clean, training)[1] >= 1) == (0.225 - mean < half), mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_interval_is_the_ratios_that_students_t_does_not_reject(seed):
    """One ratio after the other, with scipy's t; also where there is no bound on one side, or on both."""
    generator = torch.Generator().manual_seed(seed)
    for size, shift in ((2, 1.0), (3, 3.0), (4, 0.1), (8, 1.0), (9, 0.3), (40, 0.5)):
        tokens = torch.randint(5, 30, (size + 64,), generator=generator).double()
        nats = tokens * (torch.randn(size + 64, generator=generator).double() + shift)
        nats[size:] -= 2 * shift * tokens[size:]
        both = torch.stack([nats, tokens], 1)
        clean, training = both[:size], both[size:]
        low, high = gain._interval(clean, training)
        limit = t.ppf(0.975, size - 1)

        def kept(ratio, clean=clean, training=training, limit=limit):
            means, variances = [], []
            for some in (training, clean):
                mean = some[:, 0].sum() / some[:, 1].sum()
                weights = some[:, 1] / some[:, 1].mean()
                residuals = weights * (some[:, 0] / some[:, 1] - mean)
                means.append(float(mean))
                variances.append(float(residuals.square().sum()) / (len(some) * (len(some) - 1)))
            return abs(means[0] - ratio * means[1]) <= limit * math.sqrt(variances[0] + ratio**2 * variances[1])

        ends = [end for end in (low, high) if math.isfinite(end)]
        for end in ends:
            assert kept(end * 0.99) != kept(end * 1.01), (size, low, high)
        if len(ends) == 2:
            assert kept((low + high) / 2) and not kept(low - 1e3) and not kept(high + 1e3)
        elif not ends:
            assert kept(1.0) or all(map(kept, (-1e6, 1e6))), "not told apart"
        else:
            assert kept(low + 1 if math.isfinite(low) else high - 1) and not kept(1.0)


@pytest.mark.parametrize("held", [1, 2, 3, 4, 8, 16])
def test_few_clean_rows_do_not_tell_more_than_they_can(held):
    """Rows of one kind are told from each other as often as 95 % allow, however few were held out."""
    generator, told, draws = torch.Generator().manual_seed(held), 0, 400

    def rows(count):
        return torch.stack([20 + 14 * torch.randn(count, generator=generator).double(), torch.full((count,), 20.0)], 1)

    for _ in range(draws):
        told += gain._interval(rows(held), rows(64).double())[1] < 1
    assert told <= 0.025 * draws + 3 * math.sqrt(0.025 * draws), told
    if held == 1:
        assert gain._interval(rows(1), rows(64)) == (-math.inf, math.inf)


@pytest.mark.slow
def test_clean_rows_share_all_and_noise_little():
    """A model that can tell: the clean rows count upwards, noise is of random tokens."""
    torch.manual_seed(0)
    model = lora_model("llama", dtype=torch.float32)

    def rows(noisy):
        starts = torch.randint(1, 20, (16, 1))
        ids = torch.randint(1, 40, (16, 12)) if noisy else starts + torch.arange(12)
        return {"input_ids": ids, "labels": ids.clone()}

    config = AlphaTokenConfig(estimator="path", path_steps=30, path_rate=1e-2)
    clean = [rows(False), rows(False)]
    shares = [
        shared_gain(model, clean, [rows(noisy) for _ in range(3)], config=config, progress=False).share
        for noisy in (False, True)
    ]
    assert 0.7 < shares[0] < 1.3 and shares[1] < 0.3, shares


@pytest.mark.parametrize("make", [lora_model, nf4_lora_model])
def test_nothing_is_left(make):
    model = make("llama")
    before = snapshot(model)
    shared_gain(model, [sft_batch("right")], [sft_batch("left", seed=1)], config=CONFIG, progress=False)
    assert not differences(before, snapshot(model))


def test_what_is_refused():
    model, good = lora_model("llama"), [sft_batch("right")]
    empty = [{**good[0], "labels": torch.full_like(good[0]["labels"], -100)}]
    cases = [
        (good, [pair_batch()], "batches holds preference pairs. Give their chosen answers"),
        ([pair_batch()], good, "target holds preference pairs"),
        (good, empty, "batches holds no response token"),
        (good, [], "batches holds no response token .* or no batch at all"),
        (empty, good, "target holds no response token"),
        ([part(good[0], slice(1))], good, "Fewer than two rows of the target have a response token"),
    ]
    for target, training, message in cases:
        with pytest.raises(ValueError, match=message):
            shared_gain(model, target, training, config=CONFIG, progress=False)


def test_batches_without_a_response_say_nothing():
    model, clean, rows = lora_model("llama"), [sft_batch("right")], [sft_batch("left", seed=1)]
    expected = shared_gain(model, clean, rows, config=CONFIG, progress=False)
    silent = {**rows[0], "labels": torch.full_like(rows[0]["labels"], -100)}
    more = [part(rows[0], slice(0)), silent]
    assert shared_gain(model, [*clean, *more], [*more, *rows], config=CONFIG, progress=False) == expected


def test_it_says_how_to_read_it():
    told = str(SharedGain(0.96, 0.05, (-0.1, 0.2)))
    assert "share of 0.05 (95 %: -0.10 to 0.20)" in told and "+0.960" in told
    assert told.endswith("Keep 0.53.")
    worse = SharedGain(-0.2, 0.05, (-1.0, 1.0))
    assert [SharedGain(1.0, gain, (-3, 0.49)).rho for gain in (-2.0, 0.0, 0.2, 0.4)] == [0.5, 0.5, 0.6, 0.7]
    assert [SharedGain(1.0, gain, (0.1, 0.5)).rho for gain in (0.2, 0.4)] == [1.0] * 2, "too few may lead elsewhere"
    assert [SharedGain(1.0, gain, (0.1, 1.0)).rho for gain in (0.4, 0.9, 1.4)] == [1.0] * 3, "they may be alike"
    assert worse.rho == 1.0, "what cannot tell drops nothing"
    unknown = SharedGain(1.0, 0.1, (-math.inf, math.inf))
    assert unknown.rho == 1.0 and "to tell the two apart. Give more clean rows" in str(unknown)
    assert math.isnan(worse.share) and "would say nothing. Give more clean rows" in str(worse)


def test_what_counts_is_the_response():
    batch = sft_batch("right")
    rows = gain._gains(
        model := lora_model("llama"),
        make_path(model, [batch], config=AlphaTokenConfig(estimator="path", path_steps=1, path_rate=1e-3,
                                                          stability_weight=0.0), progress=False),
        [gain.read_batch(batch)],
        gain.tqdm(disable=True),
    )  # fmt: skip
    assert rows[:, 1].sum() == response(batch).sum()
