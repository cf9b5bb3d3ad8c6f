"""What was found in a model is kept while the model is as it was, and found anew when it is not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from batches import sft_batch
from models import base_model, lora_model, nf4_lora_model
from peft import LoraConfig
from torch import nn

from alphatoken_loss import AlphaToken, AlphaTokenConfig, sft_loss
from alphatoken_loss.gate.step import ScoredOf
from alphatoken_loss.models import layout
from alphatoken_loss.models.layout import kept, modules_of
from alphatoken_loss.models.structure import find_blocks, trained_behind


@pytest.mark.parametrize("make", [base_model, lora_model, lambda: base_model("gpt2"), nn.Module])
def test_the_walk_is_that_of_torch(make):
    model = make()
    assert modules_of(model) == list(model.modules())
    both = nn.ModuleList([nn.Linear(1, 1)])
    both.append(both[0])  # one module in two places
    both.register_module("none", None)
    assert modules_of(both) == list(both.modules()) and modules_of(both[0], both) == [both[0], both]


def _add(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))


def _compile(model):
    model.base_model.model.model.layers[0].compile()


def _replace(model):
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().clone())


def _rewrap(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


CHANGES = {
    "trained": lambda model: next(model.parameters()).requires_grad_(True),
    "frozen": lambda model: [p.requires_grad_(False) for n, p in model.named_parameters() if "layers.0" in n],
    "module": lambda model: setattr(model.base_model.model.model, "norm", nn.Identity()),
    "parameter": _replace,
    "adapter": _add,
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "compiled": _compile,
    "forward": _rewrap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_found_is_found_anew_after_a_change(change):
    model, times = lora_model("llama", layers=1), []

    def find():
        times.append(1)
        return object()

    first = kept(model, "key", find)
    assert kept(model, "key", find) is first and len(times) == 1
    assert kept(model, "other key", find) is not first and len(times) == 2
    CHANGES[change](model)
    assert kept(model, "key", find) is not first and len(times) == 3


def test_another_active_adapter_and_a_repacked_weight_are_changes():
    model = lora_model("llama", layers=1, others=("second",))
    sites = ScoredOf(model, "block", AlphaTokenConfig(num_layers=1))
    first = sites()
    assert sites() is first
    for name in ("second", "default"):
        model.set_adapter(name)
        assert {site.adapter for site in sites().sites} == {name}
    quantised = nf4_lora_model("llama")
    sites = ScoredOf(quantised, "block", AlphaTokenConfig(num_layers=1))
    sites()
    state = quantised.base_model.model.model.layers[-1].mlp.up_proj.base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="bitsandbytes has repacked this 4-bit weight"):
        sites()


def test_an_error_is_not_kept_and_a_model_is_let_go():
    model, tries = lora_model("llama", layers=1), []
    with pytest.raises(ZeroDivisionError):
        kept(model, "key", lambda: 1 / 0)
    assert kept(model, "key", lambda: tries.append(1) or 7) == 7 and tries
    alphatoken = AlphaToken(model, target=[sft_batch("none")])
    # A user's hook on a block that knows the model, for logging.
    model.base_model.model.model.layers[0].register_forward_hook(lambda *args, known=model: None)
    sft_loss(model, sft_batch("right"), alphatoken).backward()
    assert model in layout._kept
    gone = weakref.ref(model)
    del model, alphatoken
    gc.collect()
    assert gone() is None


def test_nothing_that_was_found_without_a_graph_is_kept():
    """In inference mode no parameter would seem to lie behind the gate."""
    model = lora_model("llama", layers=1)
    model.base_model.model.model.norm.weight.requires_grad_()
    with torch.inference_mode():
        inside = trained_behind(model, find_blocks(model))
    assert inside == trained_behind(model, find_blocks(model)) == ["base_model.model.model.norm.weight"]
