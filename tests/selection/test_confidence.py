"""EAFT, STM, DFT, low and high loss: against their formulas written out, as functions, in the gate and in trainers."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import tuning
from batches import is_pairs, pair_batch, response, segments, sft_batch, stacked
from cases import expected_values, found_values
from checks import TOL64, assert_close, assert_same_grads, error, grads_of
from gates import CHECKPOINTING, checkpointed, gate_for, steady
from models import FAMILIES, VOCAB, base_model, lora_model, nf4_lora_model
from peft import PromptTuningConfig, get_peft_model
from state import differences, snapshot
from trl import SFTConfig, SFTTrainer
from tuning import arguments, base, dpo_data, lora, masked, sft_data, tokenizer, trained

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    AlphaTokenMixin,
    Fisher,
    Path,
    dft_weights,
    dpo_loss,
    eaft_weights,
    high_loss_weights,
    low_loss_weights,
    sft_loss,
    stm_weights,
)
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses.head import check_head
from alphatoken_loss.losses.logps import _trls_head as trls_head
from alphatoken_loss.losses.logps import token_logps
from alphatoken_loss.selection.thresholds import soft_weights

KINDS = ("none", "right", "left", "ragged", "full", "packed", "stacked", "stacked_left", "separate")
NAMES = ("eaft", "stm", "dft", "low_loss", "high_loss")


def batch_of(kind, seed=0):
    return (pair_batch if kind.startswith("s") else sft_batch)(kind, seed=seed)


def predictions(model, batch):
    """For each label its place, the whole prediction `(vocabulary,)` and the label, in float64."""
    rows = stacked(batch)
    with torch.no_grad():
        p = reference.logits_of(reference.frozen_copy(model), rows).double().softmax(-1)
    for b, t in response(batch).nonzero().tolist():
        yield (b, t), p[b, t - 1], int(rows["labels"][b, t])


def top_entropy(p, k):
    top = sorted(p.tolist(), reverse=True)[:k]
    return -sum(q / sum(top) * math.log(q / sum(top)) for q in top)


def quantile_mask(values, batch, rho, scope):
    return reference.keep(values, batch, rho, scope).double()


def by_formula(name, model, batch, *, rho=0.5, scope="batch", k=20, alpha=1.0, perplexity=2.5):
    """The weights, one token at a time."""
    out = torch.zeros(response(batch).shape, dtype=torch.float64)
    for place, p, label in predictions(model, batch):
        if name == "eaft":
            out[place] = (top_entropy(p, k) / math.log(k)) ** alpha
        elif name == "dft":
            out[place] = p[label]
        elif name == "stm":
            out[place] = float(1 / float(p[label]) <= perplexity)
        else:
            out[place] = (1 if name == "low_loss" else -1) * math.log(p[label])
    return quantile_mask(out, batch, rho, scope) if name.endswith("loss") else out


FUNCTIONS = {
    "eaft": lambda model, batch, k=20, alpha=1.0, **_: eaft_weights(model, batch, top_k=k, alpha=alpha),
    "dft": lambda model, batch, **_: dft_weights(model, batch),
    "stm": lambda model, batch, perplexity=2.5, **_: stm_weights(model, model, batch, perplexity=perplexity),
    "low_loss": lambda model, batch, rho=0.5, scope="batch", **_: low_loss_weights(
        model, batch, rho=rho, threshold_scope=scope
    ),
    "high_loss": lambda model, batch, rho=0.5, scope="batch", **_: high_loss_weights(
        model, batch, rho=rho, threshold_scope=scope
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_functions_against_their_formulas(name, kind):
    # A small model is unsure of everything: of STM the median perplexity tells more than 2.5.
    model, batch = lora_model("llama", seed=5), batch_of(kind, seed=5)
    middle = float(torch.tensor([1 / p[label] for _, p, label in predictions(model, batch)]).median())
    options = {"perplexity": max(1.0, middle)}
    weights = FUNCTIONS[name](model, batch, **options)
    expected = by_formula(name, model, batch, **options)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert_close(weights, expected, 1e-6)
    inside = response(batch)
    assert not weights[~inside].any() and 0 < float(weights.sum()) < int(inside.sum())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eaft", {"k": 5}),
        ("eaft", {"alpha": 2.0}),
        ("stm", {"perplexity": VOCAB}),
        ("low_loss", {"rho": 0.3}),
        ("high_loss", {"scope": "sequence"}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_options(name, options, seed):
    model, batch = lora_model("gpt2", seed=seed), sft_batch("left", seed=seed)
    found, expected = FUNCTIONS[name](model, batch, **options), by_formula(name, model, batch, **options)
    assert_close(found, expected, 1e-6)
    assert not torch.allclose(found.double(), by_formula(name, model, batch), atol=1e-3)  # not those of the defaults


def test_mistakes_that_would_be_seen():
    """Entropy over the whole vocabulary, of the top tokens unscaled, divided by ln V or not at all; shifted weights."""
    model, batch = lora_model("llama", seed=5), sft_batch("right", seed=5)
    found = eaft_weights(model, batch).double()
    wrong = {name: torch.zeros_like(found) for name in ("whole", "unscaled", "ln V", "undivided")}
    for place, p, _ in predictions(model, batch):
        top = p.topk(20).values
        wrong["whole"][place] = -(p * p.log()).sum() / math.log(20)
        wrong["unscaled"][place] = -(top * top.log()).sum() / math.log(20)
        wrong["ln V"][place] = top_entropy(p, 20) / math.log(VOCAB)
        wrong["undivided"][place] = top_entropy(p, 20)
    wrong["shifted"] = found.roll(1, 1)
    for name, weights in wrong.items():
        assert error(found, weights) > 1e-2, name


@pytest.mark.parametrize("reference_is", ["off", "ref", "model"])
def test_stm_asks_the_model_that_tuning_starts_from(reference_is):
    model = lora_model("llama", seed=5, others=["ref"] if reference_is == "ref" else ())
    other = lora_model("llama", seed=6)
    batch = sft_batch("right", seed=5)
    work = reference.frozen_copy(model, reference.reference_adapter(model)) if reference_is != "model" else other
    expected = by_formula("stm", work, batch, perplexity=60.0)
    found = stm_weights(model, other if reference_is == "model" else None, batch, perplexity=60.0)
    assert torch.equal(found.double(), expected)
    assert not torch.equal(expected, by_formula("stm", model, batch, perplexity=60.0))


def test_what_they_refuse():
    model, batch = lora_model("llama"), sft_batch("right")
    for count in (1, 2.0, True):
        with pytest.raises(ValueError, match="top_k is"):
            eaft_weights(model, batch, top_k=count)
    for alpha in (0.0, math.inf, "1"):
        with pytest.raises(ValueError, match="alpha is"):
            eaft_weights(model, batch, alpha=alpha)
    for perplexity in (0.9, math.nan, math.inf, None):
        with pytest.raises(ValueError, match="perplexity is"):
            stm_weights(model, None, batch, perplexity=perplexity)
    with pytest.raises(ValueError, match="of is 'me'"):
        AlphaToken(model, selection="stm", selection_options={"of": "me"})
    with pytest.raises(ValueError, match="rho is"):
        low_loss_weights(model, batch, rho=0.0)
    with pytest.raises(ValueError, match="no adapter to switch off"):
        stm_weights(base(), None, batch)


def test_a_batch_without_a_response():
    batch = sft_batch("right")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    model = lora_model("llama")
    for name, function in FUNCTIONS.items():
        assert not function(model, batch).any(), name
        gate = AlphaToken(model, selection=name)
        sft_loss(model, batch, gate).backward()
        assert not gate.weights.any(), name


@pytest.mark.parametrize("name", NAMES)
def test_functions_leave_no_trace(name):
    model, batch = lora_model("llama", lora_dropout=0.5).train(), pair_batch("stacked")
    before = snapshot(model)
    first = FUNCTIONS[name](model, batch)
    assert torch.equal(first, FUNCTIONS[name](model, batch))  # without dropout
    with pytest.raises(IndexError):
        FUNCTIONS[name](model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert not differences(before, snapshot(model))


# ------------------------------------------------------------------------------------ the gate


def options_of(name):
    return {"of": "model", "perplexity": 60.0} if name == "stm" else {}


def formula_of(name, model, batch):
    return by_formula(name, model, batch, perplexity=60.0)


@pytest.mark.parametrize("how", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["right", "left", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gate_weighs_by_the_training_forward(name, kind, how, monkeypatch):
    """The gradient of sum(w * l) / N, w constant; one forward of the decoder, and none of the head but its own."""
    if how == "reentrant" and kind != "right":
        how = "off"
    model, batch = lora_model("llama", seed=2), sft_batch(kind, seed=2)
    weights = formula_of(name, model, batch)
    value, grads = reference.masked_sft(model, batch, weights, float(response(batch).sum()))
    checkpointed(model, how)
    gate = AlphaToken(model, selection=name, selection_options=options_of(name))
    runs = {"decoder": 0, "head": 0}
    inner = model.get_base_model()
    for part, module in (("decoder", inner.model), ("head", inner.lm_head)):
        module.register_forward_hook(lambda *_, part=part: runs.__setitem__(part, runs[part] + 1))
    with gate(batch):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    assert runs == {"decoder": 1, "head": 1}
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)
    assert_close(gate.weights, weights, 1e-6)
    assert gate.values is None and gate.target is None and gate.fisher is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    with steady(family):
        model, batch = lora_model(family, seed=2), sft_batch("left", seed=2)
        weights = by_formula("eaft", model, batch)
        _, grads = reference.masked_sft(model, batch, weights, float(response(batch).sum()))
        with AlphaToken(model, selection="eaft")(batch):
            model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


def test_nf4():
    model, batch = nf4_lora_model("llama"), sft_batch("right")
    weights = by_formula("eaft", model, batch)
    gate = AlphaToken(model, selection="eaft")
    with gate(batch):
        model(**batch).loss.backward()
    assert_close(gate.weights, weights, 1e-4)


@pytest.mark.parametrize("form", ["stacked", "stacked_left", "separate"])
@pytest.mark.parametrize("name", NAMES)
def test_pairs_where_the_head_runs_on_some_columns(name, form):
    model, batch = lora_model("llama", seed=2), pair_batch(form, seed=2)
    weights = formula_of(name, model, batch)
    value, grads = reference.masked_dpo(model, batch, weights)
    gate = AlphaToken(model, selection=name, selection_options=options_of(name))
    runs = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss = dpo_loss(model, None, batch, gate)
    loss.backward()
    assert sum(runs) == 1 and len(runs) == 2  # and the reference's
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("name", NAMES)
def test_where_no_logits_are_kept(name):
    """A fused head: its log-probabilities are taken as they are, and the head runs again for entropies alone.

    TRL's calls no module; ours, where TRL has none (1.14), runs the head in forward and backward.
    """
    model, batch = lora_model("llama", seed=2), sft_batch("left", seed=2)
    weights = formula_of(name, model, batch)
    _, grads = reference.masked_sft(model, batch, weights, 1.0)
    gate = AlphaToken(model, selection=name, selection_options=options_of(name))
    runs, read = [], read_batch(batch)
    check_head(model, read)  # once in a model's life it runs for this
    model.get_base_model().lm_head.register_forward_hook(lambda *_: runs.append(1))
    with gate(batch):
        (-token_logps(model, read, fused=True).sum()).backward()
    assert len(runs) == (name == "eaft") + (0 if trls_head() else 2)
    assert_same_grads(grads_of(model), grads, 1e-5)  # TRL's head computes in float32
    assert_close(gate.weights, weights, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_loss_runs_the_head_itself(name):
    """Then logits never pass, and weights are made in the backward."""
    model, batch = lora_model("llama", seed=2), sft_batch("right", seed=2)
    weights = formula_of(name, model, batch)
    _, grads = reference.masked_sft(model, batch, weights, 1.0)
    gate = AlphaToken(model, selection=name, selection_options=options_of(name))
    inner = model.get_base_model()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with gate(batch):
        logits = inner.lm_head(inner.model(**inputs, use_cache=False).last_hidden_state)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
    assert gate.weights is None
    loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)
    assert_close(gate.weights, weights, 1e-6)


def test_under_autocast_entropies_are_those_of_the_head_as_it_ran():
    model, batch = lora_model("llama", seed=2, dtype=torch.float32), sft_batch("right", seed=2)
    inner, found = model.get_base_model(), []
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    for way in ("logits", "hidden"):
        gate = AlphaToken(model, selection="eaft")
        with torch.autocast("cpu", torch.bfloat16), gate(batch):
            if way == "logits":
                loss = model(**batch).loss
            else:
                loss = (
                    inner.lm_head(inner.model(**inputs, use_cache=False).last_hidden_state).float().logsumexp(-1).sum()
                )
        loss.backward()
        found.append(gate.weights)
    assert_close(found[1], found[0], 1e-6)


# ------------------------------------------------------------------------------------ a user's function


def test_a_function_sees_what_the_forward_has():
    model, batch = lora_model("llama", seed=2), sft_batch("left", seed=2)
    hidden = reference.frozen_copy(model).get_base_model().model(
        **{k: v for k, v in batch.items() if k != "labels"}
    ).last_hidden_state.detach()  # fmt: skip
    logps, entropies = (torch.zeros(response(batch).shape, dtype=torch.float64) for _ in range(2))
    for place, p, label in predictions(model, batch):
        logps[place], entropies[place] = p[label].log(), -(p * p.log()).sum()
    seen = []

    def weigh(forward):
        seen.append(forward)
        assert not torch.is_grad_enabled() and not forward.logps.requires_grad and not forward.hidden.requires_grad
        assert torch.equal(forward.labels, batch["labels"])
        assert_close(forward.logps, logps, TOL64)
        assert_close(forward.entropies, entropies, TOL64)
        assert_close(forward.hidden, hidden, TOL64)
        assert torch.equal(forward.batch.columns["mine"], batch["labels"] * 2)
        return forward.entropies + forward.labels.clamp(min=0)

    gate = AlphaToken(model, token_weights=weigh)
    weights = (entropies + batch["labels"].clamp(min=0)) * response(batch)
    _, grads = reference.masked_sft(model, batch, weights, float(response(batch).sum()))
    with gate(read_batch({**batch, "mine": batch["labels"] * 2}, columns=("mine",))):
        model(**batch).loss.backward()
    assert len(seen) == 1
    assert_same_grads(grads_of(model), grads, TOL64)
    with pytest.raises(AttributeError):
        _ = seen[0].hidden  # nothing of the step is held


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_function_that_raises_leaves_nothing_behind(where):
    model, batch = lora_model("llama"), sft_batch("right")

    def weigh(forward):
        raise KeyError("mine")

    gate = AlphaToken(model, token_weights=weigh)
    before = snapshot(model)
    inner = model.get_base_model()
    with pytest.raises(KeyError, match="mine"), gate(batch):
        if where == "forward":
            model(**batch)
        else:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            inner.lm_head(inner.model(**inputs, use_cache=False).last_hidden_state).sum().backward()
    assert not differences(before, snapshot(model))
    sft_loss(model, batch, AlphaToken(model, selection="eaft")).backward()  # the next one is as ever


# ------------------------------------------------------------------------------------ soft values


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("kind", ["right", "packed", "stacked"])
def test_soft_values(kind, scope):
    """sigmoid(value / (temperature * root mean square of the group's values)), in `alphatoken_weights` and the gate."""
    model, batch = lora_model("llama", seed=4), batch_of(kind, seed=4)
    options = {"threshold": "soft", "soft_temperature": 0.7, "threshold_scope": scope}
    weights, _ = found_values(model, "llama", batch, **options)
    values, inside = expected_values(model, "llama", batch).total, response(batch)
    if scope == "sequence":
        groups = segments(batch)
    else:
        groups = (torch.arange(len(inside)) >= (len(inside) // 2 if is_pairs(batch) else 99)).long()[:, None]
        groups = groups.expand(inside.shape)
    expected = torch.zeros_like(values)
    for group in groups[inside].unique():
        here = inside & (groups == group)
        expected[here] = 1 / (1 + (-values[here] / (0.7 * values[here].square().mean().sqrt())).exp())
    assert_close(weights, expected, 1e-5)
    assert 0 < float(weights[inside].min()) < 0.5 < float(weights[inside].max()) < 1


def test_soft_values_in_the_gate():
    model, batch = lora_model("llama", seed=4), sft_batch("right", seed=4)
    gate = gate_for(model, threshold="soft")
    with gate(batch):
        model(**batch).loss.backward()
    values, inside = gate.values.total, response(batch)
    weights = torch.sigmoid(values / values[inside].square().mean().sqrt()) * inside
    _, grads = reference.masked_sft(model, batch, weights, float(inside.sum()))
    assert_same_grads(grads_of(model), grads, TOL64)
    figures = gate.metrics()
    assert figures["kept"] == 1.0 and figures["weight"] == pytest.approx(float(weights[inside].mean()), rel=1e-4)


def test_soft_values_at_their_ends():
    groups = torch.tensor([[0, 0, 0, -1, 1, 1]])
    values = torch.tensor([[2.0, -1.0, 0.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    sharp = soft_weights(values, groups, temperature=1e-3)
    assert torch.allclose(sharp, torch.tensor([[1.0, 0.0, 0.5, 0.0, 0.5, 0.5]], dtype=torch.float64))
    assert torch.allclose(
        soft_weights(values * 1e5, groups, temperature=2.0), soft_weights(values, groups, temperature=2.0)
    )
    assert AlphaTokenConfig.paper().threshold == "quantile"
    for wrong in (0.0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="soft_temperature is"):
            AlphaTokenConfig(soft_temperature=wrong)


# ------------------------------------------------------------------------------------ trainers


def trainer_of(kind, folder, *, trainer_class=None, options=None, **changes):
    data, model = (sft_data() if kind == "sft" else dpo_data()), base()
    args = arguments(kind, folder, **changes)
    cls = trainer_class or tuning.TRAINERS[kind][0]
    return cls(
        model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=lora(), **(options or {})
    )


def keeping(trainer_class):
    class Keeping(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            self.masks = [*getattr(self, "masks", []), self.alphatoken.weights]
            return loss

    return Keeping


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", [*NAMES, "function"])
@pytest.mark.filterwarnings("ignore")
def test_trainers_take_the_weighted_steps(kind, name, tmp_path, monkeypatch):
    """Those of the stock trainer with the weights written into its log-probabilities; nothing is valued."""
    for part in ("_target_batches", "_estimate_fisher", "_held_out_rows"):
        monkeypatch.setattr(AlphaTokenMixin, part, lambda *args: pytest.fail("estimated or held out"))
    ours, stock = tuning.TRAINERS[kind]
    if name == "function":
        changes, options = {}, {"token_weights": lambda forward: forward.logps.exp() + forward.entropies / 3}
    else:
        perplexity = {"selection_options": '{"perplexity": 200}'} if name == "stm" else {}
        changes, options = {"selection": name, **perplexity}, {}
    changes |= {"gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = trainer_of(kind, tmp_path, trainer_class=keeping(ours), options=options, **changes)
    before = dict(trained(trainer.model))
    trainer.train()
    assert len(trainer.train_dataset) == 12 and len(trainer.masks) == 4
    assert any(len(mask.unique()) > 2 for mask in trainer.masks) == (name in ("eaft", "dft", "function"))
    other = trainer_of(
        kind, tmp_path, trainer_class=masked(stock, trainer.masks), gradient_accumulation_steps=2, max_steps=2
    )
    other.train()
    after, expected = dict(trained(trainer.model)), dict(trained(other.model))
    moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
    assert moved > 0
    for key in expected:
        assert float((after[key] - expected[key]).abs().max()) < 1e-4 * moved, key


@pytest.mark.filterwarnings("ignore")
def test_dft_is_trls(tmp_path):
    """The same steps as TRL's own loss of this name, under accumulation; its loss is reported as SFT's."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 3}
    ours = trainer_of("sft", tmp_path, selection="dft", **options)
    before = dict(trained(ours.model))
    ours.train()
    names = (
        "output_dir use_cpu bf16 max_steps logging_steps report_to save_strategy per_device_train_batch_size "
        "learning_rate optim max_grad_norm lr_scheduler_type disable_tqdm seed gradient_accumulation_steps"
    )
    theirs = SFTTrainer(
        base(),
        args=SFTConfig(loss_type="dft", **{name: getattr(ours.args, name) for name in names.split()}),
        train_dataset=sft_data(),
        processing_class=tokenizer(),
        peft_config=lora(),
    )
    theirs.train()
    after, expected = dict(trained(ours.model)), dict(trained(theirs.model))
    moved = max(float((expected[key] - before[key]).abs().max()) for key in expected)
    for key in expected:
        assert float((after[key] - expected[key]).abs().max()) < 1e-5 * moved, key
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (ours, theirs)]
    assert losses[0][0] > 1.5 * losses[1][0]
    assert 0 < ours.state.log_history[0]["alphatoken/weight"] < 0.5


@pytest.mark.filterwarnings("ignore")
def test_what_trainers_refuse(tmp_path):
    with pytest.raises(ValueError, match="'eaft' has no option 'k'; its options are top_k, alpha"):
        arguments("sft", tmp_path, selection="eaft", selection_options={"k": 3})
    with pytest.raises(ValueError, match="top_k is 1"):
        arguments("sft", tmp_path, selection="eaft", selection_options='{"top_k": 1}')
    cls, _ = tuning.TRAINERS["sft"]
    full = {"train_dataset": sft_data(), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match=r'selection="stm" compares with a reference.*Pass ref_model'):
        cls(tuning.partly_trained(), args=arguments("sft", tmp_path, selection="stm"), **full)
    own = arguments("sft", tmp_path, selection="stm", selection_options={"of": "model"})
    assert cls(tuning.partly_trained(), args=own, **full).alphatoken.selection.of == "model"
    with pytest.raises(ValueError, match=r"token_weights were given, but rho=1.0"):
        trainer_of("sft", tmp_path, rho=1.0, options={"token_weights": lambda forward: forward.logps})
    trainer = trainer_of("sft", tmp_path, options={"token_weights": lambda forward: forward.logps})
    with pytest.raises(ValueError, match=r"token_weights returned are below 0.*negative_weights=True"):
        trainer.train()


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_chosen_columns_behind_virtual_tokens(fused):
    """Their columns count the virtual tokens too."""
    model = get_peft_model(base_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    batch = sft_batch("left", seed=3)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    wanted = dft_weights(model, batch)
    alphatoken = AlphaToken(model, selection="dft", config=AlphaTokenConfig())
    columns = 2 + (batch["labels"][:, 1:] != -100).any(0).nonzero().flatten()
    with alphatoken(batch):
        logits = model(**inputs, use_cache=False, **({"logits_to_keep": columns} if fused else {})).logits
        logits.logsumexp(-1).sum().backward()
    assert_close(alphatoken.weights, wanted, 1e-6)


@pytest.mark.parametrize("selection", [*NAMES, "random", "excess_loss", "given"])
def test_what_only_values_need_is_refused(selection):
    model, target = lora_model("llama"), [sft_batch("none")]
    for threshold in ("zero", "soft"):
        with pytest.raises(ValueError, match=f'threshold is "{threshold}", but tokens are not chosen by their values'):
            AlphaToken(model, selection=selection, config=AlphaTokenConfig(threshold=threshold))
    with pytest.raises(ValueError, match="smoothing is 3, but tokens are not chosen by their values"):
        AlphaToken(model, selection=selection, config=AlphaTokenConfig(smoothing=3))
    for name, value in {"target": target, "path": Path({}), "fisher": Fisher({}, 1, ())}.items():
        with pytest.raises(ValueError, match=f"{name} was given, but tokens are not chosen by their values"):
            AlphaToken(model, selection=selection, **{name: value})
    with pytest.raises(ValueError, match="target was given, but tokens are not chosen by their values"):
        AlphaToken(model, token_weights=lambda forward: forward.entropies, target=target)
    AlphaToken(model, selection=selection, config=AlphaTokenConfig(rho=1.0, threshold="zero"), target=target)  # off


def test_a_kl_on_dropped_tokens_that_are_known_too_late():
    model, batch = lora_model("llama"), sft_batch("right")
    alphatoken = AlphaToken(model, selection="eaft")
    with pytest.raises(ValueError, match=r"is known only when the forward has ended\. Give weights"):
        sft_loss(model, batch, alphatoken, kl_coef=0.1, kl_on="dropped")
    sft_loss(model, batch, alphatoken, kl_on="dropped").backward()  # no KL is asked for
    assert alphatoken.kl is None and alphatoken.weights is not None
