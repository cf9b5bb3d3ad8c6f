"""theta*: against torch's Adam on a copy of the model, and what is left of the model that it was made beside."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import cases
import pytest
import reference
import torch
from batches import pair_batch, sft_batch, stacked
from checks import TOL64, TOL_NF4, assert_close, error
from explicit import norms_in_own_dtype
from models import base_model, lora_model, nf4_lora_model
from paths import at, explicit_path, given_fisher, mean_loss, names_of, walk
from peft import LoraConfig, get_peft_model
from state import differences, snapshot

from alphatoken_loss import AlphaTokenConfig, Path, make_path
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.directions import walk as walk_steps
from alphatoken_loss.losses import preference
from alphatoken_loss.models.sites import find_scored

STEPS, RATE = 5, 2e-2


def config_of(**changes):
    return AlphaTokenConfig(**{"estimator": "path", "path_steps": STEPS, "path_rate": RATE, **changes})


def made(model, batches, **changes):
    given = {"fisher": given_fisher(model, changes.get("num_layers", "all"))}
    return make_path(model, batches, config=config_of(**changes), progress=False, **given)


def farthest(found, expected, model):
    """The largest error over parameters, relative to the way that was gone."""
    own = dict(model.named_parameters())
    assert set(found) == set(expected)
    return max(error(found[n] - own[n].detach(), expected[n] - own[n].detach()) for n in expected)


TARGETS = {
    "sft": lambda seed: cases.validation(seed),
    "packed": lambda seed: [sft_batch("packed", seed=seed), sft_batch("left", seed=seed)],
    "pairs": lambda seed: [pair_batch("stacked", seed=seed), pair_batch("stacked_left", seed=seed + 1)],
    "separate": lambda seed: [pair_batch("separate", seed=seed)],
}


def sequences(batch, size):
    """A packed batch as padded ones of so many of its sequences, by hand; others as they are."""
    if "position_ids" not in batch:
        return [batch]
    starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    spans = list(zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True))
    found = []
    for first in range(0, len(spans), size):
        some = spans[first : first + size]
        longest = max(end - start for start, end in some)
        rows = {"input_ids": [], "attention_mask": [], "labels": []}
        for start, end in some:
            more = longest - (end - start)
            rows["input_ids"].append(batch["input_ids"][0, start:end].tolist() + [0] * more)
            rows["labels"].append(batch["labels"][0, start:end].tolist() + [-100] * more)
            rows["attention_mask"].append([1] * (end - start) + [0] * more)
        found.append({name: torch.tensor(lists) for name, lists in rows.items()})
    return found


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_packed_batch_as_rows(size):
    batch = sft_batch("packed")
    batch["labels"][0, 7:12] = -100  # the second sequence has no answer
    weights = torch.arange(20.0)[None]
    found = list(read_batch({**batch, "token_weights": weights}).unpacked(size))
    expected = sequences({**batch, "labels": batch["labels"]}, 1)
    rows = [(part.inputs["input_ids"][i], part.inputs["attention_mask"][i].bool(), part.labels[i],
             part.columns["token_weights"][i]) for part in found for i in range(part.size)]  # fmt: skip
    assert max(part.size for part in found) == min(size, 2) and len(rows) == 2
    for (ids, there, labels, column), whole, start in zip(rows, (expected[0], expected[2]), (0, 12), strict=True):
        length = whole["input_ids"].shape[1]
        assert there.tolist() == [True] * length + [False] * (len(there) - length)
        assert torch.equal(ids[there], whole["input_ids"][0]) and torch.equal(labels[there], whole["labels"][0])
        assert bool((labels[~there] == -100).all())
        assert torch.equal(column[there], weights[0, start : start + length])
    (same,) = read_batch(sft_batch("left")).unpacked(size)
    assert torch.equal(same.labels, sft_batch("left")["labels"])


@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_against_adam_on_a_copy(kind, seed, least, monkeypatch):
    """A step takes the next batches, until they are so many rows; batches of one row or more give the same."""
    monkeypatch.setattr("alphatoken_loss.directions.walk.STEP_ROWS", least)
    with norms_in_own_dtype():
        model, batches = lora_model("llama", seed=seed), TARGETS[kind](seed)
        found = made(model, batches).parameters
        batches = [part for batch in batches for part in sequences(batch, least)]
        expected = explicit_path(model, batches, steps=STEPS, rate=RATE, least=least)
        assert farthest(found, expected, model) < 1e-8
        for wrong in ("drift", *(["first batch"] if len(batches) > 1 else [])):
            wrongly = explicit_path(model, batches, steps=STEPS, rate=RATE, least=least, wrong=wrong)
            assert farthest(found, wrongly, model) > 1e-2


def row_by_row(batch):
    return [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(len(batch["input_ids"]))]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"path_steps": None}, {"path_rate": None}, {"path_holdout": 0.25}])
def test_how_many_rows_run_together_is_nothing_to_theta_star(changes, monkeypatch):
    """12 rows as 3 batches of 4, or one by one: of either, every fourth is held out, and the others are stepped on."""
    monkeypatch.setattr("alphatoken_loss.directions.walk.STEP_ROWS", 12)

    def one_by_one(rows):
        order = [row for i in range(0, 12, 4) for row in (i, i + 3, i + 1, i + 2)]  # of four, the second is held out
        return made(model, [rows[i] for i in order], **changes)

    with norms_in_own_dtype():
        model = lora_model("llama", layers=2)
        rows = [row for seed in range(4) for row in row_by_row(sft_batch("none", seed=seed))]
        together = [{name: torch.cat([row[name] for row in rows[i : i + 4]]) for name in rows[0]} for i in (0, 4, 8)]
        together, alone = made(model, together, **changes), one_by_one(rows)
        assert alone.steps == together.steps > 0
        assert farthest(alone.parameters, together.parameters, model) < 1e-8
        rows[-2] = {**rows[-2], "input_ids": rows[-2]["input_ids"].roll(1, 1)}
        assert farthest(alone.parameters, one_by_one(rows).parameters, model) > 1e-3, "each row counts"


@pytest.mark.parametrize("changes", [{"stability_weight": 0.0}, {"stability_weight": 6.0}, {"num_layers": 2}])
def test_settings(changes):
    with norms_in_own_dtype():
        model, batches = lora_model("llama"), cases.validation()
        options = {"weight": changes.get("stability_weight", 1.5), "k": changes.get("num_layers", "all")}
        expected = explicit_path(model, batches, steps=STEPS, rate=RATE, **options)
        assert farthest(made(model, batches, **changes).parameters, expected, model) < 1e-8


def test_pairs_by_their_settings():
    with norms_in_own_dtype():
        model, batches = lora_model("llama"), [pair_batch()]
        expected = explicit_path(model, batches, steps=STEPS, rate=RATE, beta=0.5, likelihood=0.25)
        found = made(model, batches, path_beta=0.5, path_likelihood=0.25).parameters
        assert farthest(found, expected, model) < 1e-8
        assert farthest(found, explicit_path(model, batches, steps=STEPS, rate=RATE), model) > 1e-2


def test_the_drift_is_that_from_the_adapter_ref():
    with norms_in_own_dtype():
        model, batches = lora_model("llama", others=["ref"]), cases.validation()
        expected = explicit_path(model, batches, steps=STEPS, rate=RATE)
        assert farthest(made(model, batches).parameters, expected, model) < 1e-8


def test_where_b_is_zero_the_drift_is_zero_at_first():
    """One step of it is one of the validation loss alone; the second already feels the drift."""
    with norms_in_own_dtype():
        model, batches = lora_model("llama"), cases.validation()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        one, two = (made(model, batches, path_steps=steps).parameters for steps in (1, 2))
        alone = [explicit_path(model, batches, steps=steps, rate=RATE, weight=0.0) for steps in (1, 2)]
        with_drift = explicit_path(model, batches, steps=2, rate=RATE)
        b = [name for name in one if "lora_B" in name]  # the gradient at A is zero
        assert all(error(one[n], alone[0][n]) < 1e-8 for n in b)
        assert all(error(two[n], with_drift[n]) < 1e-8 for n in b)
        assert max(error(two[n], alone[1][n]) for n in b) > 1e-3


def test_defaults():
    model = lora_model("llama", layers=1)
    one_row = {name: tensor[:1] for name, tensor in sft_batch("none").items()}
    one_pair = {name: tensor[torch.tensor([0, 3])] for name, tensor in pair_batch().items()}
    for batch, steps, rate in ((one_row, 16, 3e-3), (one_pair, 24, 1e-3)):  # nothing can be held out
        with pytest.warns(UserWarning, match=f"The target is one row.*were not tried: {steps} steps at {rate}"):
            path = made(model, [batch], path_steps=None, path_rate=None)
        assert path.steps == steps
        expected = made(model, [batch], path_steps=steps, path_rate=rate)
        assert all(torch.equal(path.parameters[n], tensor) for n, tensor in expected.parameters.items())


def test_by_arguments():
    model, batches = lora_model("llama", layers=1), cases.validation()
    path = make_path(model, batches, fisher=given_fisher(model), steps=STEPS, rate=RATE, progress=False)
    expected = made(model, batches).parameters
    assert all(torch.equal(tensor, expected[name]) for name, tensor in path.parameters.items())
    (one,) = batches[:1]
    alone = make_path(model, one, fisher=given_fisher(model), steps=2, progress=False)  # a batch by itself
    assert alone.steps == 2


@pytest.mark.parametrize("how", ["non_reentrant", "reentrant"])
def test_checkpointing(how):
    model, batches = lora_model("llama"), cases.validation()
    expected = made(model, batches).parameters
    model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    model.enable_input_require_grads()
    assert farthest(made(model, batches).parameters, expected, model) < TOL64


def test_nf4():
    model, batches = nf4_lora_model("llama"), cases.validation()
    before = snapshot(model)
    found = made(model, batches).parameters
    assert differences(before, snapshot(model)) == []
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert farthest(found, explicit_path(model, batches, steps=STEPS, rate=RATE), model) < 10 * TOL_NF4


def test_bf16_steps_are_taken_in_float32():
    """Steps of a 3000th would be lost on parameters of 8 bits."""
    model, batches = lora_model("llama", dtype=torch.bfloat16), cases.validation()
    path = made(model, batches, path_rate=1e-5)
    own = dict(model.named_parameters())
    for name, tensor in path.parameters.items():
        moved = (tensor - own[name].detach().float()).abs()
        assert tensor.dtype == torch.float32
        assert 0 < float(moved.max()) < 1.5e-5 * STEPS, name


def test_dropout_and_the_random_state_take_no_part():
    model, batches = lora_model("llama", lora_dropout=0.5), cases.validation()
    torch.manual_seed(3)
    first = made(model, batches).parameters
    torch.manual_seed(4)
    second = made(model, batches).parameters
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_trained_parameters_take_part():
    """What the path estimator scores besides LoRA: here a norm, with its Fisher and its drift."""
    model, batches = lora_model("llama", layers=1), cases.validation()
    norms = [name for name, p in model.named_parameters() if "input_layernorm" in name]
    for name, parameter in model.named_parameters():
        if name in norms:
            parameter.requires_grad_()
    with_drift, without = (
        make_path(model, batches, config=config_of(stability_weight=weight), progress=False) for weight in (50.0, 0.0)
    )
    own = dict(model.named_parameters())
    (name,) = norms
    there = [float((path.parameters[name] - own[name].detach()).norm()) for path in (with_drift, without)]
    assert 0 < there[0] < there[1]


# ------------------------------------------------------------------------------------------ early stop


def test_held_out_rows_choose_the_step():
    """No step is taken on the last rows of each batch, and theta* is where their loss was lowest."""
    with norms_in_own_dtype():
        model, batches = lora_model("llama"), [sft_batch("none", seed=1), sft_batch("none", seed=2)]
        steps = 12
        there, losses = _held_out_walk(model, batches, 0.1, steps)
        best = losses.index(min(losses))
        assert 0 < best < steps - 1, "the case must have its best step within"
        found = made(model, batches, path_holdout=0.3, path_steps=steps, path_rate=0.1).parameters
        assert farthest(found, there[best], model) < 1e-8


def _parts_of(batches, size=2):
    """Rows that steps are taken on, and the last quarter."""
    parts = slice(size), slice(size, 3)
    return [[{name: t[part] for name, t in batch.items()} for batch in batches] for part in parts]


def _held_out_walk(model, batches, rate, steps):
    """The parameters after each step on the former part, and the loss of the latter there."""
    trained, held = _parts_of(batches)
    there = list(walk(model, trained, steps=steps, rate=rate))
    with torch.no_grad():
        losses = [float(sum(mean_loss(at(model, p), [(batch, None)]) for batch in held)) for p in there]
    return there, losses


def _held_out_rows(model, batches, rate, steps):
    """After each step, the nats of each held-out row's response."""
    trained, held = _parts_of(batches)
    there = list(walk(model, trained, steps=steps, rate=rate))
    with torch.no_grad():
        return [torch.cat([reference.token_nll(at(model, p), batch).sum(1) for batch in held]) for p in there]


