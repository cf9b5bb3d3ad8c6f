"""The Fisher: both forms, sampling, reproducibility, files, and the drift that it weighs."""

from __future__ import annotations

import copy

import cases
import pytest
import reference
import torch
from batches import response, sft_batch
from cases import compare, expected_values
from checks import TOL64, TOL_NF4, assert_close, error
from models import FAMILIES, VOCAB, add_lora, base_model, lora_model, nf4_lora_model
from words import word_tokenizer

from alphatoken_loss import AlphaTokenConfig, Fisher, Path, Target, alphatoken_weights, estimate_fisher

K = 2
DENSE = AlphaTokenConfig(num_layers=K, fisher="dense")
FACTORED = AlphaTokenConfig(num_layers=K)
GREEDY = 1e-4  # a temperature at which sampling picks the likeliest token


def layer_names(model, family="llama", k=K):
    return [layer.name for layer in reference.scored_layers(model, FAMILIES[family], k)]


def estimate(model, prompts, config=DENSE, **options):
    return estimate_fisher(model, prompts, config=config, progress=False, **options)


def single_label_batch(column=6, length=8):
    """One sequence with one response token."""
    batch = {key: value[:1, :length].clone() for key, value in sft_batch("none").items()}
    keep = batch["labels"][0, column].item()
    assert keep != -100
    batch["labels"][:] = -100
    batch["labels"][0, column] = keep
    return batch


def candidates(model, batch, column, names, ref="off"):
    """The Fisher for each token that could have been drawn: one row of a batch per token."""
    rows = {key: value.repeat(VOCAB, 1) for key, value in batch.items()}
    rows["labels"] = torch.full_like(rows["labels"], -100)
    rows["labels"][:, column] = torch.arange(VOCAB)
    work = reference.frozen_copy(model, ref)
    taps = reference.collect(work, names, lambda: reference.token_nll(work, rows).sum())
    t = column - 1
    return [
        {name: torch.outer(d[token, t] ** 2, h[token, t] ** 2) for name, (h, d) in taps.items()}
        for token in range(VOCAB)
    ]


def drawn(fisher, options, names, tol=TOL64):
    """Which of the possible Fishers this one is; exactly one may fit, in every layer."""
    fits = [
        token
        for token, option in enumerate(options)
        if all(error(fisher.diagonal(name), option[name]) < tol for name in names)
    ]
    assert len(fits) == 1, fits
    return fits[0]


PROMPTS = [[3, 17, 5, 9, 22], [8, 41], [30, 2, 2, 55, 7, 19, 4]]


# ------------------------------------------------------------------------ labels drawn by teacher forcing


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forced_fisher_is_that_of_a_drawn_label(family):
    """One response token: the Fisher is one of the vocabulary's, whichever label was drawn."""
    model = lora_model(family)
    batch = single_label_batch()
    names = layer_names(model, family)
    fisher = estimate(model, [batch], generate=False)
    assert set(fisher.names) == set(names)
    drawn(fisher, candidates(model, batch, 6, names), names)


def test_candidates_are_the_references():
    """The batched form above against the loop over tokens."""
    model = lora_model("llama")
    batch = single_label_batch()
    names = layer_names(model)
    options = candidates(model, batch, 6, names)
    for token in (0, 17, VOCAB - 1):
        labels = torch.full_like(batch["labels"], -100)
        labels[0, 6] = token
        expected = reference.dense_fisher(model, {**batch, "labels": labels}, names)
        for name in names:
            assert_close(options[token][name], expected[name], TOL64, name)


def test_the_label_is_drawn_from_the_prediction():
    """Over many prompts the mean is the expectation under the reference's own distribution."""
    model = lora_model("llama")
    batch = single_label_batch(length=7)
    names = layer_names(model, k=1)[:1]
    config = AlphaTokenConfig(num_layers=1, fisher="dense")
    number = 2000
    many = {key: value.repeat(number, 1) for key, value in batch.items()}
    fisher = estimate(model, [many], config, generate=False)
    options = torch.stack([c[names[0]] for c in candidates(model, batch, 6, names)])
    work = reference.frozen_copy(model, "off")
    with torch.no_grad():
        chances = reference.logits_of(work, batch)[0, 5].softmax(-1)
    mean = torch.einsum("v,voi->oi", chances, options)
    deviation = (torch.einsum("v,voi->oi", chances, options**2) - mean**2).clamp(min=0).sqrt()
    away = (fisher.diagonal(names[0]).double() - mean).abs() / (deviation / number**0.5)
    assert float(away.max()) < 6.0
    label = int(batch["labels"][0, 6])
    given = options[label]
    assert error(given, mean) > 0.1, "the given label's own Fisher is no different: no power"


