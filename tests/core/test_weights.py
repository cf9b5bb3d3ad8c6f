"""`alphatoken_weights` against the explicit computation: terms, architectures, batch forms, LoRA options."""

from __future__ import annotations

import contextlib
import copy
import warnings

import cases
import pytest
import reference
import torch
from batches import is_pairs, pair_batch, response, sft_batch
from cases import check_values, compare, expected_values, found_values, quiet
from checks import TOL64, TOL_NF4, assert_close, spearman
from models import FAMILIES, add_lora, base_model, lora_model, nf4_lora_model
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, TokenValues, alphatoken_weights, sft_loss

ALL = tuple(FAMILIES)
SFT_KINDS = ("none", "right", "left", "ragged", "full", "packed")
PAIR_KINDS = ("stacked", "stacked_left", "stacked_ref", "separate", "separate_mask")
CAUSAL = ("causal_target", "causal_drift")


def steady(family, attn="sdpa"):
    """Eager attention overflows on fully padded rows in float64; give the model a softmax that does not."""
    eager = attn == "eager" or FAMILIES[family].eager_only
    return reference.softmax_in_own_dtype() if eager else contextlib.nullcontext()


# --------------------------------------------------------------------------- architectures and batch forms


@pytest.mark.parametrize("frozen", ["layers.2.", "layers.1.self_attn.v_proj", "layers.1.mlp"])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_a_frozen_layer_of_the_adapter_adds_nothing(kind, frozen):
    """Expected values have its target gradient and its Fisher at 0."""
    model, batch = lora_model("llama"), sft_batch(kind)
    target = reference.target_gradient(model, cases.validation(), cases.factor_names(model, "llama", 2))
    target = {name: gradient * (frozen not in name) for name, gradient in target.items()}
    fisher = {name: d * (frozen not in name) for name, d in cases.fisher_tensors(model, "llama", 2).items()}
    expected = expected_values(model, "llama", batch, target=target, fisher=fisher)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    _, values = quiet_values(model, batch)
    for name in ("total", "direct_target", "causal_target", "direct_drift", "causal_drift"):
        assert_close(getattr(values, name), getattr(expected, name), TOL64, name)
    gate = AlphaToken(model, config=AlphaTokenConfig(num_layers=2, causal_window=3))  # its Fisher of the batch
    sft_loss(model, batch, gate).backward()
    assert 0 < float(gate.weights.sum()) < float(response(batch).sum())


def quiet_values(model, batch):
    with quiet():
        return found_values(model, "llama", batch)


@pytest.mark.parametrize("kind", SFT_KINDS)
@pytest.mark.parametrize("family", ALL)
def test_sft_values(family, kind):
    seed = ALL.index(family) + SFT_KINDS.index(kind)
    with steady(family):
        check_values(lora_model(family, seed=seed), family, sft_batch(kind, seed=seed), seed=seed)


@pytest.mark.parametrize("family", ALL)
def test_pair_values(family):
    seed = ALL.index(family)
    with steady(family):
        check_values(lora_model(family, seed=seed), family, pair_batch("stacked", seed=seed), seed=seed)


@pytest.mark.parametrize("kind", PAIR_KINDS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_pair_forms(family, kind):
    check_values(lora_model(family, seed=5), family, pair_batch(kind, seed=5), seed=5, beta=0.37)


@pytest.mark.parametrize("kind", ["left", "packed", "stacked"])
@pytest.mark.parametrize("family", ALL)
def test_eager_attention(family, kind):
    batch = pair_batch() if kind == "stacked" else sft_batch(kind, seed=1)
    with steady(family, "eager"):
        check_values(lora_model(family, attn="eager", seed=2), family, batch, seed=2)


@pytest.mark.parametrize("seed", range(10, 16))
def test_seeds(seed):
    check_values(lora_model("llama", seed=seed), "llama", sft_batch("right", seed=seed), seed=seed)
    check_values(lora_model("mistral", seed=seed), "mistral", pair_batch("stacked", seed=seed), seed=seed)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_float64_throughout(family):
    """These two compute in float64 from end to end, so the values must agree far below float32's rounding."""
    check_values(lora_model(family), family, sft_batch("right"), tol=1e-9)


def test_gemma2_in_float32_with_padding():
    """Soft-capping, sliding windows and left padding under the model's own eager attention."""
    model = lora_model("gemma2", dtype=torch.float32)
    batch = sft_batch("left")
    compare(found_values(model, "gemma2", batch)[1], expected_values(model, "gemma2", batch), batch, TOL_NF4)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"]
)
@pytest.mark.parametrize("kind", ["left", "packed", "stacked"])
def test_nf4(family, kind):
    batch = pair_batch() if kind == "stacked" else sft_batch(kind, seed=3)
    model = nf4_lora_model(family, seed=3)
    expected = expected_values(model, family, batch)
    weights, values = found_values(model, family, batch)
    compare(values, expected, batch, TOL_NF4)
    assert float((weights != reference.keep(expected.total, batch, 0.5).float()).sum()) == 0


