"""Bad input: each gets an error that says what came, what is allowed, and what to do."""

from __future__ import annotations

import copy
import dataclasses

import cases
import pytest
import torch
from batches import pair_batch, response, sft_batch
from checks import grads_of
from models import VOCAB, add_lora, base_model, lora_model
from peft import IA3Config, LoHaConfig, XLoraConfig, get_peft_model

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    sft_loss,
    shared_gain,
    target_gradient,
)
from alphatoken_loss.estimators import ESTIMATORS

CONFIG = AlphaTokenConfig(num_layers=2)


def fisher_for(model, family="llama", k=2):
    return Fisher.from_diagonals(cases.fisher_tensors(model, family, k))


def weigh(model, batch=None, *, config=CONFIG, fisher=None, target=None, ref_model=None):
    return alphatoken_weights(
        model,
        ref_model,
        sft_batch() if batch is None else batch,
        target=cases.validation() if target is None else target,
        fisher=fisher,
        config=config,
    )


def gate(model, **options):
    options = {"target": cases.validation(), "config": CONFIG, **options}
    return AlphaToken(model, **options)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("rho", [0, -0.1, 1.01, 2, float("nan"), float("inf"), "half", None, True])
def test_rho(rho):
    with pytest.raises(ValueError, match=r"(?s)rho.*\(0, 1\]") as caught:
        AlphaTokenConfig(rho=rho)
    assert str(rho) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stability_weight", -1.0),
        ("stability_weight", float("nan")),
        ("num_layers", 0),
        ("num_layers", -1),
        ("num_layers", 1.5),
        ("num_layers", "some"),
        ("causal_window", -1),
        ("causal_window", 2.5),
        ("threshold_scope", "token"),
        ("estimator", "magic"),
        ("target_every", 0),
        ("fisher", "sparse"),
    ],
)
def test_config(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        AlphaTokenConfig(**{field: value})
    assert str(value) in str(caught.value)


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        CONFIG.rho = 0.3


@pytest.mark.parametrize("use", [weigh, gate, lambda m, config: target_gradient(m, [sft_batch()], config=config)])
def test_more_layers_than_blocks(use):
    with pytest.raises(ValueError, match=r"(?s)num_layers.*7.*3"):
        use(lora_model("llama"), config=AlphaTokenConfig(num_layers=7))


def test_the_default_of_three_is_all_of_a_model_of_two_blocks():
    """It is a default, not a wish; three that were asked for are refused."""
    model = lora_model("llama", layers=2)
    two, three = (AlphaTokenConfig(num_layers=layers, stability_weight=0.0) for layers in (2, None))
    assert torch.equal(weigh(model, config=three), weigh(model, config=two))
    with pytest.raises(ValueError, match=r"(?s)num_layers.*3.*2"):
        weigh(model, config=AlphaTokenConfig(num_layers=3))


# ---------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("use", [weigh, gate, lambda m: target_gradient(m, [sft_batch()], config=CONFIG)])
def test_nothing_trainable(use):
    model = base_model("llama").requires_grad_(False)
    with pytest.raises(ValueError, match=r"(?is)(adapter|lora|trainable)"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
def test_no_adapter_in_the_scored_blocks(use):
    model = lora_model("llama", layers_to_transform=[0])
    with pytest.raises(ValueError, match=r"(?is)(adapter|lora).*"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
def test_merged(use):
    model = lora_model("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"(?s)merged.*unmerge_adapter"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
def test_disabled(use):
    model = lora_model("llama")
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"(?s)disabled"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
def test_two_active_adapters(use):
    model = lora_model("llama", others=["second"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"(?s)second"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
@pytest.mark.parametrize("kind", ["ia3", "loha"])
def test_other_adapter_types(kind, use):
    if kind == "ia3":
        config = IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    else:
        config = LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_model("llama"), config)
    with pytest.raises(ValueError, match=r"(?is)(ia3|loha).*lora"):
        use(model)


@pytest.mark.parametrize("use", [weigh, gate])
def test_dora(use):
    with pytest.raises(ValueError, match=r"(?is)dora"):
        use(lora_model("llama", use_dora=True))


@pytest.mark.parametrize("use", [weigh, gate])
@pytest.mark.parametrize("estimator", ["ghost", "difference", "exact", "path"])
def test_x_lora(use, estimator, tmp_path):
    add_lora(base_model("llama")).save_pretrained(tmp_path)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"one": str(tmp_path)})
    base = base_model("llama")
    base.config.use_cache = False  # as PEFT asks
    model = get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"X-LoRA.*Use LoRA"):
        use(model, config=AlphaTokenConfig(estimator=estimator))


@pytest.mark.parametrize("module", ["lm_head", "norm"])
def test_trainable_above_the_blocks(module):
    """The gate masks rows below the final norm; what is trained above it would see unmasked gradients."""
    model = lora_model("llama", modules_to_save=[module])
    with pytest.raises(ValueError, match=module):
        with gate(model)(sft_batch()):
            pass


def test_adapter_on_the_head():
    model = lora_model("llama", targets=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        with gate(model)(sft_batch()):
            pass


# ---------------------------------------------------------------------------------------------- batches


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


USERS = {
    "weights": lambda model, batch: weigh(model, batch),
    "gate": lambda model, batch: gate(model)(batch).__enter__(),
    "sft_loss": lambda model, batch: sft_loss(model, batch),
    "target": lambda model, batch: target_gradient(model, [batch], config=CONFIG),
}


@pytest.mark.parametrize("user", USERS)
def test_neither_labels_nor_completion_mask(user):
    with pytest.raises(ValueError, match=r"(?s)labels.*completion_mask"):
        USERS[user](lora_model("llama"), without(sft_batch(), "labels"))


@pytest.mark.parametrize("estimator", ["ghost", "path"])
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("rows.jsonl", TypeError, r"target is a str\. Give validation batches .*, a Target, or None"),
        (3, TypeError, r"target is a int\. Give"),
        (["rows.jsonl"], TypeError, r"target holds a str\. Give"),
        ([], ValueError, r"target holds no batches\. Give"),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.long)}], ValueError, "A batch of the target: .*neither `labels`"),
    ],
)
def test_what_is_no_target(target, error, message, estimator):
    with pytest.raises(error, match=message):
        gate(lora_model("llama"), target=target, config=AlphaTokenConfig(estimator=estimator))