def test_seeds_draw_labels():
    model = lora_model("llama")
    batch = single_label_batch()
    names = layer_names(model)
    options = candidates(model, batch, 6, names)
    labels = {drawn(estimate(model, [batch], generate=False, seed=seed), options, names) for seed in range(6)}
    assert len(labels) > 2


def test_two_tokens_and_two_batches():
    """Tokens of a sequence add up; sequences are averaged."""
    model = lora_model("llama")
    names = layer_names(model, k=1)
    first, second = single_label_batch(6), single_label_batch(4, length=5)
    options = [candidates(model, first, 6, names), candidates(model, second, 4, names)]
    config = AlphaTokenConfig(num_layers=1, fisher="dense")
    fisher = estimate(model, [first, second], config, generate=False)
    name = names[0]
    stacks = [torch.stack([c[name] for c in option]) for option in options]
    pairs = (stacks[0][:, None] + stacks[1][None]) / 2
    wrong = (pairs - fisher.diagonal(name)).abs().amax((2, 3)) / fisher.diagonal(name).max()
    assert int((wrong < TOL64).sum()) == 1
    i, j = divmod(int(wrong.argmin()), VOCAB)
    for other in names:
        assert_close(fisher.diagonal(other), (options[0][i][other] + options[1][j][other]) / 2, TOL64, other)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_nf4(family):
    model = nf4_lora_model(family)
    batch = single_label_batch()
    names = layer_names(model, family)
    fisher = estimate(model, [batch], generate=False)
    drawn(fisher, candidates(model, batch, 6, names), names, TOL_NF4)


def test_reference_adapter():
    model = lora_model("llama", others=["ref"])
    batch = single_label_batch()
    names = layer_names(model)
    fisher = estimate(model, [batch], generate=False)
    drawn(fisher, candidates(model, batch, 6, names, "ref"), names)


def test_separate_reference_model():
    """Its own weights count, under the policy's module names."""
    base = base_model("llama", seed=4)
    ref_model = copy.deepcopy(base)
    with torch.no_grad():
        ref_model.lm_head.weight.mul_(1.2)
    model = add_lora(base, "llama", seed=4)
    names = layer_names(model)
    batch = single_label_batch()
    fisher = estimate(model, [batch], generate=False, ref_model=ref_model)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.get_base_model().lm_head.weight.mul_(1.2)
    assert set(fisher.names) == set(names)
    drawn(fisher, candidates(moved, batch, 6, names), names)


# ------------------------------------------------------------------------------------ sampled completions


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt_neox", "phi3"])
def test_completions(family):
    """Prompts of three lengths together: each completion's tokens, as if it had been alone."""
    model = lora_model(family)
    names = layer_names(model, family)
    fisher = estimate(model, PROMPTS, max_new_tokens=4, temperature=GREEDY)
    expected = reference.completions_fisher(model, PROMPTS, 4, names)
    for name in names:
        assert_close(fisher.diagonal(name), expected[name], TOL64, name)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_size_changes_nothing(batch_size):
    model = lora_model("llama")
    names = layer_names(model)
    fisher = estimate(model, PROMPTS, max_new_tokens=3, temperature=GREEDY, batch_size=batch_size)
    expected = reference.completions_fisher(model, PROMPTS, 3, names)
    for name in names:
        assert_close(fisher.diagonal(name), expected[name], TOL64, name)


def test_completions_come_from_the_reference_adapter():
    model = lora_model("llama", others=["ref"])
    names = layer_names(model)
    fisher = estimate(model, PROMPTS, max_new_tokens=3, temperature=GREEDY)
    expected = reference.completions_fisher(model, PROMPTS, 3, names, ref="ref")
    off = reference.completions_fisher(model, PROMPTS, 3, names, ref="off")
    assert error(off[names[0]], expected[names[0]]) > 1e-2
    for name in names:
        assert_close(fisher.diagonal(name), expected[name], TOL64, name)