@pytest.mark.parametrize("k", [1, 3, 4, "all"])
def test_number_of_blocks(k):
    check_values(lora_model("llama", layers=4), "llama", sft_batch("right"), k=k)


def test_three_blocks_by_default():
    model = lora_model("llama", layers=4)
    batch = sft_batch("right")
    expected = expected_values(model, "llama", batch, k=3, window=32)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 3))
    _, values = alphatoken_weights(model, None, batch, target=cases.validation(), fisher=fisher, return_values=True)
    compare(values, expected, batch, TOL64)


@pytest.mark.parametrize("window", [1, 2, 5, 32])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_causal_window(kind, window):
    check_values(lora_model("llama"), "llama", sft_batch(kind), window=window)


def test_no_causal_window_no_causal_terms():
    check_values(lora_model("llama"), "llama", sft_batch("right"), window=0, zero=CAUSAL)


# ----------------------------------------------------------------------------------- options of the adapter


@pytest.mark.parametrize(
    "options",
    [
        dict(r=1, alpha=0.5),
        dict(r=6, alpha=32.0, use_rslora=True),
        dict(rank_pattern={"v_proj": 5, "down_proj": 2}, alpha_pattern={"v_proj": 1.5, "q_proj": 9.0}),
        dict(use_rslora=True, rank_pattern={"o_proj": 7}, alpha_pattern={"o_proj": 2.0}),
        dict(targets=["q_proj", "v_proj"]),
        dict(targets=["v_proj"]),
        dict(layers_to_transform=[0, 2]),
    ],
    ids=["r1", "rslora", "patterns", "both", "q_and_v", "v_only", "some_layers"],
)
def test_lora_options(options):
    with quiet():  # a block without any adapter has none on its values either
        check_values(lora_model("llama", **options), "llama", sft_batch("right"))


@pytest.mark.parametrize("targets", [["q_proj", "o_proj", "down_proj"], ["gate_proj"]])
def test_no_adapter_on_the_values_warns_once(targets):
    model = lora_model("llama", targets=targets)
    batch = sft_batch("right")
    expected = expected_values(model, "llama", batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _, values = found_values(model, "llama", batch)
        found_values(model, "llama", batch)
    compare(values, expected, batch, TOL64, zero=CAUSAL)
    texts = [str(w.message) for w in caught if "causal" in str(w.message).lower()]
    assert len(texts) == 1 and "value" in texts[0].lower(), texts


def test_one_of_several_adapters_is_active():
    model = lora_model("llama", others=["second", "third"])
    model.set_adapter("second")
    check_values(model, "llama", sft_batch("right"), adapter="second")
    assert model.active_adapters == ["second"]


@pytest.mark.parametrize("kind", ["right", "stacked", "stacked_ref"])
def test_reference_adapter(kind):
    """An adapter called "ref" is the reference: of the drift, and of the pairs' log-ratios."""
    batch = sft_batch(kind) if kind == "right" else pair_batch(kind)
    check_values(lora_model("llama", others=["ref"]), "llama", batch)


@pytest.mark.parametrize("kind", ["right", "stacked"])
def test_separate_reference_model(kind):
    """With a model of its own as reference, its log-probabilities count."""
    base = base_model("llama", seed=3)
    ref_model = copy.deepcopy(base)
    with torch.no_grad():
        ref_model.lm_head.weight.mul_(1.3)
    model = add_lora(base, "llama", seed=3)
    batch = sft_batch("right") if kind == "right" else pair_batch()
    check_values(model, "llama", batch, ref_model=ref_model)


def test_dropout_makes_no_noise_in_the_values():
    model = lora_model("llama", lora_dropout=0.4).train()
    check_values(model, "llama", sft_batch("right"))


def test_train_and_eval_mode_agree():
    model = lora_model("llama", lora_dropout=0.4)
    batch = sft_batch("left")
    _, first = found_values(model.train(), "llama", batch)
    _, second = found_values(model.eval(), "llama", batch)
    for term in reference.TERMS:
        assert torch.equal(getattr(first, term), getattr(second, term)), term


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_models_have_the_same_values(family, reentrant):
    model = lora_model(family)
    batch = pair_batch()
    expected = expected_values(model, family, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(found_values(model.train(), family, batch)[1], expected, batch, TOL64)


# ------------------------------------------------------------------------------------------ other sides of it


@pytest.mark.parametrize("kind", ["right", "left", "packed", "none"])
def test_without_a_target_each_sequence_is_valued_against_the_rest(kind):
    model = lora_model("llama")
    batch = sft_batch(kind)
    names = cases.factor_names(model, "llama", 2)
    target = reference.left_out_targets(model, batch, names)
    expected = expected_values(model, "llama", batch, target=target)
    _, values = alphatoken_weights(
        model,
        None,
        batch,
        fisher=Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2)),
        config=AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW),
        return_values=True,
    )
    compare(values, expected, batch, TOL64)