@pytest.mark.parametrize("user", USERS)
def test_no_input_ids(user):
    with pytest.raises(ValueError, match=r"(?s)input_ids"):
        USERS[user](lora_model("llama"), without(sft_batch(), "input_ids"))


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("key", ["labels", "attention_mask"])
def test_shapes_that_disagree(key, user):
    batch = sft_batch()
    batch[key] = batch[key][:, :-1]
    with pytest.raises(ValueError, match=key) as caught:
        USERS[user](lora_model("llama"), batch)
    assert "(3, 10)" in str(caught.value) and "(3, 11)" in str(caught.value)


def test_completion_mask_of_another_shape():
    batch = pair_batch()
    batch["completion_mask"] = batch["completion_mask"][:, 1:]
    with pytest.raises(ValueError, match="completion_mask"):
        weigh(lora_model("llama"), batch)


@pytest.mark.parametrize("use", [weigh, lambda m, b: dpo_loss(m, None, b), lambda m, b: gate(m)(b).__enter__()])
def test_odd_number_of_stacked_pairs(use):
    batch = {key: value[:5] for key, value in pair_batch().items()}
    with pytest.raises(ValueError, match=r"(?s)5.*(pair|even|half|chosen)"):
        use(lora_model("llama"), batch)


def test_separate_pairs_of_different_number():
    batch = pair_batch("separate")
    for key in batch:
        if key.startswith("rejected"):
            batch[key] = batch[key][:2]
    with pytest.raises(ValueError, match=r"(?s)chosen.*rejected|rejected.*chosen"):
        weigh(lora_model("llama"), batch)