def _of_rows(losses):
    """Losses of two rows whose mean loss it is, alike in both."""
    return iter([torch.tensor([loss / 2, loss / 2]) for loss in losses])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_rate_and_steps_are_told_by_a_held_out_quarter_and_taken_on_all_rows(seed):
    with norms_in_own_dtype():
        model, batches = lora_model("llama", seed=seed), [sft_batch("none", seed=seed + i) for i in range(2)]
        most, rates = 6, (3e-3, 1e-3, 3e-4)
        last = {rate: _held_out_rows(model, batches, rate, most)[-1] for rate in rates}
        rate = _mildest_by_hand(last)
        found = made(model, batches, path_steps=most, path_rate=None)
        assert found.steps == most and found.rate == rate
        assert farthest(found.parameters, explicit_path(model, batches, steps=most, rate=rate), model) < 1e-8
        _, losses = _held_out_walk(model, batches, RATE, 16)
        found = made(model, batches, path_steps=None)
        assert found.steps == losses.index(min(losses)) + 1
        assert farthest(found.parameters, explicit_path(model, batches, steps=found.steps, rate=RATE), model) < 1e-8


def _mildest_by_hand(rows):
    """Of rows' nats by rate: the mildest rate no more than a standard error above the best, row by row."""
    best = min(rows, key=lambda rate: rows[rate].sum())
    for rate in sorted(rows):
        differences = [float(a - b) for a, b in zip(rows[rate], rows[best], strict=True)]
        mean = sum(differences) / len(differences)
        variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
        if sum(differences) <= (len(differences) * variance) ** 0.5:
            return rate
    raise AssertionError("the best is as good as itself")


