"""Labels and completions that are drawn from the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ..batches.batch import IGNORE, Batch
from ..models.changes import Changes
from ..models.layout import modules_of
from ..models.modes import without_noise
from ..models.structure import causal_lm


def draw_labels(reference: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with each response label drawn from the reference's own prediction at that place."""
    with torch.no_grad(), without_noise(reference):
        output = reference(**{**batch.inputs, "use_cache": False})
        probabilities = output.logits[batch.rows].float().softmax(-1)
    if not probabilities.isfinite().all():
        raise FloatingPointError(
            "The reference's predictions on a batch (of the target, where there is one) are not finite, so no labels "
            "for the Fisher can be drawn from them. It overflows (use bf16 instead of float16), or its input is not "
            "finite itself."
        )
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:][batch.rows[:, :-1]] = drawn.to(labels)
    return Batch(batch.inputs, labels)


_PROMPTS = "Give texts, lists of token ids, or conversations (lists of mappings with role and content)."


def encode(prompt: Any, tokenizer: Any, max_length: int) -> list[int]:
    """Token ids of a prompt, the last `max_length` of them."""
    if isinstance(prompt, Mapping):
        raise TypeError(
            f"A prompt is a mapping with the keys {sorted(prompt)}. {_PROMPTS} Batches with labels are taken with "
            "generate=False."
        )
    if not isinstance(prompt, Iterable):
        raise TypeError(f"A prompt is a {type(prompt).__name__}. {_PROMPTS}")
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    if isinstance(prompt, str) or isinstance(next(iter(prompt), None), Mapping):
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


def _check_positions(base: nn.Module, prompt: int, new: int) -> None:
    """Raise ValueError where a table of positions (GPT-2's) would end within the completions."""
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    words = base.get_input_embeddings()  # type: ignore[operator]
    learned = (m for m in modules_of(base) if isinstance(m, nn.Embedding) and m is not words)
    if most and prompt + new > most and any(most <= table.num_embeddings <= most + 2 for table in learned):
        raise ValueError(
            f"The model has {most} positions, and prompts of up to {prompt} tokens with {new} new ones need "
            f"{prompt + new}. Lower max_prompt_length or max_new_tokens (in a trainer fisher_prompt_length or "
            "fisher_new_tokens)."
        )


def sample_completions(
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
    _check_positions(base, longest, max_new_tokens)
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
    with torch.no_grad(), without_noise(reference), Changes() as changes:
        # Penalties, beams and the like in the model's own generation config would change the distribution.
        changes.set(base, "generation_config", GenerationConfig())
        for settings in (base.config, base.config.get_text_config()):  # type: ignore[union-attr, operator]
            if getattr(settings, "output_router_logits", False):  # a mixture's router loss, which needs whole sequences
                changes.put(vars(settings), "output_router_logits", False)
        # Not PEFT's `generate`, which leaves an attribute on the model.
        sampled = base.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
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