def test_one_branch_only():
    batch = {key: value for key, value in pair_batch("separate").items() if key.startswith("chosen")}
    with pytest.raises(ValueError, match="rejected_input_ids"):
        weigh(lora_model("llama"), batch)


def test_reference_log_probabilities_of_another_number():
    batch = pair_batch("stacked_ref")
    batch["ref_chosen_logps"] = batch["ref_chosen_logps"][:2]
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        weigh(lora_model("llama"), batch)


def test_pairs_needed_for_a_preference_loss():
    with pytest.raises(ValueError, match=r"(?s)(pair|chosen|completion_mask)"):
        dpo_loss(lora_model("llama"), None, sft_batch())


def test_weights_of_another_shape():
    model, batch = lora_model("llama"), sft_batch()
    weights = torch.ones(2, 11)
    with pytest.raises(ValueError, match=r"(?s)weights.*2.*11"):
        sft_loss(model, batch, weights)
    with pytest.raises(ValueError, match="weights"):
        dpo_loss(model, None, pair_batch(), weights)


def test_loss_type_and_label_smoothing():
    model, batch = lora_model("llama"), pair_batch()
    with pytest.raises(ValueError, match=r"(?s)best.*sigmoid"):
        dpo_loss(model, None, batch, loss_type="best")
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(model, None, batch, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="label_smoothing is None; it must be a number"):
        dpo_loss(model, None, batch, label_smoothing=None)
    with pytest.raises(ValueError, match=r"loss_type is \['sigmoid'\]; dpo_loss knows sigmoid"):
        dpo_loss(model, None, batch, loss_type=["sigmoid"])


@pytest.mark.parametrize("kind", ["stacked", "separate"])
def test_sums_of_the_reference_are_two_tensors(kind):
    model, batch = lora_model("llama"), pair_batch(kind)
    sums = torch.zeros(len(pair_batch("separate")["chosen_input_ids"]))
    with pytest.raises(TypeError, match="ref_rejected_logps is missing; give ref_chosen_logps and ref_rejected_logps"):
        dpo_loss(model, None, {**batch, "ref_chosen_logps": sums})
    with pytest.raises(TypeError, match="ref_chosen_logps is missing"):
        dpo_loss(model, None, {**batch, "ref_rejected_logps": sums, "ref_chosen_logps": None})
    with pytest.raises(TypeError, match="ref_chosen_logps is a list"):
        dpo_loss(model, None, {**batch, "ref_chosen_logps": sums.tolist(), "ref_rejected_logps": sums})
    both = dpo_loss(model, None, {**batch, "ref_chosen_logps": sums, "ref_rejected_logps": sums})
    assert both.isfinite() and both != dpo_loss(model, None, batch)


def test_one_sequence_and_no_target():
    batch = {key: value[:1] for key, value in sft_batch("none").items()}
    with pytest.raises(ValueError, match=r"(?s)one sequence.*target"):
        alphatoken_weights(lora_model("llama"), None, batch, config=CONFIG)


def test_one_packed_sequence_and_no_target():
    batch = {key: value[:, :7] for key, value in sft_batch("packed").items()}
    with pytest.raises(ValueError, match=r"(?s)one sequence.*target"):
        alphatoken_weights(lora_model("llama"), None, batch, config=CONFIG)


def test_one_pair_and_no_target():
    batch = {key: value[[0, 3]] for key, value in pair_batch().items()}
    with pytest.raises(ValueError, match="target"):
        alphatoken_weights(lora_model("llama"), None, batch, config=CONFIG)


def test_one_answered_sequence_and_no_target():
    """Sequences without an answer give no validation gradient."""
    batch = sft_batch("none")
    batch["labels"][1:] = -100
    with pytest.raises(ValueError, match="target"):
        alphatoken_weights(lora_model("llama"), None, batch, config=CONFIG)