@pytest.mark.parametrize(
    ("hot", "middle", "mild", "expected"),
    [
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], [1.2, 1.2, 1.2], 0),  # worse in each row, if by little
        ([1.0, 1.0, 1.0], [1.4, 0.9, 0.9], [1.2, 1.2, 1.2], 1),  # in one row only
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], [1.9, 0.8, 0.6], 2),  # the mildest, past one that is worse
        ([1.4, 1.4, 1.4], [1.1, 1.1, 1.1], [1.1, 1.1, 1.1], 2),
        ([1.4, 1.4, 1.4], [1.1, 1.1, 1.1], [1.3, 1.2, 1.1], 1),
        ([1.0, 1.0, 1.0], [1.4, 0.9, 0.9], [math.nan] * 3, 1),
        ([1.0], [1.1], [1.2], 0),  # one row tells nothing of how rows differ
    ],
)
def test_of_rates_that_held_out_rows_cannot_tell_apart_the_mildest_is_taken(hot, middle, mild, expected):
    """A mean difference within its standard error over rows; against the rule written out."""
    walks = [walk_steps.Walk(rate, held=[torch.tensor(rows)]) for rate, rows in enumerate((hot, middle, mild))]
    found = walk_steps.mildest(walks, to_the_end=True)
    assert found.rate == expected
    finite = {-w.rate: w.held[0] for w in walks if w.held[0].isfinite().all()}
    if len(hot) > 1:
        assert -_mildest_by_hand(finite) == expected
    assert walk_steps.mildest(walks, to_the_end=False) is found