def test_without_a_target_for_pairs():
    """The chosen answers of the other pairs stand in."""
    model = lora_model("llama")
    batch = pair_batch()
    names = cases.factor_names(model, "llama", 2)
    target = reference.left_out_targets(model, batch, names)
    expected = expected_values(model, "llama", batch, target=target)
    _, values = alphatoken_weights(
        model,
        None,
        batch,
        fisher=Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2)),
        config=AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW),
        return_values=True,
    )
    compare(values, expected, batch, TOL64)


@pytest.mark.parametrize("make_batch", [sft_batch, pair_batch], ids=["sft", "pairs"])
def test_three_arguments_are_enough(make_batch):
    model = lora_model("llama")
    batch = make_batch()
    weights = alphatoken_weights(model, None, batch)
    mask = response(batch)
    assert weights.shape == mask.shape and weights.dtype == torch.float32
    assert float(weights[~mask].abs().sum()) == 0
    share = float(weights.sum() / mask.sum())
    assert 0.45 <= share <= 0.65


def test_return_types():
    model = lora_model("llama")
    batch = sft_batch()
    options = dict(
        target=cases.validation(),
        fisher=Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2)),
        config=AlphaTokenConfig(num_layers=2),
    )
    alone = alphatoken_weights(model, None, batch, **options)
    weights, values = alphatoken_weights(model, None, batch, return_values=True, **options)
    assert isinstance(values, TokenValues)
    assert torch.equal(alone, weights) and set(weights.unique().tolist()) == {0.0, 1.0}
    assert_close(values.adaptation, values.direct_target + values.causal_target, TOL64)
    assert_close(values.stability, values.direct_drift + values.causal_drift, TOL64)
    assert_close(values.total, values.adaptation + 1.5 * values.stability, TOL64)


@pytest.mark.parametrize("stability_weight", [0.0, 0.3, 6.0])
def test_stability_weight(stability_weight):
    check_values(lora_model("llama"), "llama", sft_batch("right"), stability_weight=stability_weight)


def test_fresh_adapter_has_no_drift():
    """B = 0: nothing has drifted, and the gradient reaches B only."""
    model = lora_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    check_values(model, "llama", sft_batch("right"), zero=("direct_drift", "causal_drift"))


def test_target_object_and_batches_agree():
    from alphatoken_loss import target_gradient

    model = lora_model("llama")
    batch = sft_batch()
    config = AlphaTokenConfig(num_layers=2, causal_window=cases.WINDOW)
    fisher = Fisher.from_diagonals(cases.fisher_tensors(model, "llama", 2))
    target = target_gradient(model, cases.validation(), config=config)
    _, first = alphatoken_weights(model, None, batch, target=target, fisher=fisher, config=config, return_values=True)
    compare(first, expected_values(model, "llama", batch), batch, TOL64)


@pytest.mark.parametrize("kind", ["full", "packed", "right"])
def test_exact_values_split_the_same_total(kind):
    """Forward-mode values sum to <summed gradient, G + lambda V>; so do ours where every row has a label."""
    model = lora_model("llama")
    batch = sft_batch(kind)
    names = cases.factor_names(model, "llama", 2)
    layers = reference.scored_layers(model, FAMILIES["llama"], 2)
    target = reference.target_gradient(model, cases.validation(), names)
    drift = reference.drift_gradient(model, layers, cases.fisher_tensors(model, "llama", 2))
    direction = {name: target[name] + 1.5 * drift[name] for name in names}
    exact = reference.exact_values(model, batch, direction)
    work = reference.frozen_copy(model)
    grads = reference.gradients(work, reference.token_nll(work, batch).sum())
    product = sum((grads[name] * direction[name]).sum() for name in names)
    assert_close(exact.sum(), product, TOL64, "exact")
    assert float(exact[~response(batch)].abs().sum()) == 0
    _, values = found_values(model, "llama", batch, window=0)
    mask = response(batch)
    if kind == "full":
        assert_close(values.total.sum(), product, TOL64, "position-local")
    assert spearman(exact[mask], values.total[mask]) > 0.2


def test_under_no_grad():
    model = lora_model("llama")
    batch = sft_batch()
    expected = expected_values(model, "llama", batch)
    with torch.no_grad():
        _, values = found_values(model, "llama", batch)
        assert not torch.is_grad_enabled()
    compare(values, expected, batch, TOL64)