def test_no_targets_in_the_list():
    with pytest.raises(ValueError, match="target"):
        AlphaToken(lora_model("llama"), target=[], config=CONFIG)


# ------------------------------------------------------------------------------------------- empty responses


def empty_batch():
    batch = sft_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    return batch


def test_no_response_in_the_context():
    """A zero loss with a graph instead of NaN: zero gradients, nothing to value."""
    model = lora_model("llama")
    batch = empty_batch()
    with gate(model, fisher=fisher_for(model))(batch):
        (model(**without(batch, "labels")).logits * 0.0).sum().backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


@pytest.mark.filterwarnings("ignore:theta")  # of random rows it helps none
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_response_to_value_reports_what_any_batch_does(estimator):
    model, config = lora_model("llama"), AlphaTokenConfig(estimator=estimator, num_layers=2, path_steps=1)
    given = {"target": [sft_batch("left")], "config": config, "return_values": True}
    reports = []
    for batch in (sft_batch(), empty_batch()):
        weights, values = alphatoken_weights(model, None, batch, **given)
        reports.append({name for name, value in vars(values).items() if value is not None})
    assert reports[0] == reports[1]
    there = [value for value in vars(values).values() if value is not None]
    assert not weights.any() and not any(value.any() for value in there)
    assert len({value.data_ptr() for value in there}) == len(there), "one tensor stands for several terms"


@pytest.mark.parametrize("empty", ["sft", "dpo"])
def test_no_response_in_the_losses(empty):
    model = lora_model("llama")
    alphatoken = gate(model, fisher=fisher_for(model))
    if empty == "sft":
        loss = sft_loss(model, empty_batch(), alphatoken)
        assert float(loss.detach()) == 0.0
    else:
        batch = pair_batch()
        batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        loss = dpo_loss(model, None, batch, alphatoken)
        assert torch.isfinite(loss)
    loss.backward()
    assert all(float(grad.abs().max()) == 0 for grad in grads_of(model).values())


def test_no_response_to_weigh():
    model = lora_model("llama")
    weights = weigh(model, empty_batch(), fisher=fisher_for(model))
    assert weights.shape == empty_batch()["labels"].shape and float(weights.sum()) == 0


# -------------------------------------------------------------------------------------- target and Fisher


def test_fisher_of_another_model():
    with pytest.raises(ValueError, match="Fisher"):
        weigh(lora_model("llama"), fisher=fisher_for(lora_model("gpt2"), "gpt2"))


def test_fisher_of_fewer_blocks():
    model = lora_model("llama")
    with pytest.raises(ValueError, match=r"(?s)Fisher.*layers\.1"):
        weigh(model, fisher=fisher_for(model, k=1))


def test_fisher_of_other_shapes():
    wide = add_lora(base_model("llama", intermediate_size=48), "llama")
    with pytest.raises(ValueError, match=r"(?s)Fisher.*(48|40)"):
        weigh(lora_model("llama"), fisher=fisher_for(wide))


def test_target_of_another_model():
    target = target_gradient(lora_model("gpt2"), [sft_batch()], config=CONFIG)
    model = lora_model("llama")
    with pytest.raises(ValueError, match=r"(?i)target"):
        weigh(model, target=target, fisher=fisher_for(model))


def test_target_of_fewer_blocks():
    model = lora_model("llama")
    target = target_gradient(model, [sft_batch()], config=AlphaTokenConfig(num_layers=1))
    with pytest.raises(ValueError, match=r"(?is)target.*layers\.1"):
        weigh(model, target=target, fisher=fisher_for(model))


def test_target_of_another_rank():
    target = target_gradient(lora_model("llama", r=4), [sft_batch()], config=CONFIG)
    model = lora_model("llama", r=3)
    with pytest.raises(ValueError, match=r"(?is)target"):
        weigh(model, target=target, fisher=fisher_for(model))