def test_a_rate_at_which_nothing_is_finite_is_not_taken():
    model, batches = lora_model("llama", layers=1), [sft_batch("none", seed=seed) for seed in (1, 2)]
    walks = _of_rows([float("nan")] * 16 + [3.0] * 16 + [2.0] * 8 + [1.0] + [2.0] * 7 + [9.0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alphatoken_loss.directions.walk.Goal.held_out_losses", lambda self, there: next(walks))
        found = made(model, batches, path_steps=None, path_rate=None)
    assert found.steps == 9
    expected = made(model, batches, path_steps=9, path_rate=3e-4).parameters
    assert all(torch.equal(found.parameters[name], expected[name]) for name in expected)


def test_with_rows_held_out_the_rate_is_that_of_the_lowest_loss():
    model, batches = lora_model("llama", layers=1), [sft_batch("none", seed=seed) for seed in (1, 2)]
    walks = _of_rows([1.0, 5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 2.0, 3.0, 3.0, 3.0, 3.0, 9.0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("alphatoken_loss.directions.walk.Goal.held_out_losses", lambda self, there: next(walks))
        found = made(model, batches, path_steps=4, path_rate=None, path_holdout=0.3)
    assert found.steps == 1
    expected = made(model, batches, path_steps=1, path_rate=3e-3, path_holdout=0.3).parameters
    assert all(torch.equal(found.parameters[name], expected[name]) for name in expected)


def test_in_float16_it_leads_where_it_leads_in_float32():
    """Gradients of a mean over many tokens would be below what float16 holds; those of a sum are not."""
    model, batches = lora_model("llama", dtype=torch.float32), cases.validation()
    many = 2.0**14
    tokens = walk_steps._counts_of
    found = {}
    with pytest.MonkeyPatch.context() as patched:  # as if they were so many tokens
        patched.setattr(walk_steps, "_counts_of", lambda some: [int(tokens(some)[0] * many), tokens(some)[1]])
        for dtype in (torch.float32, torch.float16):
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                path = made(model, batches, stability_weight=0.0, path_steps=1, path_rate=1e-3)
            own = dict(model.named_parameters())
            found[dtype] = torch.cat([(path.parameters[n] - own[n].detach()).flatten() for n in path.parameters])
    (there, here) = found.values()
    assert float(torch.nn.functional.cosine_similarity(here, there, dim=0)) > 0.99
    assert float((here == 0).float().mean()) < 0.01


def test_in_float16_pairs_of_many_tokens_do_not_overflow():
    """Their loss is a mean over pairs: times the number of tokens it would."""
    model, batch = lora_model("llama", dtype=torch.float32), pair_batch("stacked")
    tokens, scales, sum_of = walk_steps._counts_of, [], walk_steps._sum_of
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(walk_steps, "_counts_of", lambda some: [tokens(some)[0] * 10**6, tokens(some)[1]])
        patched.setattr(walk_steps, "_sum_of", lambda losses, times: scales.append(times) or sum_of(losses, times))
        with torch.autocast("cpu", torch.float16):
            path = made(model, [batch], stability_weight=0.0, path_steps=1, path_rate=1e-3)
    assert scales == [len(batch["input_ids"]) // 2]
    assert all(bool(tensor.isfinite().all()) for tensor in path.parameters.values())


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_held_out_rows_without_a_response_token_tell_nothing_of_a_rate(kind):
    """The sum over rows of a single one is its own standard error: with empty ones beside it any rate would do."""
    model, batch = lora_model("llama", layers=1), sft_batch("none") if kind == "rows" else pair_batch("stacked")
    size = len(batch["input_ids"]) // (1 if kind == "rows" else 2)
    held, key = [size - 1], "labels" if kind == "rows" else "completion_mask"
    rows = held if kind == "rows" else [*held, size + held[0]]
    batch = {**batch, key: batch[key].clone()}
    batch[key][rows] = -100 if kind == "rows" else 0
    read = preference.with_reference(model, None, read_batch(batch))
    scored = find_scored(model, "all", "anywhere")
    goal = walk_steps.Goal(model, scored, [read], config_of(), None, None, 2 / size)
    assert len(goal.held_out_losses(dict(scored.parameters))) == 1


def test_within_autocast_its_steps_are_let_go(monkeypatch):
    """Autocast keeps what it has cast, and its casts, until the outermost context ends."""
    placed, made_there = walk_steps._placed, []

    def noted(*args, **kwargs):
        found = placed(*args, **kwargs)
        made_there.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(walk_steps, "_placed", noted)
    model, batches = lora_model("llama", dtype=torch.float32), cases.validation()
    with torch.autocast("cpu", torch.bfloat16):
        made(model, batches, stability_weight=0.0)
        gc.collect()
        assert len(made_there) > STEPS and not [each for each in made_there if each() is not None]


def test_held_out_pairs():
    with norms_in_own_dtype():
        model, batch = lora_model("llama"), pair_batch("stacked_ref")
        rows = torch.tensor([0, 1, 3, 4])
        part = {name: t[rows] if len(t) == 6 else t[:2] for name, t in batch.items()}
        found = made(model, [batch], path_holdout=0.2, path_steps=1).parameters
        assert farthest(found, explicit_path(model, [part], steps=1, rate=RATE), model) < 1e-8


def test_nothing_to_hold_out():
    model = lora_model("llama", layers=1)
    one = {name: t[:1] for name, t in sft_batch("none").items()}
    with pytest.raises(ValueError, match=r"path_holdout is 0.5.*target is one row.*path_holdout=0"):
        made(model, [one], path_holdout=0.5)


# ------------------------------------------------------------------------------------------ state and files


class Boom(Exception):
    pass


@pytest.mark.parametrize("how", ["off", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["sft", "pairs"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(kind, how, fails):
    model = lora_model("llama", lora_dropout=0.1)
    if how != "off":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        if i % 3 == 0:
            parameter.grad = torch.randn_like(parameter)
    calls = []

    def boom(module, args, output):
        calls.append(0)
        if len(calls) > 3:
            raise Boom

    hook = list(model.modules())[-1].register_forward_hook(boom) if fails else None
    before = snapshot(model)
    if fails:
        with pytest.raises(Boom):
            made(model, TARGETS[kind](0))
    else:
        made(model, TARGETS[kind](0))
    assert differences(before, snapshot(model)) == []
    if hook is not None:
        hook.remove()


def test_files(tmp_path):
    model = lora_model("llama")
    path = made(model, cases.validation())
    path.save(tmp_path / "there" / "path.safetensors")
    again = Path.load(tmp_path / "there" / "path.safetensors")
    assert (again.steps, again.base) == (path.steps, path.base)
    assert set(again.parameters) == set(path.parameters) == set(names_of(model))
    assert all(torch.equal(tensor, again.parameters[name]) for name, tensor in path.parameters.items())
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["path.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"No path at .*make_path"):
        Path.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes((tmp_path / "there" / "path.safetensors").read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Path.load(tmp_path / "cut")
    given_fisher(model).save(tmp_path / "fisher")
    with pytest.raises(ValueError, match=r"is no saved path: its format is 'alphatoken_loss.fisher"):
        Path.load(tmp_path / "fisher")


def test_apply_and_logps():
    model, batch = lora_model("llama"), sft_batch("ragged")
    path = made(model, cases.validation())
    with torch.no_grad():
        expected = -reference.token_nll(at(model, path.parameters), batch)
    before = snapshot(model)
    logps = path.logps(model, batch)
    assert differences(before, snapshot(model)) == []
    assert_close(logps, expected, TOL64)
    pairs = pair_batch("separate")
    with torch.no_grad():
        expected = -reference.token_nll(at(model, path.parameters), stacked(pairs))
    assert_close(path.logps(model, pairs), expected, TOL64)
    path.apply(model)
    for name, tensor in path.parameters.items():
        assert torch.equal(dict(model.named_parameters())[name], tensor), name
        assert dict(model.named_parameters())[name].grad is None
    with pytest.raises(ValueError, match=r"no parameter base_model.* of shape .*make_path"):
        path.apply(base_model("llama"))


def test_of_another_adapter():
    model = lora_model("llama")
    model.add_adapter("star", model.peft_config["default"])
    own = dict(model.named_parameters())
    found = Path.of_adapter(model, "star").parameters
    assert set(found) == set(names_of(model))
    for name, tensor in found.items():
        assert torch.equal(tensor, own[name.replace(".default.", ".star.")]), name
    base = base_model("llama")  # whose modules are called "model" too
    named = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="model")
    named.add_adapter("star", named.peft_config["model"])
    named.set_adapter("model")
    own = dict(named.named_parameters())
    for name, tensor in Path.of_adapter(named, "star").parameters.items():
        head, _, end = name.rpartition(".model.")
        assert torch.equal(tensor, own[f"{head}.star.{end}"]), name
    for name in ("default", "moon"):
        with pytest.raises(
            ValueError, match=rf"path is the adapter '{name}'; the model's adapters are .*default.*star"
        ):
            Path.of_adapter(model, name)
    for changes, message in (
        ({"lora_alpha": 32}, r"scales what the adapter 'default' adds by .* and what 'star' adds by .*lora_alpha"),
        ({"use_dora": True}, r"path's adapter 'star' has .*lora_magnitude_vector.*, which 'default' in training has"),
    ):
        model = lora_model("llama", layers=1)
        model.add_adapter("star", dataclasses.replace(model.peft_config["default"], **changes))
        with pytest.raises(ValueError, match=message):
            Path.of_adapter(model, "star")
    ranked = lora_model("llama", others=["other"])  # of another rank
    with pytest.raises(ValueError, match=r"The path has a tensor of shape .* for the scored parameter"):
        Path.of_adapter(ranked, "other")


# ------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be():
    model = lora_model("llama", layers=1)
    none = sft_batch("none")
    none = {**none, "labels": torch.full_like(none["labels"], -100)}
    for batches in ([], [none]):
        with pytest.raises(ValueError, match="no response token"):
            made(model, batches)
    with pytest.raises(ValueError, match=r"SFT batches and preference pairs.*one kind"):
        made(model, [sft_batch("none"), pair_batch()])
    with pytest.raises(FloatingPointError, match=r"theta\* is not finite after 5 steps at a rate of .*path_rate"):
        made(model, cases.validation(), path_rate=1e300)
    with pytest.raises(FloatingPointError, match=r"theta\* is not finite after 5 steps at a rate of .*path_rate"):
        made(model, [sft_batch("none")], path_rate=1e300, path_holdout=0.5)
    for changes, message in (({"steps": 0}, "path_steps is 0"), ({"rate": -1.0}, "path_rate is -1.0")):
        with pytest.raises(ValueError, match=message):
            make_path(model, cases.validation(), fisher=given_fisher(model), **changes)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        made(model, cases.validation())


def test_a_path_that_does_not_help_rows_it_was_not_made_of(monkeypatch):
    model, batches = lora_model("llama"), [sft_batch("none", seed=100), sft_batch("ragged", seed=200)]
    taken = walk_steps.Goal.held_out_losses
    worse = lambda goal, there: taken(goal, there) + float(there is not goal.scored.parameters)  # noqa: E731
    monkeypatch.setattr(walk_steps.Goal, "held_out_losses", worse)
    with pytest.warns(UserWarning, match=r"theta\* does not lower the loss of target rows") as told:
        make_path(model, batches, config=AlphaTokenConfig(estimator="path", stability_weight=0.0, path_steps=2))
    assert [warning.filename for warning in told] == [__file__]
    better = lambda goal, there: taken(goal, there) - float(there is not goal.scored.parameters)  # noqa: E731
    monkeypatch.setattr(walk_steps.Goal, "held_out_losses", better)
    make_path(model, batches, config=AlphaTokenConfig(estimator="path", stability_weight=0.0, path_steps=2))


@pytest.mark.filterwarnings("ignore:theta")
def test_a_trial_keeps_no_tensors_and_pairs_meet_their_reference_once(monkeypatch):
    walks, walk, asked = [], walk_steps.Goal.walk, []
    monkeypatch.setattr(walk_steps.Goal, "walk", lambda *args, **kw: walks.append(walk(*args, **kw)) or walks[-1])
    real = preference.reference_logps
    monkeypatch.setattr(preference, "reference_logps", lambda *args: asked.append(args[-1].size) or real(*args))
    model, batches = lora_model("llama", layers=2), [pair_batch("stacked"), pair_batch("stacked_left")]
    found = made(model, batches, path_steps=2, path_rate=None)
    assert len(walks) == 4 and [bool(w.end) for w in walks] == [False] * 3 + [True]
    assert not any(w.lowest for w in walks[:3]) and [len(w.losses) for w in walks] == [2, 2, 2, 0]
    assert all(torch.equal(tensor, walks[-1].end[name]) for name, tensor in found.parameters.items())
    assert asked == [len(stacked(batch)["labels"]) // 2 for batch in batches]
