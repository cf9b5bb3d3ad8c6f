"""What passes the gate, what blocks exchange, and whom attention is replaced for, where architectures differ."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers
from batches import Batch, response, sft_batch
from checks import TOL64, assert_close, assert_same_grads, grads_of
from gates import checkpointed
from models import HEAD_DIM, ROTARY, add_lora, base_model, lora_model
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alphatoken_loss import AlphaToken, AlphaTokenConfig, dpo_loss, sft_loss, target_gradient
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.models import modes
from alphatoken_loss.models.attention import replaced_attention
from alphatoken_loss.models.sites import find_scored
from alphatoken_loss.models.structure import find_blocks, find_decoder, trained_behind

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, output_router_logits=True)
LINEAR_ATTENTION = dict(
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, head_dim=HEAD_DIM
)
GEMMA = dict(vocab_size_per_layer_input=61, hidden_size_per_layer_input=8, head_dim=HEAD_DIM, sliding_window=6)
BY_TURNS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
NO_GROUPS = {
    key: value for key, value in ROTARY.items() if key not in ("num_key_value_heads", "max_position_embeddings")
}
OPT = {key: value for key, value in ROTARY.items() if key not in ("num_key_value_heads", "intermediate_size")}
FALCON = {key: value for key, value in NO_GROUPS.items() if key != "intermediate_size"} | {"alibi": False}

# name -> (class, config's class, settings, adapted linears)
MODELS = {
    "qwen3.5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {**ROTARY, **LINEAR_ATTENTION, "layer_types": ["linear_attention", "full_attention"] * 2},
        "all-linear",
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "multi_query": True, "parallel_attn": True},
        "all-linear",
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **ROTARY,
            "head_dim": HEAD_DIM,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 32,
        },
        ATTENTION,
    ),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **ROTARY,
            **GEMMA,
            **BY_TURNS,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        ATTENTION,
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {**ROTARY, **GEMMA, **BY_TURNS, "num_kv_shared_layers": 2},
        "all-linear",
    ),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {**ROTARY, "layer_types": ["conv", "full_attention"] * 2}, "all-linear"),
}


@functools.cache
def _weights(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    cls, config, settings, targets = MODELS[name]
    settings = {**settings, "num_hidden_layers": 4, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    base = getattr(transformers, cls)._from_config(getattr(transformers, config)(**settings), dtype=dtype)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    targets = targets if isinstance(targets, str) else list(targets)
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for i, (_, p) in enumerate(model.named_parameters()):
            if p.dim() > 1:
                p.copy_((0.15 * _weights(tuple(p.shape), i)).to(dtype))
    return model.train()


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logps = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    losses = -logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    return torch.nn.functional.pad(losses, (1, 0))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.filterwarnings("ignore:A scored block has no adapter", "ignore:The attention of a scored block")
@pytest.mark.filterwarnings("ignore:.*takes no part in ghost values")
@pytest.mark.parametrize("estimator", ["ghost", "difference"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_masked_loss(name, estimator):
    model, batch = made(name), sft_batch("right")
    config = AlphaTokenConfig(estimator=estimator, rho=0.5)
    alphatoken = AlphaToken(model, target=[sft_batch("none", 5)], config=config)
    with alphatoken(batch):
        model(**batch, use_cache=False).loss.backward()
    found, kept = grads_of(model), alphatoken.weights
    assert 0 < kept.sum() < response(batch).sum()
    model.zero_grad()
    masked = (token_losses(model, batch) * kept).sum() / response(batch).sum()
    # Some models compute a part in float32 whatever their own precision.
    assert_same_grads(found, gradients(model, masked), 1e-5)


@pytest.mark.parametrize("layers", [2, "all"])
def test_shared_keys_and_values_keep_their_gradient_in_a_replay(layers):
    model, batch = made("gemma4"), sft_batch("none", 5)
    config = AlphaTokenConfig(estimator="difference", num_layers=layers, stability_weight=0)
    wanted = gradients(model, token_losses(model, batch).sum() / response(batch).sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = target_gradient(model, [batch], config=config).gradients
    inside = {n: g for n, g in found.items() if float(wanted[n].abs().max()) > 0}
    assert len(inside) > 8
    for name, gradient in inside.items():
        assert_close(gradient, wanted[name], 1e-5, name)


def opt_350m() -> torch.nn.Module:
    settings = {**OPT, "num_hidden_layers": 3, "ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    base = transformers.OPTForCausalLM(transformers.OPTConfig(**settings, dropout=0.0)).double()
    config = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(base, config).train()


def test_a_projection_after_the_blocks_lies_behind_them_whatever_its_registration():
    model = opt_350m()
    assert {name.split(".")[-4] for name in trained_behind(model, find_blocks(model))} == {"project_out"}
    assert trained_behind(model) == []
    with pytest.raises(ValueError, match=r'project_out.*lies behind the last block.*estimator="difference"'):
        AlphaToken(model, target=[sft_batch("none")])
    batch = sft_batch("right")
    alphatoken = AlphaToken(model, target=[sft_batch("none", 5)], config=AlphaTokenConfig(estimator="difference"))
    with alphatoken(batch):
        model(**batch, use_cache=False).loss.backward()
    found = grads_of(model)
    model.zero_grad()
    masked = (token_losses(model, batch) * alphatoken.weights).sum() / response(batch).sum()
    assert_same_grads(found, gradients(model, masked), TOL64)


def test_what_precedes_the_blocks_is_not_behind_them():
    model = made("gemma4")
    assert any("per_layer_model_projection" in name for name, p in model.named_parameters() if p.requires_grad)
    assert trained_behind(model, find_blocks(model)) == []


def test_the_decoder_of_an_lm_that_gives_itself_is_its_body():
    model = made("llama4")
    assert type(find_decoder(model)).__name__ == "Llama4TextModel"


@pytest.mark.parametrize("how", ["model", "block", "forward", "returned"])
def test_compiled_code_is_refused(how):
    model, batch = lora_model("llama", dtype=torch.float32), sft_batch("right")
    alphatoken = AlphaToken(model, target=[sft_batch("none")], config=AlphaTokenConfig(stability_weight=0))
    running, block = torch.compile(model, backend="eager") if how == "returned" else model, find_blocks(model)[1]
    if how == "model":
        model.compile(backend="eager")
    elif how == "block":
        block.compile(backend="eager")
    elif how == "forward":
        block.forward = torch.compile(block.forward, backend="eager")
    with pytest.raises(ValueError, match=r"compile.* does not run the hooks"), alphatoken(batch):
        running(**batch, use_cache=False).loss.backward()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "checkpointing"),
    [("ghost", "non_reentrant"), ("difference", "off"), ("exact", "off"), ("given", "off")],
)
def test_code_that_was_compiled_before_the_context_is_refused(estimator, checkpointing):
    """It runs as before after it."""
    model, batch = checkpointed(lora_model("llama", layers=2, dtype=torch.float32), checkpointing), sft_batch("right")
    running = torch.compile(model, backend="eager")
    before = running(**batch, use_cache=False).loss.detach()
    given = estimator == "given"
    config = AlphaTokenConfig(stability_weight=0, **({} if given else {"estimator": estimator}))
    alphatoken = AlphaToken(model, target=None if given else [sft_batch("none")], config=config)
    options = {"weights": response(batch).float()} if given else {}
    with pytest.raises(ValueError, match=r"What torch.compile returned was run"), alphatoken(batch, **options):
        running(**batch, use_cache=False).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(running(**batch, use_cache=False).loss, before)
    torch._dynamo.reset()


def test_a_loss_without_a_shift_is_refused_by_name():
    """BartForCausalLM compares each label with the logits of its own position."""
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    model = transformers.BartForCausalLM(transformers.BartConfig(vocab_size=32, **shape)).eval()
    ids = torch.randint(4, 32, (2, 6))
    logits = model(input_ids=ids).logits
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(float(own), rel=1e-5)
    config = LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="BartForCausalLM compares its logits with the labels of the same positions"):
        AlphaToken(get_peft_model(model, config), target=[sft_batch()])


def test_an_encoder_decoder_is_refused_by_name():
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    config = transformers.BartConfig(vocab_size=61, encoder_ffn_dim=40, decoder_ffn_dim=40, **sizes)
    base = transformers.BartForConditionalGeneration(config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        AlphaToken(model, target=[sft_batch("none")])
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder"):
        sft_loss(model, sft_batch(), response(sft_batch()).double())


def test_reentrant_checkpointing_is_seen_behind_wrappers(monkeypatch):
    model = lora_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    block = find_blocks(model)[0]
    inner = block._gradient_checkpointing_func

    @functools.wraps(inner)
    def wrapped(function, *args, **kwargs):
        return inner(function, *args, **kwargs)

    monkeypatch.setattr(modes, "HOOKS_INSIDE_CHECKPOINT", True)
    for function in (inner, wrapped, functools.partial(wrapped)):
        block._gradient_checkpointing_func = function
        with pytest.raises(ValueError, match="Reentrant checkpointing hides"):
            modes.checkpointed(block)
    block._gradient_checkpointing_func = functools.partial(inner.func, use_reentrant=False)
    assert modes.checkpointed(block)


def test_packed_rows_beside_a_mask_are_refused_and_padded_ones_are_not():
    packed = sft_batch("packed")
    with pytest.raises(ValueError, match="packed in it, and there is an attention_mask"):
        read_batch({**packed, "attention_mask": torch.ones_like(packed["input_ids"])})
    left = sft_batch("left")
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert read_batch({**left, "position_ids": positions}).packed is False


@pytest.mark.parametrize("weights", ["ones", "random"])
def test_a_router_keeps_its_loss_beside_token_weights(weights):
    settings = {**ROTARY, **EXPERTS, "head_dim": HEAD_DIM, "num_hidden_layers": 2, "router_aux_loss_coef": 0.5}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings)).train()
    batch = sft_batch("right")
    given = response(batch).float()
    if weights == "random":
        given = given * torch.rand(given.shape, generator=torch.Generator().manual_seed(1))
    outputs = model(**batch, use_cache=False)
    losses = token_losses(model, batch)
    wanted = (losses * given).sum() / given.sum() + 0.5 * outputs.aux_loss
    assert float(outputs.aux_loss) > 0.1
    assert_close(sft_loss(model, batch, given), wanted, 1e-5)
    if weights == "ones":
        assert_close(sft_loss(model, batch, given), sft_loss(model, batch), 1e-5)


def test_label_smoothing_is_refused_where_a_loss_has_none():
    from batches import pair_batch

    with pytest.raises(ValueError, match='the loss "ipo" has none of'):
        dpo_loss(lora_model("llama"), None, pair_batch(), loss_type="ipo", label_smoothing=0.1)


def test_a_model_of_fewer_blocks_than_the_default_has_all_of_them_scored():
    model = lora_model("llama", layers=2)
    assert len(find_scored(model, AlphaTokenConfig().scored_layers).blocks) == 2
    with pytest.raises(ValueError, match="num_layers is 3, but the model has 2"):
        find_scored(model, 3)


def test_layers_without_the_active_adapter_are_passed_over():
    model = lora_model("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    scored = find_scored(model, "all")
    assert {site.name.split(".")[-1] for site in scored.sites} == {"q_proj", "v_proj"}


def test_what_ghost_values_leave_out_is_told_of_once():
    model = add_lora(base_model("qwen2"), "qwen2", bias="lora_only")
    with pytest.warns(UserWarning, match=r"bias is trained and takes no part in ghost values \(9 such parameters\)"):
        find_scored(model, "all")
    find_scored(model, "all")  # warnings of this package are errors here


def test_other_models_go_on_with_their_kernel_while_attention_is_replaced():
    model, other, batch = lora_model("llama"), lora_model("llama", seed=1), sft_batch("right")
    with torch.no_grad():
        wanted = other(**batch, use_cache=False).logits
    calls, found = [], []

    def replacement(kernel, registered):
        def attention(module, *args, **kwargs):
            calls.append(module)
            return registered(module, *args, **kwargs)

        return attention

    def run():
        with torch.no_grad():
            found.append(other(**batch, use_cache=False).logits)

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with replaced_attention(list(find_blocks(model)), replacement):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not calls
        model(**batch, use_cache=False)
    assert len(calls) == 3 and torch.equal(found[0], wanted)
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