@pytest.mark.parametrize("which", ["target", "fisher"])
def test_gate_rejects_them_before_the_forward(which):
    """No forward of the training batch has run when the error comes."""
    model = lora_model("llama")
    other = lora_model("llama", targets=["q_proj"])
    options = {"target": target_gradient(model, [sft_batch()], config=CONFIG), "fisher": fisher_for(model)}
    options[which] = target_gradient(other, [sft_batch()], config=CONFIG) if which == "target" else fisher_for(other)
    with pytest.raises(ValueError, match=rf"(?i){which}"):
        with gate(model, **options)(sft_batch()):
            raise AssertionError("the body must not run")


# ------------------------------------------------------------------------------------------ non-finite values


def parameter(model, ending):
    found = [p for name, p in model.named_parameters() if name.endswith(ending)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("use", ["weights", "context", "sft_loss"])
def test_non_finite_target_names_the_layer(use):
    model = lora_model("llama")
    target = target_gradient(model, [sft_batch()], config=CONFIG)
    spoiled = {name: tensor.clone() for name, tensor in target.gradients.items()}
    name = next(n for n in spoiled if "layers.2.mlp.up_proj.lora_B" in n)
    spoiled[name][0, 0] = float("nan")
    bad = dataclasses.replace(target, gradients=spoiled)
    batch = sft_batch()
    with pytest.raises((ValueError, FloatingPointError), match=r"layers\.2\.mlp\.up_proj"):
        if use == "weights":
            weigh(model, target=bad, fisher=fisher_for(model))
        elif use == "sft_loss":
            sft_loss(model, batch, gate(model, target=bad, fisher=fisher_for(model))).backward()
        else:
            with gate(model, target=bad, fisher=fisher_for(model))(batch):
                model(**batch).loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_name_a_layer(value):
    model = lora_model("llama")
    with torch.no_grad():
        parameter(model, "layers.1.mlp.down_proj.lora_B.default.weight")[0, 0] = value
    with pytest.raises((ValueError, FloatingPointError), match=r"layers\.\d"):
        weigh(model, target=target_of_twin(), fisher=fisher_for(lora_model("llama")))


def target_of_twin():
    return target_gradient(lora_model("llama"), [sft_batch()], config=CONFIG)


def test_an_overflowing_loss_is_not_hidden():
    """Whatever scales a half-precision loss looks for non-finite gradients: they must arrive, unmasked."""
    model = lora_model("llama")
    batch = sft_batch()
    with gate(model, fisher=fisher_for(model))(batch):
        (model(**batch).loss * float("inf")).backward()
    assert not all(torch.isfinite(grad).all() for grad in grads_of(model).values())


def test_non_finite_fisher_names_the_layer():
    model = lora_model("llama")
    tensors = cases.fisher_tensors(model, "llama", 2)
    name = next(n for n in tensors if n.endswith("layers.1.self_attn.o_proj"))
    tensors[name][3, 4] = float("inf")
    with pytest.raises((ValueError, FloatingPointError), match=r"layers\.1\.self_attn\.o_proj"):
        weigh(model, fisher=Fisher.from_diagonals(tensors))


# ------------------------------------------------------------------------------------------------ the context


def test_second_forward_with_grad():
    model = lora_model("llama")
    batch = sft_batch()
    with pytest.raises(RuntimeError, match=r"(?is)second.*forward"):
        with gate(model, fisher=fisher_for(model))(batch):
            model(**batch)
            model(**batch)


@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_forward_of_another_shape(cut):
    model = lora_model("llama")
    batch = sft_batch()
    other = {k: v[:2] if cut == "rows" else v[:, :6] for k, v in batch.items()}
    shapes = r"(?s)\(?2, 11.*3, 11|3, 11.*2, 11" if cut == "rows" else r"(?s)3, 6.*3, 11|3, 11.*3, 6"
    with pytest.raises(ValueError, match=shapes):
        with gate(model, fisher=fisher_for(model))(batch):
            model(**other)


def test_reentrant_checkpointing_without_input_gradients():
    """Blocks whose inputs need no gradient pass none on: there is nothing to mask, and the error says why."""
    model = lora_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for handle in getattr(model.get_base_model(), "_require_grads_hooks", []):
        handle.remove()
    batch = sft_batch()
    plain = copy.deepcopy(model)
    assert not plain(**batch).loss.requires_grad
    with pytest.raises((ValueError, RuntimeError), match=r"(?is)(enable_input_require_grads|use_reentrant)"):
        with gate(model, fisher=fisher_for(model))(batch):
            model(**batch).loss.backward()


def test_good_batches_are_what_the_bad_ones_differ_from():
    for batch in (sft_batch(), pair_batch()):
        assert int(batch["input_ids"].max()) < VOCAB
        assert int(response(batch).sum()) > 0


def test_presets():
    """method.md's facts of the paper; the estimator that trains best; fields can be changed, unknown ones not."""
    paper, best = AlphaTokenConfig.paper(), AlphaTokenConfig.best()
    assert (paper.rho, paper.stability_weight, paper.scored_layers, paper.causal_window) == (0.5, 1.5, 3, 32)
    assert (paper.estimator, paper.threshold, paper.threshold_scope, paper.fisher) == (
        "ghost", "quantile", "batch", "dense"
    )  # fmt: skip
    former = AlphaTokenConfig.best(estimator="difference")
    for preset in (paper, former):
        assert (preset.target_every, preset.target_parts, preset.target_decay) == (1, 1, None)
    assert (best.estimator, best.scored_layers) == ("path", "all")
    assert AlphaTokenConfig.paper(rho=0.3).rho == AlphaTokenConfig.best(rho=0.3).rho == 0.3
    assert AlphaTokenConfig.best(estimator="ghost").scored_layers == 3
    for preset in (AlphaTokenConfig.paper, AlphaTokenConfig.best):
        with pytest.raises(TypeError, match="lambda_"):
            preset(lambda_=1.0)
        with pytest.raises(ValueError, match="rho is 2"):
            preset(rho=2)


# ---------------------------------------------------------------------------------------------- what users mix up


def lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize("estimator", ["ghost", "exact", "difference", "path"])
def test_another_batch_of_the_same_shape_in_the_context(estimator):
    """The forward's own tokens decide; a copy of them is as good as themselves."""
    model, batch, other = lora_model("llama"), sft_batch("none", seed=0), sft_batch("none", seed=1)
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0)
    alphatoken = AlphaToken(model, target=cases.validation(), config=config)
    with pytest.raises(ValueError, match=r"ran on other input_ids.*Give the context the batch that the model runs on"):
        with alphatoken(batch):
            model(**other).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    with alphatoken({name: tensor.clone() for name, tensor in batch.items()}):
        with torch.no_grad():
            model(**other)  # as of a reference
        model(**batch).loss.backward()
    assert 0 < float(alphatoken.weights.sum()) < int(response(batch).sum())


