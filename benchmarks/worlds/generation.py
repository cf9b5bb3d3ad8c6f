"""Greedy answers of a model, compared with those wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .rows import Row, chunks


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, size: int = 25) -> list[str]:
    """The text of each greedy answer up to its end, prompts of like length together, padded on the left."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found: dict[int, str] = {}
    for some in chunks(order, size):
        length = max(len(prompts[i]) for i in some)
        ids = torch.tensor([[pad] * (length - len(prompts[i])) + list(prompts[i]) for i in some], device=device)
        mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in some], device=device)
        with torch.no_grad():
            options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad, "eos_token_id": end}
            out = model.generate(input_ids=ids, attention_mask=mask, **options)[:, length:]
        for i, answer in zip(some, out.tolist(), strict=True):
            found[i] = tokenizer.decode(answer[: answer.index(end)] if end in answer else answer)
    return [found[i] for i in range(len(prompts))]


def exact_matches(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    new_tokens: int,
    same: Callable[[str, str], bool] | None = None,
) -> float:
    """Share of rows whose greedy answer is the one wanted, up to white space at the ends (or by `same`)."""
    same = same or (lambda a, b: a.strip() == b.strip())
    answers = greedy(model, tokenizer, [row.prompt for row in rows], new_tokens)
    wanted = [tokenizer.decode(row.answer[:-1]) for row in rows]
    return sum(same(a, b) for a, b in zip(answers, wanted, strict=True)) / len(rows)
