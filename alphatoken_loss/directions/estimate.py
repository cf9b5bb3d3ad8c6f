"""Estimating the Fisher: squared gradients for labels that are drawn from the reference's own predictions."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches.batch import Batch
from ..batches.read import read_batch
from ..config import AlphaTokenConfig, read_config
from ..losses.logps import token_logps
from ..models.attention import AttentionCall
from ..models.changes import Changes, undoing
from ..models.processes import all_counts, all_sum
from ..models.reference import reference_mode, same_module
from ..models.replay import capture_without_graph
from ..models.sites import LinearSite, Scored, Site, find_scored
from ..models.start import replaced
from ..models.structure import find_blocks, unwrap
from ..models.tensors import accumulation_dtype
from .fisher import Fisher, base_of
from .gradients import loss_gradients
from .sampling import draw_labels, encode, sample_completions


def _reference_scored(scored: Scored, ref_model: nn.Module | None) -> Scored:
    """The reference's counterparts of the scored modules, under their names in the model that is trained."""
    if ref_model is None:
        return scored
    blocks = find_blocks(ref_model)
    if len(blocks) != scored.total:
        raise ValueError(
            f"ref_model has {len(blocks)} blocks and the model {scored.total}. Use the model training started from."
        )
    sites: list[Site] = []
    for site in scored.sites:
        module = same_module(site.name, ref_model)
        sites.append(LinearSite(site.name, site.block, module))
    return Scored(list(blocks)[-len(scored.blocks) :], sites, len(blocks))