@pytest.mark.parametrize("inner", [False, True])
def test_a_reference_that_is_the_model(inner):
    model, pairs = lora_model("llama"), pair_batch()
    itself = model.get_base_model() if inner else model
    with pytest.raises(ValueError, match=r"ref_model holds .*lora_A.* which is trained.*Pass ref_model=None"):
        dpo_loss(model, itself, pairs)
    with pytest.raises(ValueError, match=r"ref_model holds"):
        sft_loss(model, sft_batch(), kl_coef=0.1, ref_model=itself)
    with pytest.raises(ValueError, match=r"ref_model holds"):
        AlphaToken(model, itself, target=cases.validation())
    dpo_loss(model, copy.deepcopy(itself), pairs)


def test_rows_in_the_place_of_batches():
    model, batch = lora_model("llama"), sft_batch("none")
    row = {name: column[0] for name, column in lists(batch).items()}
    for given in ([row], lists(batch)):
        with pytest.raises(TypeError, match=r"A batch of the target: input_ids of the batch is a list; .*collator"):
            gate(model, target=given)
    with pytest.raises(TypeError, match=r"labels of the batch is a list"), gate(model)({**batch, "labels": [1]}):
        pass
    with pytest.raises(ValueError, match=r"no `input_ids`.*messages.*These are texts: tokenise and collate them"):
        gate(model, target=[{"messages": [{"role": "user", "content": "hello"}]}])
    for name, given in (("target", None), ("batches", 3)):
        with pytest.raises(TypeError, match=rf"{name} is a (NoneType|int)\. Give batches"):
            shared_gain(model, **{"target": [batch], "batches": [batch], name: given})
    with pytest.raises(TypeError, match=r"batches holds a list\. Give batches"):
        shared_gain(model, [batch], [[1, 2]])