def test_one_sampled_token_is_one_of_the_vocabulary():
    model = lora_model("llama")
    names = layer_names(model)
    prompt = PROMPTS[0]
    ids = torch.tensor([[*prompt, 0]])
    options = candidates(model, {"input_ids": ids, "labels": ids}, len(prompt), names)
    tokens = {drawn(estimate(model, [prompt], max_new_tokens=1, seed=seed), options, names) for seed in range(6)}
    assert len(tokens) > 2


def test_prompts_are_cut_to_their_end():
    model = lora_model("llama")
    names = layer_names(model)
    fisher = estimate(model, PROMPTS, max_new_tokens=2, temperature=GREEDY, max_prompt_length=3)
    expected = reference.completions_fisher(model, [prompt[-3:] for prompt in PROMPTS], 2, names)
    for name in names:
        assert_close(fisher.diagonal(name), expected[name], TOL64, name)


def test_text_prompts_and_the_end_of_sequence():
    """Completions end with the tokenizer's end of sequence, which is itself a sampled token."""
    model = lora_model("llama")
    names = layer_names(model)
    tokenizer = word_tokenizer()
    texts = ["a b c", "k", "x y z d e"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    stop = reference.greedy(model, prompts[0], 2)[-1]
    assert stop not in reference.greedy(model, prompts[1], 5)[len(prompts[1]) :][:1]
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(stop) or "<eos>"})
    if tokenizer.eos_token_id != stop:
        model.generation_config.eos_token_id = stop
        tokenizer.eos_token = None
    fisher = estimate(model, texts, tokenizer=tokenizer, max_new_tokens=5, temperature=GREEDY)
    eos = stop if tokenizer.eos_token is None else tokenizer.eos_token_id
    expected = reference.completions_fisher(model, prompts, 5, names, eos=eos)
    endless = reference.completions_fisher(model, prompts, 5, names)
    assert error(endless[names[0]], expected[names[0]]) > 1e-3
    for name in names:
        assert_close(fisher.diagonal(name), expected[name], TOL64, name)


# ------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("generate", [True, False])
def test_factored_form_has_the_dense_marginals(generate):
    """Row sums, column sums and total; and between them the rank-one form."""
    model = lora_model("llama")
    prompts = PROMPTS if generate else [sft_batch("right"), sft_batch("packed")]
    options = dict(generate=generate, max_new_tokens=5, seed=3)
    dense, factored = (estimate(model, prompts, config, **options) for config in (DENSE, FACTORED))
    assert set(dense.names) == set(factored.names) == set(layer_names(model))
    for name in dense.names:
        full, form = dense.diagonal(name), factored.diagonal(name)
        assert full.shape == form.shape
        assert_close(form.sum(0), full.sum(0), TOL64, name)
        assert_close(form.sum(1), full.sum(1), TOL64, name)
        assert_close(form, reference.factored(full.double()), TOL64, name)
        assert error(form, full) > 1e-3, "the dense form is of rank one already: no power"