@undoing
def fisher_of_batches(
    model: nn.Module,
    scored: Scored,
    ref_model: nn.Module | None,
    batches: Iterable[Batch],
    *,
    dense: bool,
    seed: int = 0,
) -> Fisher:
    """A cheap estimate without generation: the labels of given batches are drawn from the reference's predictions.

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
        # Where an adapter is off it has no gradient: the others' is taken with them on, at the values they started from
        # or have now, unless ref_model has parameters of their names.
        own = {} if ref_model is None else dict(unwrap(ref_model).named_parameters())
        self.owner = ref_model if ref_model is not None and all(name in own for name in scored.others) else model
        self.others = {name: own[name] for name in scored.others} if self.owner is ref_model else dict(scored.others)
        started = scored.start.tensors if self.owner is model else {}
        self.others |= {n: started[n].clone().requires_grad_() for n in self.others if n in started}
        self.of_others = {n: torch.zeros_like(p, dtype=accumulation_dtype(p)) for n, p in self.others.items()}

    def add(self, batch: Batch) -> None:
        if self.scored.sites:
            with reference_mode(self.model, self.ref_model) as reference:
                loss = lambda model: -token_logps(model, batch).sum()  # noqa: E731
                capture, rows = capture_without_graph(reference, self.ref_scored, batch, loss)
                capture.visit(rows, functools.partial(self._see, batch), causal=False, at_layer=True)
        if self.others:
            with Changes() as changes:
                for parameter in self.others.values():
                    changes.require_grad(parameter, True)
                with replaced(unwrap(self.owner), self.others):
                    for _, sequence in batch.sequences():
                        for name, gradient in loss_gradients(self.owner, self.others, sequence).items():
                            self.of_others[name] += gradient.to(self.of_others[name]).square()

    def _see(
        self, batch: Batch, site: Site, error: torch.Tensor, inputs: tuple[torch.Tensor, ...], _: AttentionCall | None
    ) -> None:
        """Add (d * d)(h * h)^T of the response rows, or its row and column sums."""
        dtype, left_out = accumulation_dtype(error), ~batch.rows.flatten()[:, None]
        d, h = (t.flatten(0, 1).to(dtype).masked_fill(left_out, 0).square() for t in (error, inputs[0]))
        with torch.autocast(error.device.type, enabled=False):
            parts = (d.T @ h,) if self.dense else (d.T @ h.sum(1), h.T @ d.sum(1))
        for total, part in zip(self.of_sites[site.name], parts, strict=True):
            total += part

    def mean(self, count: int) -> Fisher:
        tensors = [tensor for parts in self.of_sites.values() for tensor in parts] + list(self.of_others.values())
        all_sum(tensors)
        (total,) = all_counts([count], tensors[0].device if tensors else None)
        if not total:
            raise ValueError(
                "The Fisher was to be estimated from no response token at all. Give at least one prompt, or batches "
                "with labels other than -100."
            )
        sites = {name: tuple(tensor / total for tensor in parts) for name, parts in self.of_sites.items()}
        others = {n: (sums / total, self.others[n].detach().to(sums).clone()) for n, sums in self.of_others.items()}
        return Fisher(sites, total, base_of(self.model), others, self.scored.start)


def _zeros(scored: Scored, dense: bool) -> dict[str, tuple[torch.Tensor, ...]]:
    """The sums at the start, on every process, also on one that gets no prompts."""
    like = next(iter(scored.parameters.values()))
    options: dict[str, Any] = {"dtype": accumulation_dtype(like), "device": like.device}
    return {
        site.name: (torch.zeros(site.shape, **options),)
        if dense
        else tuple(torch.zeros(size, **options) for size in site.shape)
        for site in scored.sites
    }


@undoing
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
    sampled token's squared gradient is accumulated by going back through the last K blocks only. Trained parameters
    other than linears' and LoRA's, which the difference and path estimators score, take a backward of each sequence.

    Args:
        model (`nn.Module`): the model to be trained.
        prompts (`Iterable`): strings; lists of token ids; or conversations (lists of `{"role", "content"}`), rendered
            with the tokenizer's chat template. With `generate=False`: SFT batches (mappings with `input_ids`,
            `labels`), whose response labels are drawn anew from the reference's own predictions.
        tokenizer: needed for strings and conversations; gives the padding and end-of-sequence ids.
        ref_model (`nn.Module`, *optional*): the reference, if it is a model of its own.
        config (`AlphaTokenConfig`, *optional*): its `estimator`, `num_layers` and `fisher` are used.
        batch_size (`int`): prompts sampled together.
        max_new_tokens (`int`): sampled tokens per prompt at most.
        max_prompt_length (`int`): of a longer prompt the last so many tokens are used.
        temperature (`float`): of sampling; 1 is what Eq. 5 asks for.
        generate (`bool`): sample completions; with False, take batches, see `prompts`.
        seed (`int`): makes sampling reproducible; the global random state is left as it was.
        progress (`bool`): show a progress bar.

    Returns:
        `Fisher`: averaged over prompts, and over processes when training is distributed.

    Raises:
        ValueError: no prompts, an empty prompt, or text without a tokenizer.
        TypeError: `prompts` is one text or batch, or a prompt is of another kind.

    Example:
        >>> fisher = estimate_fisher(model, prompts, tokenizer=tokenizer)
        >>> fisher.save("fisher.safetensors")
    """
    config = read_config(config)
    if isinstance(prompts, str | Mapping):
        raise TypeError(f"prompts is a {type(prompts).__name__}; it must be a list of prompts. Give [prompts].")
    scored = find_scored(model, config.scored_layers, config.scope)
    dense = config.fisher == "dense"
    if not generate:
        batches = tqdm(prompts, desc="Fisher", unit="batch", disable=not progress)
        read = (read_batch(batch).to(scored.device) for batch in batches)
        return fisher_of_batches(model, scored, ref_model, read, dense=dense, seed=seed)
    encoded = [encode(prompt, tokenizer, max_prompt_length) for prompt in prompts]
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
                batch = sample_completions(reference, chosen, tokenizer, max_new_tokens, temperature, scored.device)
            sums.add(batch)
            bar.update(len(chosen))
    return sums.mean(len(encoded))
