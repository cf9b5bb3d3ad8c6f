"""Explicit, slow computations of everything the library reports, from the formulas alone.

Every function works on a deep copy of the model without dropout, contracts in float64, and loops over tokens.
Row `t` predicts `labels[t + 1]`; values are returned at the label, so column 0 is always 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from batches import Batch, is_pairs, response, segments, stacked
from models import FAMILIES, Family, deep_copy
from torch import nn

Rows = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Layer:
    """One LoRA layer of a scored block."""

    name: str
    block: int
    scale: float
    value_rows: tuple[int, ...] | None
    adapter: str

    @property
    def a(self) -> str:
        return f"{self.name}.lora_A.{self.adapter}.weight"

    @property
    def b(self) -> str:
        return f"{self.name}.lora_B.{self.adapter}.weight"


@dataclass
class Values:
    direct_target: torch.Tensor
    causal_target: torch.Tensor
    direct_drift: torch.Tensor
    causal_drift: torch.Tensor
    total: torch.Tensor
    grad_norm: torch.Tensor


TERMS = ("direct_target", "causal_target", "direct_drift", "causal_drift", "total", "grad_norm")


# ------------------------------------------------------------------------------------------- the model


def num_blocks(model: nn.Module) -> int:
    return int(model.config.num_hidden_layers)


def lora_scale(model: nn.Module, name: str, adapter: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, with both patterns."""
    config = model.peft_config[adapter]
    rank, alpha = config.r, config.lora_alpha
    for key, value in config.rank_pattern.items():
        if name.endswith(key):
            rank = value
    for key, value in config.alpha_pattern.items():
        if name.endswith(key):
            alpha = value
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def scored_layers(model: nn.Module, family: Family, k: int | str, adapter: str = "default") -> list[Layer]:
    """The LoRA layers of the last `k` blocks that carry `adapter`."""
    total = num_blocks(model)
    parameters = dict(model.named_parameters())
    layers = []
    for block in range(total - (total if k == "all" else int(k)), total):
        for linear in family.linears:
            name = f"base_model.model.{family.blocks.format(block)}.{linear}"
            if f"{name}.lora_A.{adapter}.weight" in parameters:
                rows = family.value_rows if linear == family.value else None
                layers.append(Layer(name, block, lora_scale(model, name, adapter), rows, adapter))
    return layers


