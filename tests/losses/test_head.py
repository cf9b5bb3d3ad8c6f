"""The head run on hidden states: models whose logits are something else are refused, and only where it is used."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from batches import sft_batch
from checks import TOL64, assert_close, assert_same_grads, grads_of
from models import HEADS, HIDDEN, INTER, ROTARY, VOCAB, add_lora, base_model, lora_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BertConfig, CohereConfig, MambaConfig, ModernBertDecoderConfig

from alphatoken_loss import AlphaToken, AlphaTokenConfig, alphatoken_weights, dft_weights, sft_loss
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.losses import head
from alphatoken_loss.losses.logps import _fused_pays

SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": 2,
         "num_attention_heads": HEADS}  # fmt: skip
REFUSED = r"logits of {} are not its output embedding times .*\"ghost\" or \"difference\""


def bert():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(is_decoder=True, **SHAPE, **rates), ["query", "value"]


def modern_bert():
    """Its `get_decoder` returns the output embedding."""
    ends = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    return ModernBertDecoderConfig(**SHAPE, **ends), ["q_proj", "v_proj"]


def transformed(make):
    torch.manual_seed(0)
    config, targets = make()
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train(), type(base).__name__


def gate_of(model, estimator, **changes):
    config = AlphaTokenConfig(estimator=estimator, stability_weight=0.0, **changes)
    return AlphaToken(model, target=cases.validation(), config=config)


@pytest.mark.parametrize("make", [bert, modern_bert])
def test_a_transform_before_the_head_is_refused_by_name(make):
    model, name = transformed(make)
    batch, refused = sft_batch("right"), pytest.raises(ValueError, match=REFUSED.format(name))
    gate = gate_of(model, "path", path_steps=2, path_rate=1e-2)
    with refused, gate(batch):
        model(**batch)
    assert gate.path is None, "refused before theta* is made"
    with refused:
        alphatoken_weights(model, None, batch, target=cases.validation(), config=gate.config)
    with refused:
        sft_loss(model, batch, kl_coef=0.1)
    with refused:
        sft_loss(model, batch, gate_of(model, "ghost"), kl_coef=0.1)
    with refused:
        sft_loss(lora_model("llama"), batch, kl_coef=0.1, ref_model=model)
    with refused:
        dft_weights(model, batch)
    assert not _fused_pays(model) and not head.may_be_plain(model) and head.may_be_plain(lora_model("llama"))


@pytest.mark.parametrize("estimator", ["ghost", "difference"])
@pytest.mark.parametrize("make", [bert, modern_bert])
def test_what_does_not_run_the_head_works(make, estimator):
    model, _ = transformed(make)
    batch, gate = sft_batch("right"), gate_of(model, estimator)
    loss = sft_loss(model, batch, gate)
    loss.backward()
    kept = gate.weights
    assert 0 < float(kept.sum()) < float((batch["labels"] != -100).sum())
    value, grads = reference.masked_sft(model, batch, kept, float(kept.sum()))
    assert_close(loss.detach(), value, TOL64)
    assert_same_grads(grads_of(model), grads, TOL64)


def test_a_scale_that_is_not_known_is_noticed(monkeypatch):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        CohereConfig(num_hidden_layers=2, logit_scale=0.37, **ROTARY), dtype=torch.float64
    )
    read = read_batch(sft_batch("right"))
    assert head.is_plain(base, read)
    head._plain.clear()
    monkeypatch.setattr(head, "_MULTIPLIERS", ())
    with pytest.raises(ValueError, match=REFUSED.format("CohereForCausalLM")):
        head.check_head(base, read)


def test_it_is_told_once_and_changes_nothing():
    model, forwards = lora_model("llama", lora_dropout=0.3), []
    model.get_base_model().register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    rng, gate = torch.get_rng_state(), gate_of(model, "path", path_steps=1, path_rate=1e-2)
    read = read_batch(sft_batch("right"))
    head.check_head(model, read)
    assert torch.equal(rng, torch.get_rng_state()) and forwards == [False] and model.training
    head.check_head(model, read)
    assert forwards == [False]
    sft_loss(model, sft_batch("right"), gate, kl_coef=0.1).backward()
    assert head.is_plain(base_model("llama"), read.of_rows(slice(0))), "an empty batch tells nothing"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_a_hidden_state_in_float32_before_a_bf16_head(kl_coef):
    """Mamba's, whose own forward casts it."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = add_lora(base, targets=["in_proj"])
    gate = gate_of(model, "path", path_steps=1, path_rate=1e-2)
    sft_loss(model, sft_batch("none"), gate, kl_coef=kl_coef).backward()
    assert bool(gate.values.total.isfinite().all()) and float(gate.values.total.abs().max()) > 0


@pytest.mark.parametrize("of_all", [False, True])
def test_inputs_that_are_not_of_rows_are_not_cut(of_all):
    """As the patches of images: then the whole batch runs."""
    model, batch, seen = lora_model("llama"), sft_batch("none"), []
    rows, length = batch["labels"].shape
    if of_all:
        batch["position_ids"] = torch.arange(length)[None]
    hook = model.get_base_model().register_forward_hook(lambda m, args, out: seen.append(out.logits.shape[:2]))
    head.check_head(model, read_batch(batch))
    hook.remove()
    assert seen == [(rows if of_all else 1, 1)]