@pytest.mark.parametrize("kind", ["right", "packed"])
@pytest.mark.parametrize("reference_is", ["base", "ref"])
def test_drift_under_the_factored_form(reference_is, kind):
    """Values from the factored form are those of the diagonal it stands for, also with a second adapter."""
    model = lora_model("llama", others=["ref"] if reference_is == "ref" else [])
    batch = sft_batch(kind)
    config = AlphaTokenConfig(num_layers=K, causal_window=cases.WINDOW)
    tensors = cases.fisher_tensors(model, "llama", K)
    fisher = Fisher.from_diagonals(tensors).factored()
    _, values = alphatoken_weights(
        model, None, batch, target=cases.validation(), fisher=fisher, config=config, return_values=True
    )
    stands_for = {name: reference.factored(tensor) for name, tensor in tensors.items()}
    for name in stands_for:
        assert_close(fisher.diagonal(name), stands_for[name], TOL64, name)
    compare(values, expected_values(model, "llama", batch, fisher=stands_for), batch, TOL64)


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("reference_is", ["base", "ref"])
def test_drift_values_sum_to_the_quadratics_gradient(form, reference_is):
    """With a label everywhere: sum of direct drift = <loss gradient, gradient of 0.5 * sum(F * dW^2)>."""
    model = lora_model("llama", others=["ref"] if reference_is == "ref" else [])
    batch = sft_batch("full")
    layers = reference.scored_layers(model, FAMILIES["llama"], K)
    ref_layers = reference.scored_layers(model, FAMILIES["llama"], K, "ref") if reference_is == "ref" else None
    tensors = cases.fisher_tensors(model, "llama", K)
    fisher = Fisher.from_diagonals(tensors)
    fisher = fisher.factored() if form == "factored" else fisher
    config = AlphaTokenConfig(num_layers=K, causal_window=0)
    _, values = alphatoken_weights(
        model, None, batch, target=cases.validation(), fisher=fisher, config=config, return_values=True
    )
    work = reference.frozen_copy(model)
    grads = reference.gradients(work, reference.token_nll(work, batch).sum())
    expected = torch.zeros((), dtype=torch.float64)
    for i, layer in enumerate(layers):
        a, b = (w.clone().requires_grad_() for w in reference.weights_of(model, layer))
        dw = layer.scale * b @ a
        if ref_layers is not None:
            other_a, other_b = reference.weights_of(model, ref_layers[i])
            dw = dw - ref_layers[i].scale * other_b @ other_a
        diagonal = tensors[layer.name]
        diagonal = reference.factored(diagonal) if form == "factored" else diagonal
        pulled = torch.autograd.grad(0.5 * (diagonal * dw**2).sum(), [a, b])
        expected = expected + (grads[layer.a] * pulled[0]).sum() + (grads[layer.b] * pulled[1]).sum()
    assert_close(values.direct_drift.sum(), expected, TOL64)


def test_without_a_fisher_it_is_drawn_on_the_batch():
    """One sequence, one token: the drift is that of one of the vocabulary's factored Fishers."""
    model = lora_model("llama")
    batch = single_label_batch()
    names = layer_names(model, k=1)
    config = AlphaTokenConfig(num_layers=1, causal_window=0)
    _, values = alphatoken_weights(model, None, batch, target=cases.validation(), config=config, return_values=True)
    layers = reference.scored_layers(model, FAMILIES["llama"], 1)
    work = reference.frozen_copy(model)
    taps = reference.collect(work, names, lambda: reference.token_nll(work, batch).sum())
    sites = reference.lora_sites(model, layers, taps)
    fits = 0
    for option in candidates(model, batch, 6, names):
        drift = reference.drift_gradient(model, layers, {name: reference.factored(option[name]) for name in names})
        value = sum(torch.einsum("o,oi,i->", s.d[0, 5], drift[s.name], s.h[0, 5]) for s in sites)
        fits += error(values.direct_drift[0, 6], value) < TOL64
    assert fits == 1
    assert int(response(batch).sum()) == 1


# ------------------------------------------------------------------------------- reproducibility, files


