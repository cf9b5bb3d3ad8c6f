"""Two processes: target and Fisher are averaged over them; the gate works under DistributedDataParallel."""

from __future__ import annotations

import math

import cases
import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import response, sft_batch
from cases import expected_values
from checks import TOL64, assert_close
from explicit import per_token
from models import FAMILIES, lora_model
from paths import at, explicit_path, explicit_values, given_fisher
from torch.nn.parallel import DistributedDataParallel

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    estimate_fisher,
    make_path,
    sft_loss,
    shared_gain,
    target_gradient,
)

CONFIG = AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW, fisher="dense")
PROMPTS = [[3, 17, 5], [9, 22, 8]]


def validation_of(rank):
    """As many tokens on either process, so that every way of averaging is the same."""
    return [sft_batch("none", seed=50 + rank)]


def gain_rows(rank, one=False):
    """Target batch and training batch; the latter of one process has more rows. Of the target four, so that each fold
    has one of each process. With `one`, that process has a single row of the target."""
    target, another = (sft_batch("none", seed=first + rank) for first in (50, 70))
    more = sft_batch("left", seed=80)
    target = {name: torch.cat([tensor, another[name][:1]]) for name, tensor in target.items()}
    if one and rank:
        target = {name: tensor[:1] for name, tensor in target.items()}
    return target, more if rank else {name: tensor[:1] for name, tensor in more.items()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = lora_model("llama")
        target = target_gradient(model, validation_of(rank), config=CONFIG)
        fisher = estimate_fisher(
            model, [PROMPTS[rank]], config=CONFIG, max_new_tokens=2, temperature=1e-4, progress=False
        )
        given = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2))
        wrapped = DistributedDataParallel(model)
        gate = AlphaToken(wrapped, target=validation_of(rank), fisher=given, config=CONFIG)
        batch = sft_batch("right", seed=60 + rank)
        with gate(batch):
            wrapped(**batch).loss.backward()
        results = {
            "target": dict(target.gradients),
            "fisher": {name: fisher.diagonal(name) for name in fisher.names},
            "grads": {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad},
        }
        for estimator in ("difference", "exact"):
            config = AlphaTokenConfig(num_layers=2, estimator=estimator, difference_rms=1e-3)
            gate = AlphaToken(wrapped, target=validation_of(rank), fisher=given, config=config)
            with gate(batch):
                loss = wrapped(**batch).loss
            loss.backward()
            results[estimator] = gate.values.total * response(batch).sum()
        along = AlphaTokenConfig(estimator="path", path_steps=4, path_rate=1e-2, path_holdout=0.3)
        path = make_path(wrapped, validation_of(rank), fisher=given_fisher(model), config=along, progress=False)
        results["path"] = dict(path.parameters)
        along = AlphaTokenConfig(estimator="path", path_steps=2, path_rate=1e-2)
        gain = shared_gain(wrapped, *gain_rows(rank), config=along, progress=False)
        results["gain"] = (gain.clean, gain.training, *gain.interval)
        few = shared_gain(wrapped, *gain_rows(rank, one=True), config=along, progress=False)
        results["few"] = (few.clean, few.training, *few.interval)
        batch = sft_batch("right", seed=60 + rank)
        gate = AlphaToken(wrapped, path=path, config=along)
        with gate(batch):
            loss = wrapped(**batch).loss
        loss.backward()
        results["along"] = gate.values.total
        # Without a target, and a process whose first batch has no response: the Fisher is still that of both.
        gate, batch = AlphaToken(wrapped, config=CONFIG), sft_batch("right", seed=60)
        if rank:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        wrapped.zero_grad()
        sft_loss(wrapped, batch, gate).backward()
        for name, some in (("others", None), ("target", validation_of(rank))):
            results[f"weights by {name}"] = alphatoken_weights(wrapped, None, batch, target=some, config=CONFIG)
        results["empty"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        # Steps after the first: a forward of the library's own must not look like a training step to DDP.
        for estimator in ("ghost", "difference", "exact"):
            every = AlphaTokenConfig(num_layers=2, target_every=1, estimator=estimator)
            gate = AlphaToken(wrapped, target=validation_of(rank), config=every)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                batch = sft_batch("right", seed=70 + 2 * step + rank)
                with gate(batch):
                    wrapped(**batch).loss.backward()
                optimizer.step()
        results["stepped"] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")  # spares the imports
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_the_target_is_averaged(results):
    model = lora_model("llama")
    batches = [batch for rank in range(2) for batch in validation_of(rank)]
    expected = reference.target_gradient(model, batches, cases.factor_names(model, "llama", 2))
    for result in results:
        assert set(result["target"]) == set(expected)
        for name, tensor in expected.items():
            assert_close(result["target"][name], tensor, TOL64, name)


def test_one_clean_row_in_a_process_is_enough_if_others_have_more(results):
    first, second = (result["few"] for result in results)
    assert first == second and first != results[0]["gain"] and all(map(math.isfinite, first[:2]))


def test_the_fisher_is_averaged(results):
    model = lora_model("llama")
    names = [layer.name for layer in reference.scored_layers(model, FAMILIES["llama"], 2)]
    expected = reference.completions_fisher(model, PROMPTS, 2, names)
    for result in results:
        for name in names:
            assert_close(result["fisher"][name], expected[name], TOL64, name)


def test_gradients_are_those_of_each_ranks_own_mask(results):
    model = lora_model("llama")
    batches = [batch for rank in range(2) for batch in validation_of(rank)]
    target = reference.target_gradient(model, batches, cases.factor_names(model, "llama", 2))
    total = {}
    for rank in range(2):
        batch = sft_batch("right", seed=60 + rank)
        mask = reference.keep(expected_values(model, "llama", batch, target=target).total, batch, 0.5)
        _, grads = reference.masked_sft(model, batch, mask, float(response(batch).sum()))
        total = {name: total.get(name, 0.0) + grad / 2 for name, grad in grads.items()}
    for result in results:
        for name, grad in total.items():
            assert_close(result["grads"][name], grad, TOL64, name)


@pytest.mark.parametrize(("estimator", "tol"), [("difference", 2e-2), ("exact", 1e-5)])
def test_every_rank_values_its_batch_by_the_averaged_target(results, estimator, tol):
    model, names = lora_model("llama"), cases.factor_names(lora_model("llama"), "llama", 2)
    target = reference.target_gradient(model, [b for rank in range(2) for b in validation_of(rank)], names)
    layers = reference.scored_layers(model, FAMILIES["llama"], 2)
    drift = reference.drift_gradient(model, layers, cases.fisher_tensors(model, "llama", 2))
    for rank, result in enumerate(results):
        batch = sft_batch("right", seed=60 + rank)
        (wanted,) = per_token(model, batch, {n: target[n] + 1.5 * drift[n] for n in names})
        assert_close(result[estimator], wanted, tol)


def test_gains_are_of_the_rows_of_all(results):
    """Those of one process that has all batches; a step then takes as many rows as theirs together."""
    first, second = (result["gain"] for result in results)
    assert first == second
    batches = zip(*map(gain_rows, range(2)), strict=True)
    target, training = map(list, batches)
    along = AlphaTokenConfig(estimator="path", path_steps=2, path_rate=1e-2)
    alone = shared_gain(lora_model("llama"), target, training, config=along, progress=False)
    assert first[:2] == pytest.approx((alone.clean, alone.training), rel=1e-6)
    assert first[2:] == pytest.approx(alone.interval, rel=1e-6)
    own = shared_gain(lora_model("llama"), target, training[0], config=along, progress=False)
    assert own.training != pytest.approx(alone.training, rel=1e-3)


def test_every_rank_goes_the_same_path(results):
    """To the theta* of the mean over both ranks' rows; the last row of either is held out."""
    model = lora_model("llama")
    both = [validation_of(rank)[0] for rank in range(2)]
    trained = {name: torch.cat([batch[name][:2] for batch in both]) for name in both[0]}
    held = {name: torch.cat([batch[name][2:] for batch in both]) for name in both[0]}
    steps = [explicit_path(model, [trained], steps=n, rate=1e-2) for n in range(1, 5)]
    with torch.no_grad():
        losses = [float(reference.token_nll(at(model, there), held).sum()) for there in steps]
    expected = steps[losses.index(min(losses))]
    for rank, result in enumerate(results):
        for name, tensor in expected.items():
            assert torch.equal(result["path"][name], results[0]["path"][name]), name
            assert_close(result["path"][name], tensor, TOL64, name)
        assert_close(result["along"], explicit_values(model, expected, sft_batch("right", seed=60 + rank)), TOL64)


def test_a_process_without_a_response_takes_part(results):
    model = lora_model("llama")
    sft_loss(model, sft_batch("right", seed=60), AlphaToken(model, config=CONFIG)).backward()
    for name in ("weights by others", "weights by target"):
        assert results[0][name].any() and not results[1][name].any()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert float(parameter.grad.abs().max()) > 0
            for result in results:
                assert_close(result["empty"][name], parameter.grad / 2, TOL64, name)


def test_several_steps_leave_the_same_parameters_on_every_rank(results):
    for name, parameter in results[0]["stepped"].items():
        assert torch.equal(parameter, results[1]["stepped"][name]), name
