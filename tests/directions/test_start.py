"""The reference is where training started, for adapters that off do not take the model back there.

Expectations are computed on a deep copy that was made before the first step.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from batches import pair_batch, response, sft_batch
from checks import assert_close
from models import FAMILIES, base_model, lora_model, nf4_lora_model
from peft import EvaConfig, LoftQConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils import loftq_utils
from state import differences, snapshot
from transformers import MixtralConfig, MixtralForCausalLM

from alphatoken_loss import (
    AlphaToken,
    AlphaTokenConfig,
    Fisher,
    alphatoken_weights,
    dpo_loss,
    estimate_fisher,
    make_path,
    remember_start,
    sft_loss,
    shared_gain,
)
from alphatoken_loss.directions import drift as drifts
from alphatoken_loss.directions.drift import drift
from alphatoken_loss.models.sites import find_scored
from alphatoken_loss.models.start import add_reference_adapter, start_of

GRADIENTS = hasattr(peft, "LoraGAConfig")  # not in every PEFT that pyproject.toml admits
MOVED = ("pissa", "pissa_niter_4", "olora", *(["lora_ga"] if GRADIENTS else []), "corda", "loftq")
BESIDE = {"bias all": {"bias": "all"}, "bias lora_only": {"bias": "lora_only"}}
OFF = {
    "lora": {},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
}
NEEDED = {
    "lora_ga": {"lora_ga_config": peft.LoraGAConfig()} if GRADIENTS else {},
    "corda": {"corda_config": CordaConfig(corda_method="kpm", verbose=False)},
    "loftq": {"loftq_config": LoftQConfig(loftq_bits=4)},
    "eva": {"eva_config": EvaConfig()},
}
FORMS = {name: {"init_lora_weights": name} for name in MOVED} | BESIDE | OFF


def loftq_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own function, which names a GPU in its code."""
    source = inspect.getsource(loftq_utils.loftq_init)
    assert 'else "cuda"' in source
    found: dict[str, Any] = {}
    exec(source.replace('else "cuda"', 'else "cpu"'), vars(loftq_utils), found)
    for module in (loftq_utils, lora_layer):  # PEFT takes it from the one or the other
        if hasattr(module, "loftq_init"):
            monkeypatch.setattr(module, "loftq_init", found["loftq_init"])


@pytest.fixture(autouse=True)
def _loftq(monkeypatch: pytest.MonkeyPatch) -> None:
    loftq_on_a_cpu(monkeypatch)


def started(form: str, seed: int = 0) -> torch.nn.Module:
    """A Qwen2 (it has biases) whose adapter was made by PEFT in one of the forms; float64 from then on."""
    options = dict(FORMS[form])
    base, batch = base_model("qwen2", dtype=torch.float32, seed=seed), sft_batch("right", seed)
    targets = [name.split(".")[-1] for name in FAMILIES["qwen2"].linears]
    options.update(NEEDED.get(form, {}))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    if form == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
        base.zero_grad()
    elif form == "corda":
        rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]
        preprocess_corda(base, config, lambda: [base(**row) for row in rows])  # its hooks take one row at a time
    model = get_peft_model(base, config)
    if form == "eva":
        initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    return model.double().train()