def test_the_loss_of_the_other_kind():
    model = lora_model("llama")
    with pytest.raises(ValueError, match=r"holds `labels` where.*pairs is needed.*'labels'.*dpo_loss preference pairs"):
        dpo_loss(model, None, sft_batch())
    with pytest.raises(ValueError, match=r"preference pairs where.*`labels` is needed.*'completion_mask'.*sft_loss"):
        sft_loss(model, pair_batch())


def test_prompts():
    model = lora_model("llama")
    for prompts in ("a b c", sft_batch()):
        with pytest.raises(TypeError, match=r"prompts is a (str|dict); it must be a list of prompts"):
            estimate_fisher(model, prompts, progress=False)
    with pytest.raises(TypeError, match=r"A prompt is a int\. Give texts, lists of token ids"):
        estimate_fisher(model, [1, 2], progress=False)
    for prompt in (sft_batch(), {"prompt": "a b"}):
        with pytest.raises(TypeError, match=r"A prompt is a mapping with the keys \[.*generate=False"):
            estimate_fisher(model, [prompt], progress=False)


def test_theta_that_nothing_leads_to_is_missed_before_the_first_step():
    for config in (AlphaTokenConfig.best(), AlphaTokenConfig(estimator="path", path_start=True)):
        with pytest.raises(
            ValueError, match=r"needs theta\*, but there are neither target batches nor a path.*make_path"
        ):
            AlphaToken(lora_model("llama"), config=config)


def test_another_adapter_once_theta_was_made():
    model, batch = lora_model("llama"), sft_batch()
    config = AlphaTokenConfig(estimator="path", path_steps=1, stability_weight=0)
    alphatoken = AlphaToken(model, target=cases.validation(), config=config)
    sft_loss(model, batch, alphatoken).backward()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"The path has nothing for the scored parameter .*other.*make_path"):
        sft_loss(model, batch, alphatoken)


def test_what_is_no_model_and_no_state():
    with pytest.raises(TypeError, match=r"model is a builtins\.str\. Load it first"):
        AlphaToken("path/to/model")
    with pytest.raises(ValueError, match=r"The state has no 'age'\. Give what state_dict\(\)"):
        gate(lora_model("llama")).load_state_dict({"a": 1})
    other = gate(lora_model("llama"), config=AlphaTokenConfig(estimator="difference")).state_dict()
    with pytest.raises(ValueError, match=r'The state is of estimator="difference", and this one is "ghost"'):
        gate(lora_model("llama")).load_state_dict(other)


@pytest.mark.parametrize("weights", [[1.0], "weights", lora_model], ids=type)
def test_weights_of_another_kind(weights):
    model = lora_model("llama")
    for loss, batch in ((sft_loss, sft_batch()), (lambda m, b, w: dpo_loss(m, None, b, w), pair_batch())):
        with pytest.raises(TypeError, match="it must be a tensor, an AlphaToken or None"):
            loss(model, batch, weights)