@pytest.mark.parametrize("generate", [True, False])
def test_reproducible_from_a_seed(generate):
    model = lora_model("llama")
    prompts = PROMPTS if generate else [sft_batch("right")]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        before = torch.get_rng_state()
        results.append(estimate(model, prompts, max_new_tokens=5, generate=generate, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    for name in results[0].names:
        assert torch.equal(results[0].diagonal(name), results[1].diagonal(name))
    assert any(error(results[2].diagonal(n), results[0].diagonal(n)) > 1e-3 for n in results[0].names)


@pytest.mark.parametrize("config", [DENSE, FACTORED], ids=["dense", "factored"])
def test_save_and_load(config, tmp_path):
    model = lora_model("llama")
    fisher = estimate(model, [sft_batch("right")], config, generate=False)
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    again = Fisher.load(path)
    assert set(again.names) == set(fisher.names)
    for name in fisher.names:
        assert torch.equal(again.diagonal(name), fisher.diagonal(name))
        assert again.diagonal(name).dtype == fisher.diagonal(name).dtype
    batch = sft_batch("left")
    options = dict(target=cases.validation(), config=config)
    first, second = (alphatoken_weights(model, None, batch, fisher=f, **options) for f in (fisher, again))
    assert torch.equal(first, second)
    if config is FACTORED:
        assert path.stat().st_size < 40_000


def use(model, fisher, k=K):
    config = AlphaTokenConfig(num_layers=k)
    return alphatoken_weights(model, None, sft_batch("right"), target=cases.validation(), fisher=fisher, config=config)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "fisher.safetensors"
    estimate(lora_model("llama"), [sft_batch("right")], FACTORED, generate=False).save(path)
    return path


def test_loading_for_more_blocks_is_an_error(saved):
    with pytest.raises(ValueError, match=r"(?s)Fisher.*layers\.0"):
        use(lora_model("llama"), Fisher.load(saved), k=3)


def test_loading_for_other_adapters_is_an_error(saved, tmp_path):
    path = tmp_path / "few.safetensors"
    few = lora_model("llama", targets=["q_proj", "v_proj"])
    estimate(few, [sft_batch("right")], FACTORED, generate=False).save(path)
    with pytest.raises(ValueError, match=r"(?s)Fisher.*proj"):
        use(lora_model("llama"), Fisher.load(path))


def test_loading_for_another_model_is_an_error(saved):
    with pytest.raises(ValueError, match="Fisher"):
        use(lora_model("gpt2"), Fisher.load(saved))


def test_loading_for_another_width_is_an_error(saved):
    wider = add_lora(base_model("llama", intermediate_size=48), "llama")
    with pytest.raises(ValueError, match=r"(?s)Fisher.*48"):
        use(wider, Fisher.load(saved))


def test_loading_something_else_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Fisher.load(tmp_path / "nothing.safetensors")
    path = tmp_path / "text.safetensors"
    path.write_text("not a tensor in here")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        Fisher.load(path)


def test_unknown_module():
    fisher = Fisher.from_diagonals({"here": torch.ones(2, 3)})
    with pytest.raises(KeyError, match="elsewhere"):
        fisher.diagonal("elsewhere")


def test_a_table_of_positions_that_ends_within_the_completions():
    model = lora_model("gpt2")
    most = model.config.n_positions
    with pytest.raises(ValueError, match=rf"has {most} positions, and prompts of up to {most - 2} tokens with 4 new"):
        estimate_fisher(model, [[5] * (most - 2)], max_new_tokens=4, max_prompt_length=most)
    assert estimate_fisher(model, [[5] * (most - 2)], max_new_tokens=2, max_prompt_length=most).prompts == 1


def test_empty_prompts():
    model = lora_model("llama")
    with pytest.raises(ValueError, match="prompt"):
        estimate(model, [])
    with pytest.raises(ValueError, match="empty"):
        estimate(model, [[]], max_new_tokens=2)
    with pytest.raises(ValueError, match="tokenizer"):
        estimate(model, ["words"], max_new_tokens=2)


def test_progress_can_be_seen_and_silenced(capfd):
    model = lora_model("llama")
    estimate_fisher(model, PROMPTS, config=FACTORED, max_new_tokens=1, progress=False)
    quiet = capfd.readouterr()
    estimate_fisher(model, PROMPTS, config=FACTORED, max_new_tokens=1, progress=True)
    loud = capfd.readouterr()
    assert "%" not in quiet.err + quiet.out
    assert "%" in loud.err + loud.out


def test_to_another_device():
    factors = {"one": (torch.rand(3), torch.rand(4)), "two": (torch.rand(3, 4),)}
    fisher = Fisher(factors, 7, (1.0,), {"norm": (torch.rand(3), torch.rand(3))})
    assert fisher.to(torch.device("cpu")) is fisher
    moved = fisher.to(torch.device("meta"))
    assert all(tensor.is_meta for part in (moved.factors, moved.others) for ts in part.values() for tensor in ts)
    assert (list(moved.factors), list(moved.others)) == (["one", "two"], ["norm"])
    assert (moved.prompts, moved.base) == (7, (1.0,))


def test_shown_in_a_line_without_its_tensors():
    diagonals = {"a": torch.ones(3, 2), "b": torch.ones(2, 2)}
    dense = Fisher.from_diagonals(diagonals, prompts=7)
    assert repr(dense) == "<Fisher, dense: 2 modules, from 7 prompts>"
    others = Fisher(dense.factored().factors, 7, others={"norm.weight": (torch.ones(2), torch.ones(2))})
    assert repr(others) == "<Fisher, factored: 2 modules, 1 other parameters, from 7 prompts>"
    assert repr(Target({"a": torch.ones(3, 2)}, 12)) == "<Target: 1 parameters, from 12 tokens>"
    assert repr(Path({"a": torch.ones(3, 2)}, 16)) == "<Path: 1 parameters, 16 steps from its start>"