def step(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B, T, V)` log-probabilities that predict each column."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return torch.nn.functional.pad(logits.log_softmax(-1)[:, :-1], (0, 0, 1, 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_kl_and_dpo_are_against_the_function_at_the_start(form, seed):
    model = started(form, seed)
    start = copy.deepcopy(model)
    batch, pairs = sft_batch("right", seed), pair_batch("stacked", seed)
    exact = 1e-6 if form in ("orthogonal", "lora_ga") else 1e-12  # float32 when PEFT made them
    before = snapshot(model)
    assert abs(float(dpo_loss(model, None, pairs).detach()) - math.log(2)) < exact
    assert abs(float((sft_loss(model, batch, kl_coef=1.0) - sft_loss(model, batch)).detach())) < exact
    assert not differences(before, snapshot(model))

    step(model, seed)
    now, then, mask = logps(model, batch), logps(start, batch), response(batch)
    kl = (then.exp() * (then - now)).sum(-1)[mask].mean()
    assert kl > 1e-3
    assert_close(sft_loss(model, batch, kl_coef=1.0) - sft_loss(model, batch), kl, 1e-6)
    labels = pairs["input_ids"]
    moved = (logps(model, pairs) - logps(start, pairs)).gather(-1, labels[..., None])[..., 0]
    chosen, rejected = (moved * pairs["completion_mask"]).sum(1).chunk(2)
    assert_close(dpo_loss(model, None, pairs), -(0.1 * (chosen - rejected)).sigmoid().log().mean(), 1e-6)


@pytest.mark.parametrize("form", [*MOVED, "lora"])
def test_drift_is_zero_at_the_start_and_measured_from_it(form):
    model = started(form)
    start = dict(copy.deepcopy(model).named_parameters())
    config = AlphaTokenConfig(estimator="difference", fisher="dense")
    alphatoken = AlphaToken(model, target=[sft_batch("none")], config=config)
    fisher = estimate_fisher(model, [sft_batch()], config=config, generate=False, progress=False)

    def drifts():
        return drift(fisher, find_scored(model, "all", "difference"), None)

    size = max(float(f[0].abs().max()) for f in fisher.factors.values())
    assert all(float(d.abs().max()) < 1e-12 * size for d in drifts().values())
    step(model)
    found = drifts()
    now = dict(model.named_parameters())
    for name in fisher.names:
        a, b = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        pulled = fisher.diagonal(name) * (2.0 * now[b] @ now[a] - 2.0 * start[b] @ start[a]).detach()
        assert_close(found[a], 2.0 * now[b].T @ pulled, 1e-9, a)
        assert_close(found[b], 2.0 * pulled @ now[a].T, 1e-9, b)
    assert alphatoken.fisher is None  # it is this test's own that was used


@pytest.mark.parametrize("form", ["pissa", "bias all"])
def test_a_separate_reference_gives_the_same_drift(form):
    """A ref_model holds whole what the initialisation has split; drift still starts at the adapter's start."""
    torch.manual_seed(0)
    whole = base_model("qwen2", dtype=torch.float32).double()
    model = started(form)
    config = AlphaTokenConfig(estimator="difference")
    AlphaToken(model, whole, target=[sft_batch("none")], config=config)
    fisher = estimate_fisher(model, [sft_batch()], ref_model=whole, config=config, generate=False, progress=False)
    step(model)
    scored = find_scored(model, "all", "difference")
    beside, alone = drift(fisher, scored, whole), drift(fisher, scored, None)
    for name in beside:
        if float(alone[name].abs().max()):
            assert_close(beside[name], alone[name], 1e-6, name)


@pytest.mark.parametrize("form", ["pissa", "bias all"])
def test_a_fisher_is_estimated_at_the_start_also_after_steps_and_resumes_it_from_its_file(form, tmp_path):
    model, config = started(form), AlphaTokenConfig(estimator="difference")
    AlphaToken(model, target=[sft_batch("none")], config=config)
    options = dict(config=config, generate=False, progress=False)
    first = estimate_fisher(model, [sft_batch()], **options)
    step(model)
    later = estimate_fisher(model, [sft_batch()], **options)
    for name in first.names:
        assert_close(later.diagonal(name), first.diagonal(name), 1e-9, name)
    for name, (_, value) in first.others.items():
        assert torch.equal(later.others[name][1], value), "drift of what else is trained is measured from elsewhere"

    first.save(tmp_path / "fisher.safetensors")
    resumed = copy.deepcopy(model)  # as from a checkpoint: trained before this library meets it
    batch, pairs = sft_batch(), pair_batch()
    target = [sft_batch("none", 3)]
    _, values = alphatoken_weights(model, None, batch, target=target, fisher=first, config=config, return_values=True)
    loaded = Fisher.load(tmp_path / "fisher.safetensors")
    _, again = alphatoken_weights(resumed, None, batch, target=target, fisher=loaded, config=config, return_values=True)
    assert float(values.stability.abs().max()) > 0
    assert_close(again.stability, values.stability, 1e-9)
    assert torch.equal(dpo_loss(resumed, None, pairs), dpo_loss(model, None, pairs))


def test_a_fisher_of_another_base_leaves_the_runs_own_start(tmp_path):
    config = AlphaTokenConfig(estimator="difference")
    other, model = started("pissa", 1), started("pissa", 0)
    step(other)
    fisher = estimate_fisher(other, [sft_batch()], config=config, generate=False, progress=False)
    AlphaToken(
        model,
        target=[sft_batch("none")],
        config=AlphaTokenConfig(estimator="difference", stability_weight=0),
        fisher=fisher,
    )
    assert abs(float(dpo_loss(model, None, pair_batch()).detach()) - math.log(2)) < 1e-12


def test_remember_start_holds_an_adapter_that_is_trained_further_to_where_it_is():
    model = lora_model("llama")
    assert abs(float(dpo_loss(model, None, pair_batch()).detach()) - math.log(2)) > 1e-3, "by default: the base"
    remember_start(model)
    assert float(dpo_loss(model, None, pair_batch()).detach()) == pytest.approx(math.log(2), abs=1e-12)


def test_the_start_of_adapters_on_experts_goes_through_a_file(tmp_path):
    """These are parameters of one module, which has no weight of its own."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=2, **shape))
    experts = ["experts.gate_up_proj", "experts.down_proj"]

    def made():
        torch.manual_seed(1)
        return get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=[], target_parameters=experts))

    model, config = made(), AlphaTokenConfig(estimator="difference")
    remember_start(model)
    estimate_fisher(model, [[3, 4]], config=config, max_new_tokens=2, progress=False).save(tmp_path / "fisher")
    resumed = made()
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    fisher = Fisher.load(tmp_path / "fisher")
    AlphaToken(resumed, target=[sft_batch("none")], fisher=fisher, config=config)
    for name, tensor in start_of(model).tensors.items():
        assert torch.equal(start_of(resumed).tensors[name], tensor), name


@pytest.mark.parametrize("later", ["norms", "pissa"])
@pytest.mark.parametrize("asked", ["gate", "fisher", "gain"])
def test_what_becomes_trainable_after_the_model_was_first_seen(asked, later):
    """The model may be asked about before training is set up; its start is where it is when that is done."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base_model("qwen2", dtype=torch.float32), config).double().train()
    batch, path = sft_batch("right"), AlphaTokenConfig(estimator="path", stability_weight=0.0)
    if asked == "gate":
        AlphaToken(model, target=[batch], config=path)
    elif asked == "fisher":
        estimate_fisher(model, [batch], generate=False, progress=False)
    else:
        short = AlphaTokenConfig(estimator="path", path_steps=1, path_rate=1e-3)
        shared_gain(model, [sft_batch("left"), batch], [batch], config=short, progress=False)
    if later == "norms":
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.requires_grad_()
    else:
        moving = LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
        model.float().add_adapter("moving", moving)
        model.double().set_adapter("moving")
    AlphaToken(model, target=[batch], config=path)
    before = copy.deepcopy(model).eval()
    step(model)
    found = kl_of(model, batch)
    assert found == pytest.approx(kl_between(before, model, batch), rel=1e-9) and found > 1e-4


def kl_of(model, batch):
    with torch.no_grad():
        return float(sft_loss(model, batch, kl_coef=1.0) - sft_loss(model, batch))


def kl_between(before, model, batch):
    """KL(before || model), the mean over response tokens, by the definition."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        there, here = (m(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (before, model))
    each = (there.exp() * (there - here)).sum(-1)
    return float(each[batch["labels"][:, 1:] != -100].mean())


def test_what_is_trained_beside_an_adapter_of_a_modules_name_is_refused():
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(base_model("llama", dtype=torch.float32), config, adapter_name="model")
    norm = model.base_model.model.model.norm.weight
    norm.requires_grad_()
    with pytest.raises(ValueError, match=r"norm\.weight is trained beside the adapters \(1 such"):
        add_reference_adapter(model)
    norm.requires_grad_(False)
    remember_start(model)
    add_reference_adapter(model)
    own = dict(model.named_parameters())
    held = {name: own[name.replace(".lora_A.model", ".lora_A.ref").replace(".lora_B.model", ".lora_B.ref")]
            for name, p in own.items() if p.requires_grad}  # fmt: skip
    assert held and all(torch.equal(own[name], tensor) for name, tensor in held.items())


def test_several_active_adapters_have_no_single_start():
    model = started("pissa")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"adapters default, other are active together.*set_adapter\(\)"):
        add_reference_adapter(model)


@pytest.mark.parametrize("use", ["dpo", "kl", "drift", "fisher"])
def test_an_adapter_called_ref_in_training_is_refused(use):
    base = base_model("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="ref").train()
    with pytest.raises(ValueError, match=r'in training is called "ref".*Give it another name'):
        if use == "dpo":
            dpo_loss(model, None, pair_batch())
        elif use == "kl":
            sft_loss(model, sft_batch(), kl_coef=0.1)
        elif use == "fisher":
            estimate_fisher(model, [sft_batch()], generate=False, progress=False)
        else:
            AlphaToken(model, target=[sft_batch("none")])


def _merged(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).merge_and_unload().requires_grad_(False)


def _merged_in_place(model: torch.nn.Module) -> torch.nn.Module:
    found = copy.deepcopy(model).requires_grad_(False)
    found.merge_adapter()
    return found


@pytest.mark.parametrize("made", [_merged, _merged_in_place])
@pytest.mark.parametrize("use", ["context", "weights", "path"])
def test_a_reference_on_another_base_is_refused(use, made):
    """Its function is the policy's, so no drift at all; that of the adapters' deltas alone would be as large as they
    are."""
    model, batch = lora_model("llama"), sft_batch("right")
    beside = copy.deepcopy(model).requires_grad_(False)
    fisher = estimate_fisher(model, [batch], ref_model=beside, generate=False, progress=False)
    for moved in drift(fisher, find_scored(model, 3), beside).values():
        assert float(moved.abs().max()) < 1e-15

    config = AlphaTokenConfig(path_steps=1, path_rate=1e-3)

    def use_it(reference, **changes):
        settings = dataclasses.replace(config, **changes)
        if use == "path":
            settings = dataclasses.replace(settings, estimator="path")
            of_all = estimate_fisher(model, [batch], config=settings, generate=False, progress=False)
            make_path(model, [batch], ref_model=reference, fisher=of_all, config=settings, progress=False)
        elif use == "weights":
            alphatoken_weights(model, reference, batch, config=settings)
        else:
            AlphaToken(model, reference, target=[sft_batch("none")], config=settings)

    use_it(beside)
    with pytest.raises(ValueError, match=r"ref_model's weight at .*q_proj is not the one.*remember_start\(model\)"):
        use_it(made(model))
    use_it(made(model), stability_weight=0.0)
    plain = base_model("llama")
    use_it(plain.to(torch.bfloat16))  # precision does not matter


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_a_reference_in_nf4_the_base_is_compared_where_it_can_be(name):
    model, batch = nf4_lora_model(name), sft_batch("right")
    config = AlphaTokenConfig(num_layers=1)
    for reference in (nf4_lora_model(name), base_model(name, dtype=torch.float32)):
        AlphaToken(model, reference, target=[batch], config=config)
    if name == "llama":  # GPT-2's Conv1D stays as it is
        with pytest.raises(ValueError, match=r"ref_model's weight at"):
            AlphaToken(model, nf4_lora_model(name, seed=1), target=[batch], config=config)


def _upcast(model):
    """Base weights that were rounded to bf16."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.shape[0] > 8:
                module.weight.copy_(module.weight.bfloat16().to(module.weight))
    return model


def _offloaded(model):
    cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    return model


def _partitioned(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = torch.empty(0, dtype=module.weight.dtype)
    return model


def _packed(model):
    """As GPTQ keeps them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.qweight = torch.nn.Parameter(module.weight.detach())
            del module.weight
    return model


@pytest.mark.parametrize("made", [_upcast, _offloaded, _partitioned, _packed])
def test_a_reference_of_whose_base_nothing_else_can_be_told_is_taken(made):
    model = lora_model("llama", dtype=torch.float32)
    AlphaToken(model, made(base_model("llama", dtype=torch.float32)), target=[sft_batch("none")])


@pytest.mark.parametrize("form", ["pissa", "loftq"])
def test_the_whole_model_is_the_base_of_what_was_split_from_it(form):
    model, whole = started(form), base_model("qwen2", dtype=torch.float32)
    AlphaToken(model, whole, target=[sft_batch("none")])
    with pytest.raises(ValueError, match="ref_model's weight at"):
        AlphaToken(model, base_model("qwen2", dtype=torch.float32, seed=1), target=[sft_batch("none")])


def test_where_no_drift_is_measured_a_merged_reference_is_taken():
    """Of a given path, whose drift was counted when it was made; the reference is DPO's alone."""
    model = lora_model("llama")
    merged, config = _merged(model), AlphaTokenConfig(estimator="path", path_steps=1, path_rate=1e-3)
    path = make_path(model, [sft_batch("none")], config=config, progress=False)
    AlphaToken(model, merged, path=path, config=config)
    alphatoken_weights(model, merged, sft_batch("right"), path=path, config=config)
    with pytest.raises(ValueError, match="ref_model's weight at"):
        AlphaToken(
            model, merged, path=path, target=[sft_batch("none")], config=dataclasses.replace(config, path_every=2)
        )


def test_the_base_of_a_reference_is_looked_at_once(monkeypatch):
    model, reference, batch = lora_model("llama"), lora_model("llama").requires_grad_(False), sft_batch("right")
    alphatoken, looked = AlphaToken(model, reference), []  # sequences are valued by each other
    alike = drifts._alike
    monkeypatch.setattr(drifts, "_alike", lambda *args: looked.append(1) or alike(*args))
    for _ in range(3):
        sft_loss(model, batch, alphatoken).backward()
    assert len(looked) == 3 * 7


def test_a_reference_that_was_put_right_is_taken_and_more_blocks_are_looked_at():
    model = lora_model("llama")
    reference, target = _merged_in_place(model), [sft_batch("none")]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"its adapter is merged"):
            AlphaToken(model, reference, target=target)
    reference.unmerge_adapter()
    with torch.no_grad():  # what merging left in the last bits
        for name, parameter in reference.named_parameters():
            parameter.copy_(dict(model.named_parameters())[name])
        reference.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight += 1.0
    AlphaToken(model, reference, target=target, config=AlphaTokenConfig(num_layers=1))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is not the one"):
        AlphaToken(model, reference, target=target, config=AlphaTokenConfig(num_layers="all"))


def test_a_reference_with_a_lora_variant_is_refused():
    model = lora_model("llama")
    reference = lora_model("llama", use_dora=True)
    with pytest.raises(ValueError, match=r"ref_model's adapter 'default' is a LoRA variant"):
        AlphaToken(model, reference, target=[sft_batch("none")])


def _train(model, alphatoken, seeds, rate=0.5):
    """Steps of SGD with a KL, and of each its KL and weights."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for seed in seeds:
        batch = sft_batch("right", seed=seed)
        with alphatoken(batch, kl_coef=1.0) as at:
            loss = model(**batch, use_cache=False).loss
            (loss + at.kl).backward()
        found.append((at.kl.detach(), at.weights))
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("pissa", {"estimator": "difference", "stability_weight": 50.0}),
        ("pissa", {"estimator": "path", "path_from": "reference", "path_steps": 2, "path_rate": 1e-3}),
        ("bias all", {"estimator": "difference", "stability_weight": 50.0}),
        ("lora", {"estimator": "difference", "stability_weight": 50.0}),
    ],
)
@pytest.mark.parametrize("order", ["weights before the gate", "gate before the weights"])
def test_a_resumed_loop_measures_from_where_training_started(form, options, order, tmp_path):
    """Its state keeps the start and the Fisher that was estimated: the same KL and the same masks."""
    config = AlphaTokenConfig(**options)
    model = started(form)
    alphatoken = AlphaToken(model, target=[sft_batch("none")], config=config)
    _train(model, alphatoken, range(3))
    torch.save({"model": model.state_dict(), "alphatoken": alphatoken.state_dict()}, tmp_path / "state.pt")
    expected = _train(model, alphatoken, range(3, 5))

    saved = torch.load(tmp_path / "state.pt")
    again = started(form)
    if order == "gate before the weights":
        resumed = AlphaToken(again, target=[sft_batch("none")], config=config)
        again.load_state_dict(saved["model"])
    else:
        again.load_state_dict(saved["model"])
        resumed = AlphaToken(again, target=[sft_batch("none")], config=config)
    resumed.load_state_dict(saved["alphatoken"])
    for (kl, weights), (its_kl, its_weights) in zip(_train(again, resumed, range(3, 5)), expected, strict=True):
        assert_close(kl, its_kl, 1e-9)
        assert torch.equal(weights, its_weights)


def test_a_state_of_a_base_that_is_trained_too_is_its_own():
    """What tells the base must not be what training moves."""
    model, batch = lora_model("llama", targets=["q_proj"]), sft_batch("right")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer.weight" in name or "lora_" in name)
    config = AlphaTokenConfig(estimator="difference", stability_weight=0.0)
    alphatoken = AlphaToken(model, target=[sft_batch("none")], config=config)
    before = start_of(model).tensors
    assert any("base_layer" in name for name in before)
    step(model)
    sft_loss(model, batch, alphatoken).backward()
    state = alphatoken.state_dict()
    AlphaToken(model, target=[sft_batch("none")], config=config).load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start_of(model).tensors.items())


@pytest.mark.parametrize("options", [{"selection": "random"}, {"config": AlphaTokenConfig(rho=1.0)}])
def test_the_state_of_what_values_nothing_holds_the_start_alone(options):
    """Also where a gate of the default estimator could not be."""
    model = lora_model("llama")
    model.base_model.model.model.norm.weight.requires_grad_()
    state = AlphaToken(model, **options).state_dict()
    assert list(state["start"]["tensors"]) == ["base_model.model.model.norm.weight"] and not state["target"]
    start = start_of(model).tensors["base_model.model.model.norm.weight"].clone()
    step(model)
    again = AlphaToken(model, **options)
    again.load_state_dict(state)
    assert torch.equal(start_of(model).tensors["base_model.model.model.norm.weight"], start)


def test_a_state_replaces_what_was_estimated_since():
    model, batch = lora_model("llama"), sft_batch("right")
    first, second = (AlphaToken(model, target=[sft_batch("none", seed=seed)]) for seed in (0, 1))
    for each in (first, second):
        sft_loss(model, batch, each).backward()
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for name in first.fisher.names
               for a, b in zip(first.fisher.factors[name], second.fisher.factors[name], strict=True))  # fmt: skip
    given = AlphaToken(model, target=[sft_batch("none")], fisher=second.fisher)
    given.load_state_dict(AlphaToken(model, target=[sft_batch("none")]).state_dict())
    assert given.fisher is second.fisher


def test_a_state_of_another_start_is_refused():
    model, other = started("pissa"), started("pissa", seed=1)
    config = AlphaTokenConfig(estimator="difference", stability_weight=0.0)
    first, second = (AlphaToken(m, target=[sft_batch("none")], config=config) for m in (model, other))
    with pytest.raises(ValueError, match=r"state's start.*another base.*Make the model as it was made then"):
        second.load_state_dict(first.state_dict())


def test_a_start_that_was_told_stays_beside_an_earlier_fisher():
    """The Fisher of a first stage keeps that stage's start; the second stage's reference is where it begins."""
    model, batch = started("pissa"), sft_batch("right")
    config = AlphaTokenConfig(estimator="difference")
    fisher = estimate_fisher(model, [batch], config=config, generate=False, progress=False)
    step(model)
    remember_start(model)
    pairs = pair_batch("stacked")
    assert abs(float(dpo_loss(model, None, pairs).detach()) - math.log(2)) < 1e-9
    with pytest.warns(UserWarning, match="keeps another start than the one that remember_start noted"):
        AlphaToken(model, target=[sft_batch("none")], fisher=fisher, config=config)
    assert abs(float(dpo_loss(model, None, pairs).detach()) - math.log(2)) < 1e-9
