"""The reference's diagonal Fisher, and the drift gradient it gives on the adapters (arXiv 2606.01635, Eqs. 5, 10, 11).

For a linear with input h and output gradient d at a response token, the dense Fisher is the mean over prompts of the
sum over sampled tokens of (d * d)(h * h)^T. The factored form keeps its row sums, column sums and total: F = row
col^T / total, the rank-one matrix with the same marginals (Adafactor, arXiv 1804.04235, section 3).

Parameters that are no linear's weight (other adapters, norms, biases, embeddings) get the diagonal of their own Fisher:
the mean over prompts of the squared gradient of the whole completion's log-likelihood. Gradients of tokens sampled one
after the other are uncorrelated, so its expectation is the same sum over tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .attention import AttentionCall
from .batches import IGNORE, Batch, read_batch
from .blocks import (
    REFERENCE_ADAPTER,
    LinearSite,
    LoraSite,
    Scored,
    Site,
    causal_lm,
    find_blocks,
    find_scored,
    reference_mode,
    unwrap,
    without_noise,
)
from .config import AlphaTokenConfig
from .distributed import all_sum
from .files import write_whole
from .ghost import accumulation_dtype
from .logps import token_logps
from .replay import capture_without_graph, loss_gradients

_FORMAT = "alphatoken_loss.fisher.1"


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information of the scored layers' weights at the reference.

    Attributes:
        factors (`dict`): module name, as in `model.named_modules()` (the LoRA layer, or the plain linear), ->
            `(row, column)`, of shapes `(d_out,)` and `(d_in,)` with equal sums, when factored, or `(diagonal,)` of
            shape `(d_out, d_in)` when dense. Units: squared gradient of the log-likelihood, per prompt.
        prompts (`int`): over how many prompts it was averaged.
        base (`tuple`): some numbers out of the model's input embedding, by which another model is told apart.
        others (`dict`): for scored parameters that are neither LoRA nor a linear's weight, name, as in
            `model.named_parameters()`, -> `(diagonal, reference)` of the parameter's shape: its Fisher, and the value
            it had when this was estimated, from which its drift is measured.
    """

    factors: Mapping[str, tuple[torch.Tensor, ...]]
    prompts: int = 0
    base: tuple[float, ...] = ()
    others: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The modules it covers."""
        return list(self.factors)

    @property
    def form(self) -> str:
        """`"factored"` or `"dense"`."""
        return "dense" if all(len(factor) == 1 for factor in self.factors.values()) else "factored"

    def diagonal(self, name: str) -> torch.Tensor:
        """The `(d_out, d_in)` diagonal that stands for one module, written out.

        Raises:
            KeyError: the module is not covered.
        """
        if name not in self.factors:
            raise KeyError(f"The Fisher has no module {name!r}; it covers {_some(self.names)}.")
        factor = self.factors[name]
        if len(factor) == 1:
            return factor[0]
        row, column = factor
        return torch.outer(row, column / _positive(row.sum()))

    @classmethod
    def from_diagonals(cls, diagonals: Mapping[str, torch.Tensor], *, prompts: int = 0) -> Fisher:
        """A dense Fisher from `(d_out, d_in)` diagonals by module name."""
        return cls({name: (diagonal,) for name, diagonal in diagonals.items()}, prompts)

    def factored(self) -> Fisher:
        """The factored form: the same row and column sums, rank one."""
        return Fisher(
            {name: f if len(f) == 2 else (f[0].sum(1), f[0].sum(0)) for name, f in self.factors.items()},
            self.prompts,
            self.base,
            self.others,
        )

    def to(self, device: torch.device) -> Fisher:
        """With its tensors on `device`; itself where they are there."""
        held: tuple[Mapping[str, tuple[torch.Tensor, ...]], ...] = (self.factors, self.others)
        if all(tensor.device == device for named in held for tensors in named.values() for tensor in tensors):
            return self
        factors = {name: tuple(part.to(device) for part in parts) for name, parts in self.factors.items()}
        others = {name: (diagonal.to(device), start.to(device)) for name, (diagonal, start) in self.others.items()}
        return replace(self, factors=factors, others=others)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears under its name only when it is whole."""
        path = Path(path)
        tensors = {
            f"{name}|{part}": tensor.detach().cpu().contiguous()
            for name, factor in self.factors.items()
            for part, tensor in enumerate(factor)
        }
        for name, pair in self.others.items():
            tensors |= {f"{name}|other{part}": tensor.detach().cpu().contiguous() for part, tensor in enumerate(pair)}
        path.parent.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"prompts": self.prompts, "base": self.base})
        write_whole(path, lambda file: save_file(tensors, file, metadata={"format": _FORMAT, "about": about}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read what `save` wrote. Whether it fits a model shows when it is first used with one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a saved Fisher.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No Fisher at {path}. Make one with estimate_fisher(...).save(path).")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:
            raise ValueError(f"{path} is not a safetensors file ({error}).") from error
        if about.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a saved Fisher: its format is {about.get('format')!r}, not {_FORMAT!r}.")
        factors: dict[str, tuple[torch.Tensor, ...]] = {}
        others: dict[str, Any] = {}
        for key in sorted(tensors):  # part 0 before part 1
            name, _, part = key.rpartition("|")
            into = others if part.startswith("other") else factors
            into[name] = (*into.get(name, ()), tensors[key])
        saved = json.loads(about["about"])
        return cls(factors, saved["prompts"], tuple(saved["base"]), others)

    def check(self, scored: Scored) -> None:
        """See that it was made for these scored modules.

        Raises:
            ValueError: the modules are not the scored ones, or a shape differs.
        """
        beyond = sorted(set(self.factors) - {site.name for site in scored.sites}) + sorted(
            set(self.others) - set(scored.others)
        )
        if beyond:
            raise ValueError(
                f"The Fisher covers {beyond[0]} ({len(beyond)} such entries), which is not scored. It was made for "
                "another model, adapter layout, estimator or num_layers: estimate it again with this config."
            )
        for name, parameter in scored.others.items():
            if name not in self.others or self.others[name][0].shape != parameter.shape:
                raise ValueError(
                    f"The Fisher has no entry of shape {tuple(parameter.shape)} for the scored parameter {name}. It "
                    "was made for another model, adapter layout, estimator or num_layers: estimate it again with this "
                    "config."
                )
        for site in scored.sites:
            if site.name not in self.factors:
                raise ValueError(
                    f"The Fisher has no entry for the scored module {site.name}; it covers {_some(self.names)}. It was "
                    "made for another model, adapter layout or num_layers: estimate it again with this config."
                )
            factor = self.factors[site.name]
            came = tuple(factor[0].shape) if len(factor) == 1 else (len(factor[0]), len(factor[1]))
            if came != site.shape:
                raise ValueError(
                    f"The Fisher of {site.name} is for a weight of shape {came}, the model's is {site.shape}. It was "
                    "made for another model: estimate it again."
                )

    def check_base(self, model: nn.Module) -> None:
        """See that it was made for this base model, as far as the input embedding tells; precision does not matter.

        Raises:
            ValueError: the embedding is another one.
        """
        here, made = torch.tensor(_base_of(model)), torch.tensor(self.base)
        if len(made) and (made - here).norm() > 0.1 * made.norm():
            raise ValueError(
                "The Fisher was made for another base model: its input embedding differs from this model's. Estimate "
                "it again."
            )

    def drift(self, scored: Scored, ref_model: nn.Module | None) -> dict[str, torch.Tensor]:
        """Gradient of 0.5 * sum(F * dW^2) with respect to each scored parameter (Eqs. 10, 11).

        dW = s B A - s_ref B_ref A_ref is the adapter delta (second part zero when the reference is the base model),
        or W - W_ref for a linear that is trained itself. Factored, no `(d_out, d_in)` matrix is formed for LoRA.

        Returns:
            `dict`: parameter name -> tensor of the parameter's shape, float32 (float64 for a float64 model).
        """
        self.check(scored)
        with torch.no_grad(), torch.autocast(scored.device.type, enabled=False):
            found: dict[str, torch.Tensor] = {}
            alike: dict[Hashable, list[tuple[LoraSite, LoraSite | None]]] = {}
            for site in scored.sites:
                if isinstance(site, LoraSite):
                    reference = _reference_lora(site, ref_model)
                    alike.setdefault(self._kind(site, reference), []).append((site, reference))
                else:
                    found.update(self._linear_drift(site, ref_model))
            for pairs in alike.values():
                found.update(self._lora_drift(*zip(*pairs, strict=True)))
            for name, parameter in scored.others.items():
                dtype = accumulation_dtype(parameter)
                diagonal, start = (tensor.to(parameter.device, dtype) for tensor in self.others[name])
                found[name] = diagonal * (parameter.to(dtype) - start)
        return {name: found[name] for name in scored.parameters}

    def _kind(self, site: LoraSite, reference: LoraSite | None) -> Hashable:
        """Sites of one kind are taken together: the same few kernels for all of them, on stacks of their factors."""
        if len(self.factors[site.name]) == 1:
            return site.name  # a stack of dense diagonals would be large
        weights = site.a.weight, site.b.weight
        start = None if reference is None else (reference.scaling, reference.a.weight.shape)
        return site.scaling, start, *((w.shape, w.dtype, w.device) for w in weights)

    def _lora_drift(self, sites: Sequence[LoraSite], references: Sequence[LoraSite | None]) -> dict[str, torch.Tensor]:
        like, scaling = sites[0].b.weight, sites[0].scaling
        like = like.new_empty((), dtype=accumulation_dtype(like))
        a, b = _stacked((s.a.weight for s in sites), like), _stacked((s.b.weight for s in sites), like)
        left, right = scaling * b, a  # dW = left @ right
        starts = [start for start in references if start is not None]
        if starts:
            left = torch.cat([left, -starts[0].scaling * _stacked((s.b.weight for s in starts), like)], -1)
            right = torch.cat([right, _stacked((s.a.weight for s in starts), like)], -2)
        factors = zip(*(self.factors[site.name] for site in sites), strict=True)
        factor = [_stacked(tensors, like) for tensors in factors]
        if len(factor) == 1:
            pulled = scaling * factor[0] * (left @ right)
            at_a, at_b = b.mT @ pulled, pulled @ a.mT
        else:
            row, column = factor
            weighted = (row * (scaling / _positive(row.sum(-1, keepdim=True))))[..., None] * left
            right = right * column[:, None]
            at_a, at_b = (b.mT @ weighted) @ right, weighted @ (right @ a.mT)
        drifts = zip((site.parameters for site in sites), at_a, at_b, strict=True)
        return {name: drift for names, *both in drifts for name, drift in zip(names, both, strict=True)}

    def _linear_drift(self, site: LinearSite, ref_model: nn.Module | None) -> dict[str, torch.Tensor]:
        if ref_model is None:
            raise ValueError(
                f"{site.name} is trained itself and ref_model is None, so there is nothing to measure drift from. Pass "
                "the model that training started from as ref_model, or set stability_weight=0."
            )
        dtype = accumulation_dtype(site.weight)
        reference = LinearSite(site.name, site.block, _same_module(site.name, ref_model))
        drift = self.diagonal(site.name).to(site.weight.device, dtype) * (
            site.weight.to(dtype) - reference.weight.to(site.weight.device, dtype)
        )
        return {name: drift.T if site.transposed else drift for name in site.parameters}


def _base_of(model: nn.Module) -> tuple[float, ...]:
    weight = causal_lm(model).get_input_embeddings().weight.detach()  # type: ignore[operator]
    places = torch.linspace(0, weight.numel() - 1, 64, dtype=torch.float64).long().to(weight.device)
    return tuple(weight[places // weight.shape[-1], places % weight.shape[-1]].double().tolist())


def _positive(total: torch.Tensor) -> torch.Tensor:
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _stacked(tensors: Iterable[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    first, *rest = (tensor.to(like) for tensor in tensors)
    return torch.stack([first, *rest]) if rest else first[None]  # one that is dense is not copied


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} modules" + (f", such as {names[0]}" if names else "")


def _plain_name(name: str) -> str:
    """A module's name in the model without PEFT around it."""
    return name.removeprefix("base_model.model.")


def _same_module(name: str, ref_model: nn.Module) -> nn.Module:
    for candidate, module in causal_lm(ref_model).named_modules():
        if candidate == _plain_name(name):
            return module
    raise ValueError(f"ref_model has no module {_plain_name(name)}. Use the model that training started from.")


def _reference_lora(site: LoraSite, ref_model: nn.Module | None) -> LoraSite | None:
    """The adapter that the reference has at a site, if any."""
    from peft.tuners.lora import LoraLayer

    if ref_model is None:
        has_reference = REFERENCE_ADAPTER in site.layer.lora_A
        return LoraSite(site.name, site.block, site.layer, REFERENCE_ADAPTER) if has_reference else None
    layer = _same_module(site.name, ref_model)
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) > 1:
        raise ValueError(f"{site.name}: ref_model has several active adapters ({active}). Activate one.")
    return LoraSite(site.name, site.block, layer, active[0]) if active else None


class _SquaredSums:
    """Visitor that adds up (d * d)(h * h)^T, or its row and column sums, over the response rows of a batch."""

    def __init__(self, batch: Batch, dense: bool) -> None:
        self.batch, self.dense = batch, dense
        self.sums: dict[str, tuple[torch.Tensor, ...]] = {}

    def __call__(
        self, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], attention: AttentionCall | None
    ) -> None:
        dtype = accumulation_dtype(error)
        rows = self.batch.rows.flatten()
        d = error.flatten(0, 1).to(dtype).masked_fill(~rows[:, None], 0).square()
        h = inputs[0].flatten(0, 1).to(dtype).masked_fill(~rows[:, None], 0).square()
        with torch.autocast(error.device.type, enabled=False):
            self.sums[site.name] = (d.T @ h,) if self.dense else (d.T @ h.sum(1), h.T @ d.sum(1))


def _reference_scored(scored: Scored, ref_model: nn.Module | None) -> Scored:
    """The scored modules as the reference has them, under their names in the model that is trained."""
    if ref_model is None:
        return scored
    blocks = find_blocks(ref_model)
    if len(blocks) != scored.total:
        raise ValueError(
            f"ref_model has {len(blocks)} blocks and the model {scored.total}. Use the model training started from."
        )
    sites: list[Site] = []
    for site in scored.sites:
        module = _same_module(site.name, ref_model)
        sites.append(LinearSite(site.name, site.block, module))
    return Scored(list(blocks)[-len(scored.blocks) :], sites, len(blocks))


def squared_sums(
    reference: nn.Module, ref_scored: Scored, batch: Batch, dense: bool
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Fisher sums of one batch, whose labels were drawn from `reference` (already in reference mode)."""
    capture, rows = capture_without_graph(reference, ref_scored, batch, lambda m: -token_logps(m, batch).sum())
    visitor = _SquaredSums(batch, dense)
    capture.visit(rows, visitor, causal=False, at_layer=True)
    return visitor.sums


def draw_labels(reference: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with each response label drawn from the reference's own prediction at that place."""
    with torch.no_grad(), without_noise(reference):
        output = reference(**{**batch.inputs, "use_cache": False})
        probabilities = output.logits[batch.rows].float().softmax(-1)
    if not probabilities.isfinite().all():
        raise FloatingPointError("The reference's predictions are not finite, so no labels can be drawn from them.")
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:][batch.rows[:, :-1]] = drawn.to(labels)
    return Batch(batch.inputs, labels)


def fisher_of_batches(
    model: nn.Module,
    scored: Scored,
    ref_model: nn.Module | None,
    batches: Iterable[Batch],
    *,
    dense: bool,
    seed: int = 0,
) -> Fisher:
    """The cheap estimate: labels of given batches drawn from the reference's predictions, no generation.

    Every sequence that has a response counts as one prompt.
    """
    generator = torch.Generator(scored.device).manual_seed(seed)
    sums = _Sums(model, scored, ref_model, dense)
    count = 0
    for batch in batches:
        if not bool(batch.rows.any()):
            continue
        with reference_mode(model, ref_model) as reference:
            drawn = draw_labels(reference, batch, generator)
        sums.add(drawn)
        count += batch.segments[batch.rows].unique().numel()
    return sums.mean(count)


class _Sums:
    """Fisher sums over batches whose labels were drawn from the reference."""

    def __init__(self, model: nn.Module, scored: Scored, ref_model: nn.Module | None, dense: bool) -> None:
        self.model, self.scored, self.ref_model, self.dense = model, scored, ref_model, dense
        self.ref_scored = _reference_scored(scored, ref_model)
        self.of_sites = _zeros(scored, dense)
        # Where an adapter is off it has no gradient: the others' is taken with them on, at the values they have now,
        # unless ref_model has parameters of their names.
        own = {} if ref_model is None else dict(unwrap(ref_model).named_parameters())
        self.owner = ref_model if ref_model is not None and all(name in own for name in scored.others) else model
        self.others = {name: own[name] for name in scored.others} if self.owner is ref_model else dict(scored.others)
        self.of_others = {n: torch.zeros_like(p, dtype=accumulation_dtype(p)) for n, p in self.others.items()}

    def add(self, batch: Batch) -> None:
        if self.scored.sites:
            with reference_mode(self.model, self.ref_model) as reference:
                sums = squared_sums(reference, self.ref_scored, batch, self.dense)
            for name, parts in sums.items():
                self.of_sites[name] = tuple(a + b for a, b in zip(self.of_sites[name], parts, strict=True))
        if self.others:
            frozen = [p for p in self.others.values() if not p.requires_grad]
            try:
                for parameter in frozen:
                    parameter.requires_grad_()
                for _, sequence in batch.sequences():
                    for name, gradient in loss_gradients(self.owner, self.others, sequence).items():
                        self.of_others[name] += gradient.to(self.of_others[name]).square()
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)

    def mean(self, count: int) -> Fisher:
        tensors = [tensor for parts in self.of_sites.values() for tensor in parts] + list(self.of_others.values())
        total = all_sum(tensors, count)
        if not total:
            raise ValueError(
                "The Fisher was to be estimated from no response token at all. Give at least one prompt, or batches "
                "with labels other than -100."
            )
        sites = {name: tuple(tensor / total for tensor in parts) for name, parts in self.of_sites.items()}
        others = {n: (sums / total, self.others[n].detach().to(sums).clone()) for n, sums in self.of_others.items()}
        return Fisher(sites, total, _base_of(self.model), others)


def _zeros(scored: Scored, dense: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """Where every process starts, also one that gets no prompts."""
    like = next(iter(scored.parameters.values()))
    options: dict[str, Any] = {"dtype": accumulation_dtype(like), "device": like.device}
    return {
        site.name: (torch.zeros(site.shape, **options),)
        if dense
        else tuple(torch.zeros(size, **options) for size in site.shape)
        for site in scored.sites
    }


def estimate_fisher(
    model: nn.Module,
    prompts: Iterable[Any],
    *,
    tokenizer: Any = None,
    ref_model: nn.Module | None = None,
    config: AlphaTokenConfig | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    max_prompt_length: int = 256,
    temperature: float = 1.0,
    generate: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Fisher:
    """Estimate the reference's diagonal Fisher over the scored layers, once before training (Eq. 5).

    Completions are sampled from the reference itself (adapters off, or the adapter "ref", or `ref_model`); then each
    sampled token's squared gradient is accumulated by going back through the last K blocks only.

    Args:
        model (`nn.Module`): the model to be trained.
        prompts (`Iterable`): strings; lists of token ids; or conversations (lists of `{"role", "content"}`), rendered
            with the tokenizer's chat template. With `generate=False`: SFT batches (mappings with `input_ids`,
            `labels`), whose response labels are drawn anew from the reference's own predictions.
        tokenizer: needed for strings and conversations; gives the padding and end-of-sequence ids.
        config (`AlphaTokenConfig`, *optional*): its `num_layers` and `fisher` are used.
        batch_size (`int`): prompts sampled together.
        max_new_tokens (`int`): sampled tokens per prompt at most.
        max_prompt_length (`int`): prompts are cut to their last so many tokens.
        temperature (`float`): of sampling; 1 is what Eq. 5 asks for.
        seed (`int`): makes sampling reproducible; the global random state is left as it was.
        progress (`bool`): show a progress bar.

    Returns:
        `Fisher`: averaged over prompts, and over processes when training is distributed.

    Raises:
        ValueError: no prompts, an empty prompt, or text without a tokenizer.

    Example:
        >>> fisher = estimate_fisher(model, prompts, tokenizer=tokenizer)
        >>> fisher.save("fisher.safetensors")
    """
    config = config or AlphaTokenConfig()
    scored = find_scored(model, config.scored_layers, config.estimator)
    dense = config.fisher == "dense"
    if not generate:
        batches = tqdm(prompts, desc="Fisher", unit="batch", disable=not progress)
        read = (read_batch(batch).to(scored.device) for batch in batches)
        return fisher_of_batches(model, scored, ref_model, read, dense=dense, seed=seed)
    encoded = [_encode(prompt, tokenizer, max_prompt_length) for prompt in prompts]
    if not encoded:
        raise ValueError("prompts is empty. Give at least one prompt; the paper uses 1,000.")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # little padding
    sums = _Sums(model, scored, ref_model, dense)
    devices = [scored.device] if scored.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        tqdm(total=len(encoded), desc="Fisher", unit="prompt", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            chosen = [encoded[i] for i in order[start : start + batch_size]]
            with reference_mode(model, ref_model) as reference:
                batch = _sample(reference, chosen, tokenizer, max_new_tokens, temperature, scored.device)
            sums.add(batch)
            bar.update(len(chosen))
    return sums.mean(len(encoded))


def _encode(prompt: Any, tokenizer: Any, max_length: int) -> list[int]:
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise ValueError("prompts hold text and tokenizer is None. Pass the model's tokenizer, or token ids.")
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise ValueError("A prompt is empty. Leave it out, or start it with the beginning-of-sequence token.")
    return ids[-max_length:]


def _ids(end: int | list[int] | None) -> set[int]:
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _sample(
    reference: nn.Module,
    prompts: list[list[int]],
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    device: torch.device,
) -> Batch:
    """Sample a completion of each prompt; prompts stand on the left, completions end with their first end token."""
    base = causal_lm(reference)
    pad = getattr(tokenizer, "pad_token_id", None)
    own: GenerationConfig = base.generation_config
    ends = sorted(_ids(getattr(tokenizer, "eos_token_id", None)) | _ids(own.eos_token_id))
    pad = ends[0] if pad is None and ends else pad or 0
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
    )
    try:
        # What the model's own generation config adds (penalties, beams) would make this no sample of the reference.
        base.generation_config = GenerationConfig()
        with torch.no_grad(), without_noise(reference):
            # Not PEFT's `generate`, which leaves an attribute on the model.
            sampled = base.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=config
            )
    finally:
        base.generation_config = own
    completion = sampled[:, longest:]
    ended = torch.isin(completion, torch.tensor(ends, dtype=torch.long, device=device)).long()
    real = ended.cumsum(1) - ended == 0  # up to the first end token, which counts
    attended = torch.cat([mask, real.long()], 1)
    labels = torch.cat([torch.full_like(ids, IGNORE), completion.masked_fill(~real, IGNORE)], 1)
    # Move the padding to the right: then positions count from 0 without `position_ids`, which not every model takes.
    column = torch.arange(sampled.shape[1], device=device)
    order = (column + (mask == 0).sum(1, keepdim=True)) % sampled.shape[1]
    inputs = {"input_ids": sampled.gather(1, order), "attention_mask": attended.gather(1, order)}
    return Batch(inputs, labels.gather(1, order))