def weights_of(model: nn.Module, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (model.get_parameter(name).detach().double() for name in (layer.a, layer.b))
    return a, b


def frozen_copy(model: nn.Module, reference: str | None = None) -> nn.Module:
    """A copy without checkpointing or dropout; reference: None (as it is), "off", or an adapter's name.

    It stays in train mode but for dropout: in an eval forward 4-bit linears may repack their weights.
    """
    work = deep_copy(model).train()
    for module in work.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    if work.is_gradient_checkpointing:
        work.gradient_checkpointing_disable()
    if reference == "off":
        work.base_model.disable_adapter_layers()
    elif reference is not None:
        work.set_adapter(reference)
    return work


def reference_adapter(model: nn.Module) -> str:
    return "ref" if "ref" in getattr(model, "peft_config", {}) else "off"


def logits_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    keys = ("input_ids", "attention_mask", "position_ids")
    inputs = {key: batch[key] for key in keys if key in batch}
    return model(**inputs, use_cache=False).logits


def token_nll(model: nn.Module, batch: Batch) -> torch.Tensor:
    """`(B, T)`: at the label's column, -log p(label); 0 where there is none and in column 0."""
    logits = logits_of(model, batch)
    labels = batch["labels"]
    nll = torch.zeros(labels.shape, dtype=logits.dtype)
    pieces = -logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    nll[:, 1:] = torch.where(labels[:, 1:] != -100, pieces, torch.zeros_like(pieces))
    return nll


# ---------------------------------------------------------------------------------------------- losses


def reference_logps(model: nn.Module, batch: Batch, ref_model: nn.Module | None = None) -> torch.Tensor:
    """`(2B,)` summed log-probabilities under the reference."""
    rows = stacked(batch)
    if "ref_chosen_logps" in batch:
        return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    work = frozen_copy(model, reference_adapter(model)) if ref_model is None else frozen_copy(ref_model)
    with torch.no_grad():
        return -token_nll(work, rows).sum(1)


def sft_sum(nll: torch.Tensor) -> torch.Tensor:
    return nll.sum()


def margins(nll: torch.Tensor, ref: torch.Tensor, beta: float) -> torch.Tensor:
    """s of every pair."""
    ratios = -nll.sum(1) - ref.to(nll.dtype)
    chosen, rejected = ratios.chunk(2)
    return beta * (chosen - rejected)


def dpo_sum(ref: torch.Tensor, beta: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda nll: -F.logsigmoid(margins(nll, ref, beta)).sum()


def pair_losses(nll: torch.Tensor, ref: torch.Tensor, lengths: torch.Tensor, kind: str, beta: float, eps: float):
    """Per-pair losses by their formulas."""
    s = margins(nll, ref, beta)
    if kind == "sigmoid":
        return -F.logsigmoid(s)
    if kind == "hinge":
        return (1 - s).clamp(min=0)
    if kind == "ipo":
        ratios = (-nll.sum(1) - ref.to(nll.dtype)) / lengths
        chosen, rejected = ratios.chunk(2)
        return (chosen - rejected - 1 / (2 * beta)) ** 2
    if kind == "robust":
        return (-(1 - eps) * F.logsigmoid(s) + eps * F.logsigmoid(-s)) / (1 - 2 * eps)
    if kind == "exo_pair":
        q, log_q, log_not_q = s.sigmoid(), F.logsigmoid(s), F.logsigmoid(-s)
        return q * (log_q - math.log(1 - eps)) + (1 - q) * (log_not_q - math.log(eps))
    raise AssertionError(kind)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = trainable(model)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if grad is None else grad
        for (name, p), grad in zip(parameters.items(), grads, strict=True)
    }


def masked_sft(model: nn.Module, batch: Batch, mask: torch.Tensor, denominator: float):
    """Value of the unmasked mean and the gradients of sum(m * l) / denominator."""
    work = frozen_copy(model)
    rows = stacked(batch)
    nll = token_nll(work, rows)
    value = nll.detach().sum() / response(batch).sum()
    return value, gradients(work, (mask.to(nll.dtype) * nll).sum() / denominator)


def masked_dpo(
    model: nn.Module,
    batch: Batch,
    mask: torch.Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    eps: float = 0.0,
    ref_model: nn.Module | None = None,
):
    """Value of the full loss and its gradients with some tokens' log-probabilities held constant."""
    work = frozen_copy(model)
    rows = stacked(batch)
    ref = reference_logps(model, batch, ref_model)
    nll = token_nll(work, rows)
    mask = mask.to(nll.dtype)
    held = mask * nll + (1 - mask) * nll.detach()
    if "completion_mask" in batch:
        lengths = batch["completion_mask"].sum(1)
    else:
        lengths = (rows["labels"] != -100).sum(1)
    loss = pair_losses(held, ref, lengths, kind, beta, eps).mean()
    return loss.detach(), gradients(work, loss)


def eq14(model: nn.Module, batch: Batch, mask: torch.Tensor, *, beta: float = 0.1):
    """Eq. 14 literally: mean over pairs of omega * sum_t (m+ grad l+ - m- grad l-), omega of full answers."""
    work = frozen_copy(model)
    rows = stacked(batch)
    ref = reference_logps(model, batch)
    nll = token_nll(work, rows)
    omega = (beta * torch.sigmoid(-margins(nll.detach(), ref, beta))).to(nll.dtype)
    pairs = len(omega)
    signed = torch.cat([omega, -omega])[:, None] * mask.to(nll.dtype) * nll
    return gradients(work, signed.sum() / pairs)


# --------------------------------------------------------------------------------- inputs and gradients


def collect(work: nn.Module, names: list[str], loss_of: Callable[[], torch.Tensor]) -> Rows:
    """For each named layer: its input and the loss gradient at its output, `(B, T, .)` in float64."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def save(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            assert name not in seen, f"{name} ran twice"
            seen[name] = (args[0].detach(), output)

        return hook

    def start_graph(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    handles = [work.get_submodule(name).register_forward_hook(save(name)) for name in names]
    handles.append(work.get_input_embeddings().register_forward_hook(start_graph))
    try:
        loss = loss_of()
    finally:
        for handle in handles:
            handle.remove()
    outputs = [seen[name][1] for name in names]
    grads = torch.autograd.grad(loss, outputs)
    return {name: (seen[name][0].double(), grad.double()) for name, grad in zip(names, grads, strict=True)}


@contextlib.contextmanager
def softmax_in_own_dtype() -> Iterator[None]:
    """Eager attention takes its softmax in float32, where float64 padding masks overflow; not in here."""
    original = F.softmax

    def softmax(tensor: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **kw: Any):
        return original(tensor, dim=dim, dtype=tensor.dtype if tensor.dtype == torch.float64 else dtype, **kw)

    nn.functional.softmax = softmax
    try:
        yield
    finally:
        nn.functional.softmax = original


def attention(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    """Per block `(B, T, T)` [query, key], float64: an eager copy's probabilities, mean over query heads."""
    work = frozen_copy(model)
    inner = work.base_model.model if hasattr(work, "peft_config") else work
    inner.set_attn_implementation("eager")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    with torch.no_grad(), softmax_in_own_dtype():
        maps = work(**inputs, use_cache=False, output_attentions=True).attentions
    owner = segments(batch)
    same = (owner[:, :, None] == owner[:, None, :]) & (owner[:, :, None] >= 0)
    assert len(maps) == num_blocks(model)
    return [a.double().mean(1).where(same, 0.0) for a in maps]


# ---------------------------------------------------------------------------------- target, Fisher, drift


def target_gradient(model: nn.Module, batches: list[Batch], names: list[str]) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all response tokens of all batches."""
    work = frozen_copy(model)
    count = sum(int(response(batch).sum()) for batch in batches)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trainable(work).items()}
    for batch in batches:
        for name, grad in gradients(work, token_nll(work, stacked(batch)).sum()).items():
            total[name] += grad.double()
    return {name: total[name] / count for name in names}


def left_out_targets(model: nn.Module, batch: Batch, names: list[str]) -> dict[int, dict[str, torch.Tensor]]:
    """For each sequence: the mean gradient over the response tokens of all other sequences.

    For pairs, the others are the chosen answers of the other pairs.
    """
    work = frozen_copy(model)
    rows, owner, counts = stacked(batch), segments(batch), response(batch)
    ids = [int(i) for i in owner.unique() if i >= 0]
    pairs = len(ids) // 2 if is_pairs(batch) else None
    sums: dict[int, dict[str, torch.Tensor]] = {}
    for i in ids:
        nll = token_nll(work, rows)
        sums[i] = gradients(work, nll[owner == i].sum())
    out: dict[int, dict[str, torch.Tensor]] = {}
    for i in ids:
        others = [j for j in ids if j != i] if pairs is None else [j for j in range(pairs) if j != i % pairs]
        number = sum(int((counts & (owner == j)).sum()) for j in others)
        out[i] = {name: sum(sums[j][name].double() for j in others) / max(number, 1) for name in names}
    return out


def dense_fisher(
    model: nn.Module,
    batch: Batch,
    names: list[str],
    reference: str | None = "off",
    prompts: int | None = None,
) -> dict[str, torch.Tensor]:
    """Mean over sequences of the sum over response rows of (d * d)(h * h)^T, at the reference's layers."""
    work = frozen_copy(model, reference)
    rows = stacked(batch)
    taps = collect(work, names, lambda: token_nll(work, rows).sum())
    mask, owner = response(batch), segments(batch)
    number = len([i for i in owner.unique() if i >= 0]) if prompts is None else prompts
    out = {}
    for name in names:
        h, d = taps[name]
        fisher = torch.zeros(d.shape[-1], h.shape[-1], dtype=torch.float64)
        for b, column in mask.nonzero().tolist():
            t = column - 1
            fisher += (d[b, t] * d[b, t])[:, None] * (h[b, t] * h[b, t])[None, :]
        out[name] = fisher / number
    return out


def random_fisher(model: nn.Module, layers: list[Layer], seed: int = 0) -> dict[str, torch.Tensor]:
    """A positive dense diagonal of the right shape for every layer."""
    generator = torch.Generator().manual_seed(4000 + seed)
    out = {}
    for layer in layers:
        a, b = weights_of(model, layer)
        noise = torch.randn(b.shape[0], a.shape[1], generator=generator, dtype=torch.float64)
        out[layer.name] = noise.exp()
    return out


def factored(fisher: torch.Tensor) -> torch.Tensor:
    """The rank-one form with the same row and column sums."""
    return fisher.sum(1)[:, None] * fisher.sum(0)[None, :] / fisher.sum()


def delta(model: nn.Module, layer: Layer, ref: Layer | None = None) -> torch.Tensor:
    """s B A, less the second adapter's where the reference is one."""
    a, b = weights_of(model, layer)
    out = layer.scale * b @ a
    if ref is not None:
        ref_a, ref_b = weights_of(model, ref)
        out = out - ref.scale * ref_b @ ref_a
    return out


def drift_gradient(
    model: nn.Module,
    layers: list[Layer],
    fisher: dict[str, torch.Tensor],
    ref_layers: list[Layer] | None = None,
) -> dict[str, torch.Tensor]:
    """V_A = s B^T V and V_B = s V A^T with V = F * dW."""
    out = {}
    for i, layer in enumerate(layers):
        a, b = weights_of(model, layer)
        v = fisher[layer.name] * delta(model, layer, None if ref_layers is None else ref_layers[i])
        out[layer.a] = layer.scale * b.T @ v
        out[layer.b] = layer.scale * v @ a.T
    return out


def exact_values(model: nn.Module, batch: Batch, direction: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B, T)`: <grad l_t, D> of every token by forward-mode differentiation of its loss along D."""
    work = frozen_copy(model)
    inner = work.base_model.model
    inner.set_attn_implementation("eager")
    parameters = {name: p.detach() for name, p in work.named_parameters() if name in direction}

    def losses(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        keys = ("input_ids", "attention_mask", "position_ids")
        inputs = {key: batch[key] for key in keys if key in batch}
        logits = torch.func.functional_call(work, changed, kwargs={**inputs, "use_cache": False}).logits
        labels = batch["labels"][:, 1:]
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return F.pad(nll * (labels != -100), (1, 0))

    tangents = {name: direction[name].to(p.dtype) for name, p in parameters.items()}
    with softmax_in_own_dtype():
        return torch.func.jvp(losses, (parameters,), (tangents,))[1]


# ------------------------------------------------------------------------------------------------ values


@dataclass
class Mistakes:
    """Plausible errors, to see that the comparison would notice them."""

    row_shift: int = 0
    swap_a_and_b: bool = False
    lose_scale: bool = False
    flip_sign: bool = False
    sum_heads: bool = False
    window: int = 0
    include_self: bool = False
    transpose_attention: bool = False
    all_rows_of_fused: bool = False


@dataclass
class Site:
    """One scored parameter: its inputs, its errors, and its errors through the values of attention."""

    name: str
    block: int
    h: torch.Tensor
    d: torch.Tensor
    value_d: torch.Tensor | None


def lora_sites(model: nn.Module, layers: list[Layer], taps: Rows, wrong: Mistakes | None = None) -> list[Site]:
    """For A: x and s B^T d; for B: A x and s d. Through the values: d with query and key rows at zero."""
    wrong = wrong or Mistakes()
    sites = []
    for layer in layers:
        a, b = weights_of(model, layer)
        scale = 1.0 if wrong.lose_scale else layer.scale
        x, dy = taps[layer.name]
        dv = None
        if layer.value_rows is not None:
            only = torch.zeros(dy.shape[-1], dtype=torch.float64)
            only[list(layer.value_rows)] = 1.0
            dv = dy if wrong.all_rows_of_fused else dy * only

        def pulled(d: torch.Tensor | None, b: torch.Tensor = b, scale: float = scale) -> torch.Tensor | None:
            return None if d is None else scale * torch.einsum("or,bto->btr", b, d)

        sites.append(Site(layer.a, layer.block, x, pulled(dy), pulled(dv)))
        ax = torch.einsum("ri,bti->btr", a, x)
        sites.append(Site(layer.b, layer.block, ax, scale * dy, None if dv is None else scale * dv))
    return sites


def linear_sites(layers: list[Layer], taps: Rows) -> list[Site]:
    """For linears that are trained themselves."""
    sites = []
    for layer in layers:
        x, dy = taps[layer.name]
        dv = None
        if layer.value_rows is not None:
            dv = torch.zeros_like(dy)
            rows = list(layer.value_rows)
            dv[..., rows] = dy[..., rows]
        sites.append(Site(f"{layer.name}.weight", layer.block, x, dy, dv))
    return sites


def contract(
    model: nn.Module,
    sites: list[Site],
    batch: Batch,
    *,
    target: dict[str, torch.Tensor] | dict[int, dict[str, torch.Tensor]],
    drift: dict[str, torch.Tensor],
    window: int,
    stability_weight: float,
    wrong: Mistakes,
) -> Values:
    """Loops over tokens, and over later positions for the causal terms; matrices are `(d_out, d_in)`."""
    rows = stacked(batch)
    owner = segments(batch)
    maps = attention(model, rows)
    shape = rows["labels"].shape
    width = shape[1]
    out = {name: torch.zeros(shape, dtype=torch.float64) for name in TERMS}
    squares = torch.zeros(shape, dtype=torch.float64)
    sign = -1.0 if wrong.flip_sign else 1.0
    heads = int(model.config.num_attention_heads) if wrong.sum_heads else 1
    swapped = {}
    if wrong.swap_a_and_b:
        for first, second in zip(sites[::2], sites[1::2], strict=True):
            swapped[first.name], swapped[second.name] = second.name, first.name

    for site in sites:
        probabilities = maps[site.block].transpose(1, 2) if wrong.transpose_attention else maps[site.block]
        for row, column in response(batch).nonzero().tolist():
            t = min(max(column - 1 + wrong.row_shift, 0), width - 1)
            goal = target[int(owner[row, column])] if isinstance(next(iter(target)), int) else target
            other = swapped.get(site.name, site.name)
            g, v = goal[other].double(), drift[other]
            d, x = site.d[row, t], site.h[row, t]
            out["direct_target"][row, column] += sign * (d @ g @ x)
            out["direct_drift"][row, column] += d @ v @ x
            squares[row, column] += (d * d).sum() * (x * x).sum()
            if site.value_d is None:
                continue
            mixed = torch.zeros_like(d)
            first_k = t if wrong.include_self else t + 1
            for k in range(first_k, min(t + window + wrong.window, width - 1) + 1):
                mixed += heads * probabilities[row, k, t] * site.value_d[row, k]
            out["causal_target"][row, column] += sign * (mixed @ g @ x)
            out["causal_drift"][row, column] += mixed @ v @ x

    total = out["direct_target"] + out["causal_target"]
    out["total"] = total + stability_weight * (out["direct_drift"] + out["causal_drift"])
    out["grad_norm"] = squares.sqrt()
    return Values(**out)


def token_values(
    model: nn.Module,
    family: str,
    batch: Batch,
    *,
    target: dict[str, torch.Tensor] | dict[int, dict[str, torch.Tensor]],
    fisher: dict[str, torch.Tensor],
    k: int | str = 2,
    window: int = 32,
    stability_weight: float = 1.5,
    beta: float = 0.1,
    adapter: str = "default",
    ref_model: nn.Module | None = None,
    mistakes: Mistakes | None = None,
) -> Values:
    """The four terms, their sum and the ghost norm of every response token of a LoRA model."""
    layers = scored_layers(model, FAMILIES[family], k, adapter)
    ref = reference_adapter(model) if ref_model is None else "off"
    ref_layers = scored_layers(model, FAMILIES[family], k, "ref") if ref == "ref" else None
    rows = stacked(batch)
    loss = dpo_sum(reference_logps(model, batch, ref_model), beta) if is_pairs(batch) else sft_sum
    work = frozen_copy(model)
    taps = collect(work, [layer.name for layer in layers], lambda: loss(token_nll(work, rows)))
    return contract(
        model,
        lora_sites(model, layers, taps, mistakes),
        batch,
        target=target,
        drift=drift_gradient(model, layers, fisher, ref_layers),
        window=window,
        stability_weight=stability_weight,
        wrong=mistakes or Mistakes(),
    )


def full_values(
    model: nn.Module,
    ref_model: nn.Module,
    family: str,
    batch: Batch,
    *,
    target: dict[str, torch.Tensor],
    fisher: dict[str, torch.Tensor],
    k: int | str = 2,
    window: int = 32,
    stability_weight: float = 1.5,
) -> Values:
    """The same for a model whose linears are trained themselves: dense G and dW = W - W_ref."""
    layers = plain_layers(model, FAMILIES[family], k)
    work = frozen_copy(model)
    taps = collect(work, [layer.name for layer in layers], lambda: token_nll(work, batch).sum())
    own, start = dict(model.named_parameters()), dict(ref_model.named_parameters())
    turn = (lambda w: w.T) if family == "gpt2" else (lambda w: w)  # Conv1D keeps (d_in, d_out)
    drift, goal = {}, {}
    for layer in layers:
        name = f"{layer.name}.weight"
        drift[name] = fisher[layer.name] * turn((own[name] - start[name]).detach().double())
        goal[name] = turn(target[name])
    return contract(
        model,
        linear_sites(layers, taps),
        batch,
        target=goal,
        drift=drift,
        window=window,
        stability_weight=stability_weight,
        wrong=Mistakes(),
    )


def plain_layers(model: nn.Module, family: Family, k: int | str) -> list[Layer]:
    """The trainable linears of the last `k` blocks of a model without adapters."""
    total = num_blocks(model)
    parameters = dict(model.named_parameters())
    layers = []
    for block in range(total - (total if k == "all" else int(k)), total):
        for linear in family.linears:
            name = f"{family.blocks.format(block)}.{linear}"
            if parameters[f"{name}.weight"].requires_grad:
                rows = family.value_rows if linear == family.value else None
                layers.append(Layer(name, block, 1.0, rows, ""))
    return layers


# --------------------------------------------------------------------------------------------- selection


def keep(values: torch.Tensor, batch: Batch, rho: float, scope: str = "batch") -> torch.Tensor:
    """`(B, T)` bool: values at or above the (1 - rho) quantile of their group of response tokens."""
    mask = response(batch)
    rows = mask.shape[0]
    groups = []
    if scope == "sequence":
        owner = segments(batch)
        groups = [mask & (owner == i) for i in owner.unique() if i >= 0]
    elif is_pairs(batch):
        chosen = (torch.arange(rows) < rows // 2)[:, None]
        groups = [mask & chosen, mask & ~chosen]
    else:
        groups = [mask]
    out = torch.zeros_like(mask)
    for group in groups:
        if group.any():
            threshold = torch.quantile(values[group].double(), 1 - rho, interpolation="linear")
            out |= group & (values >= threshold)
    return out


def greedy(model, ids, steps, ref="off", eos=None):
    """Continue one prompt with the reference's likeliest tokens, one full forward per token."""
    work = frozen_copy(model, ref)
    ids = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            logits = logits_of(work, {"input_ids": torch.tensor([ids])})
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids


def completions_fisher(model, prompts, steps, names, ref="off", eos=None):
    """Mean over prompts of the greedy completions' dense Fisher, one prompt at a time."""
    total = {name: 0.0 for name in names}
    for prompt in prompts:
        ids = torch.tensor([greedy(model, prompt, steps, ref, eos)])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        part = dense_fisher(model, {"input_ids": ids, "labels": labels}, names, ref)
        total = {name: total[name] + part[name] / len(prompts) for name in names}
    return total
