"""Liger's kernels and fused losses, which need a GPU: stand-ins that take the same liberties with autograd."""

from __future__ import annotations

import types

import cases
import pytest
import torch
import torch.nn.functional as F
from batches import response, sft_batch
from checks import TOL64, assert_same_grads, grads_of
from models import lora_model
from torch import nn

from alphatoken_loss import AlphaToken, AlphaTokenConfig
from alphatoken_loss.models.structure import causal_lm, find_blocks


class _SiluMul(torch.autograd.Function):
    """Liger's SwiGLU: backward writes the gradients into what was saved, and no version counter tells."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, error):
        gate, up = (tensor.detach() for tensor in ctx.saved_tensors)
        s = gate.sigmoid()
        of_up, of_gate = error * gate * s, error * up * (s + gate * s * (1 - s))
        gate.data.copy_(of_gate)
        up.data.copy_(of_up)
        return gate, up


def mlp_forward(self, x):
    return self.down_proj(_SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


mlp_forward.__module__ = "liger_kernel.transformers.swiglu"


class _Norm(torch.autograd.Function):
    """Liger's RMSNorm: backward writes into the gradient that it is given."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * x * scale

    @staticmethod
    def backward(ctx, error):
        x, weight, scale = ctx.saved_tensors
        along = error * weight
        error.data.copy_(scale * (along - x * scale.square() * (along * x).mean(-1, keepdim=True)))
        return error, None, None


def norm_forward(self, x):
    return _Norm.apply(x, self.weight, self.variance_epsilon)


norm_forward.__module__ = "liger_kernel.transformers.rms_norm"


def plain_norm(self, x):
    """What the stand-in computes, by autograd: transformers' own works in float32."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class _FusedLoss(torch.autograd.Function):
    """Liger's linear cross-entropy: the gradient is made in the forward, and no logits come out."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss = F.cross_entropy(leaf @ weight.T, labels, ignore_index=-100)
            (ctx.gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach()

    @staticmethod
    def backward(ctx, error):
        ctx.gradient.mul_(error)
        return ctx.gradient, None, None


def fused_forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None, **kwargs):
    keep = kwargs.pop("logits_to_keep", 0)
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **kwargs)[0]
    if labels is None:  # as Liger's: logits wherever there is no loss to fuse
        rows = slice(-keep, None) if isinstance(keep, int) else keep
        return types.SimpleNamespace(loss=None, logits=self.lm_head(hidden[:, rows]))
    loss = _FusedLoss.apply(hidden[:, :-1].flatten(0, 1), self.lm_head.weight, labels[:, 1:].flatten())
    return types.SimpleNamespace(loss=loss, logits=None)


def bind(module, forward):
    module.forward = types.MethodType(forward, module)


def with_kernels(model):
    for block in find_blocks(model):
        bind(block.mlp, mlp_forward)
    return with_norm(model, norm_forward)


def with_norm(model, forward):
    for module in causal_lm(model).modules():
        if hasattr(module, "variance_epsilon"):
            bind(module, forward)
    return model


def masked(model, batch, weights):
    """Gradients of the plain model's masked loss."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    loss = (nll.view(len(weights), -1) * weights[:, 1:]).sum() / response(batch).sum()
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "what", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("kernels", "fused loss")), "both"]
)
@pytest.mark.parametrize("estimator", ["ghost", "difference", "path", "exact"])
def test_the_gradient_is_the_masked_one(estimator, what):
    """And values are those of the plain model."""
    batch, config = sft_batch("right"), AlphaTokenConfig(estimator=estimator, stability_weight=0, num_layers="all")
    plain, model = (with_norm(lora_model("llama"), plain_norm) for _ in range(2))
    if what != "fused loss":
        with_kernels(model)
    alphatoken, other = (AlphaToken(each, target=cases.validation(), config=config) for each in (model, plain))
    if what != "kernels":
        bind(causal_lm(model), fused_forward)
    if estimator == "exact" and what != "fused loss":
        with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative.*estimator=\"difference\""):
            step(alphatoken, batch)
        return
    step(alphatoken, batch)
    step(other, batch)
    assert torch.equal(alphatoken.weights, other.weights)
    wanted = other.values.total
    largest = float(wanted.abs().max())  # transformers' own loss works in float32
    torch.testing.assert_close(alphatoken.values.total, wanted, rtol=0, atol=1e-5 * largest)
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = dict(zip(named, masked(plain, batch, alphatoken.weights.double()), strict=True))
    assert_same_grads(grads_of(model), wanted, TOL64)


def step(alphatoken, batch):
    with alphatoken(batch):
        alphatoken.model(**batch, use_cache=False).loss.backward()