def test_the_batch_is_left_alone():
    model = lora_model("llama")
    for batch in (sft_batch("packed"), pair_batch("stacked_ref"), pair_batch("separate")):
        before = {key: value.clone() for key, value in batch.items()}
        found_values(model, "llama", batch)
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[key], before[key]) for key in before)


@pytest.mark.parametrize("padding_free", [False, True])
def test_what_trls_sft_collator_yields(padding_free):
    rows = sft_batch("right", seed=4)
    examples = []
    for ids, mask, labels in zip(rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True):
        n = int(mask.sum())
        examples.append({"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()})
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(examples)
    check_values(lora_model("llama"), "llama", batch)


def test_what_trls_preference_collator_yields():
    examples = [
        {"prompt_ids": [3, 9, 4], "chosen_ids": [5, 7, 8, 2], "rejected_ids": [11, 3]},
        {"prompt_ids": [6], "chosen_ids": [9, 1], "rejected_ids": [4, 8, 8, 20, 33]},
    ]
    batch = DataCollatorForPreference(pad_token_id=0)(examples)
    assert is_pairs(batch)
    check_values(lora_model("llama"), "llama", batch)


def test_packed_equals_padded():
    """Packing changes where a token lies and nothing about its value."""
    rows = sft_batch("right", seed=6)
    lengths = rows["attention_mask"].sum(1).tolist()
    pieces = [(b, slice(0, n)) for b, n in enumerate(lengths)]
    packed = {
        "input_ids": torch.cat([rows["input_ids"][p] for p in pieces])[None],
        "labels": torch.cat([rows["labels"][p] for p in pieces])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    model = lora_model("llama")
    _, first = found_values(model, "llama", rows)
    _, second = found_values(model, "llama", packed)
    for term in reference.TERMS:
        flat = torch.cat([getattr(first, term)[p] for p in pieces])[None]
        assert_close(getattr(second, term), flat, TOL64, term)


def test_padding_side_changes_nothing():
    """Up to the float32 in which the models compute their rotary angles."""
    right, left = sft_batch("right", seed=6), sft_batch("left", seed=6)
    model = lora_model("llama")
    values = [found_values(model, "llama", batch)[1] for batch in (right, left)]
    for term in reference.TERMS:
        flat = [getattr(v, term)[response(batch)] for v, batch in zip(values, (right, left), strict=True)]
        assert_close(flat[0], flat[1], 1e-5, term)


LONG = 600


def long_batch():
    """One long and one shorter sequence, with labels around powers of two only."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(1, 61, (2, LONG), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 530:] = 0
    labels = torch.full_like(ids, -100)
    spots = torch.tensor([2, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 300, 301, 511, 512, 513, 514, 528])
    labels[:, spots] = ids[:, spots]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_sequences(family):
    """However the attention band is cut into pieces, the pieces meet."""
    check_values(lora_model(family), family, long_batch(), window=32, k=2)


class SquareTensors(TorchDispatchMode):
    """Counts how many `(T, T)` maps the largest output of any operation holds."""

    def __init__(self):
        super().__init__()
        self.maps = 0.0
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and sum(n >= LONG - 1 for n in tensor.shape) >= 2:
                self.maps = max(self.maps, tensor.numel() / LONG**2)
        return out


def test_no_attention_map_of_all_heads():
    """The model's own mask is one `(T, T)` map; probabilities of all heads would be four."""
    model = lora_model("llama", dtype=torch.float32)
    batch = {key: value[:1] for key, value in long_batch().items()}
    with SquareTensors() as plain:
        model(**batch, use_cache=False).loss.backward()
    if plain.maps >= 2:
        pytest.skip("this version of torch makes them in a plain step")
    with SquareTensors() as seen:
        found_values(model, "llama", batch, window=32)
    assert seen.operations > 100
    assert seen.maps < 2


def test_autocast_keeps_the_ranking():
    model = lora_model("llama", dtype=torch.float32)
    batch = sft_batch("none", seed=8)
    expected = expected_values(model, "llama", batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, values = found_values(model, "llama", batch)
    mask = response(batch)
    assert torch.isfinite(values.total).all()
    assert spearman(values.total[mask].double(), expected.total[mask]) > 0.95


def test_bfloat16_model_keeps_the_ranking():
    exact = lora_model("llama", dtype=torch.float32)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    batch = sft_batch("none", seed=8)
    expected = expected_values(exact, "llama", batch)
    with quiet():
        _, values = found_values(model, "llama", batch)
    mask = response(batch)
    assert spearman(values.total[mask].double(), expected.total[mask]) > 0.9


def test_a_sequence_without_an_answer_gets_zeros():
    batch = sft_batch("ragged")
    weights, values = found_values(lora_model("llama"), "llama", batch)
    assert float(weights[3].sum()) == 0 and float(values.total[3].abs().sum()) == 0
    assert float(weights[:3].sum()) > 0
