"""Tokens as spans of text: what is shown together, and how ids become characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """One token: its id, whether it is kept (`None` on a prompt, or where that is not known) and its figures, one per
    term shown (`None` where the tensor is not finite); no figures on a prompt."""

    id: int
    kept: bool | None
    figures: tuple[float | None, ...]


@dataclass(frozen=True)
class Span:
    """The shortest piece of text that belongs to whole tokens: one token as a rule, several where they share a
    character."""

    text: str
    tokens: tuple[Token, ...]

    @property
    def response(self) -> bool:
        return any(token.figures for token in self.tokens)

    @property
    def dropped(self) -> bool:
        """Whether none of its response tokens is kept."""
        marks = [token.kept for token in self.tokens if token.kept is not None]
        return bool(marks) and not any(marks)

    @property
    def split(self) -> bool:
        """Whether some of its tokens are kept and others dropped."""
        return {True, False} <= {token.kept for token in self.tokens}

    def figure(self, term: int) -> float | None:
        """The mean over its response tokens."""
        found = [t.figures[term] for t in self.tokens if t.figures]
        finite = [figure for figure in found if figure is not None]
        return sum(finite) / len(finite) if finite else None


@dataclass(frozen=True)
class TokenRow:
    """One sequence of the batch, without its padding."""

    title: str
    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


def spans_of(tokenizer: Any, tokens: Sequence[Token]) -> list[Span]:
    """Divide the decoded text over the tokens; the texts of the spans, joined, are the decoded text."""
    if tokenizer is None:
        return [Span(f"⟨{token.id}⟩", (token,)) for token in tokens]
    ids = [token.id for token in tokens]
    ends = _ends(tokenizer, ids)
    if any(after - before > 16 for (before, _), (after, _) in zip([(0, 0), *ends], ends, strict=False)):
        # A decoder whose text depends on what stands far before: read each prefix whole, which takes quadratic time.
        ends = _ends(tokenizer, ids, whole_prefix=True)
    text, spans, token, letter = decode(tokenizer, ids), [], 0, 0
    for next_token, next_letter in ends:
        spans.append(Span(text[letter:next_letter], tuple(tokens[token:next_token])))
        token, letter = next_token, next_letter
    return spans


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of the ids, special tokens included, as it is."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ends(tokenizer: Any, ids: list[int], *, whole_prefix: bool = False) -> list[tuple[int, int]]:
    """Where spans end: (number of tokens, number of characters), the last one at the end of both.

    A span ends behind a token where what was decoded up to it is how the whole text begins, which is not the case
    within a character: bytes of one decode to U+FFFD. Nor does a span end before a combining mark.
    """
    text = decode(tokenizer, ids)
    ends: list[tuple[int, int]] = []
    anchor = token = letter = 0  # decoding from `anchor`, one span back, gives spaces and joints their context
    known = ""
    for i in range(1, len(ids) + 1):
        decoded = decode(tokenizer, ids[anchor:i])
        piece = decoded[len(known) :]
        if not piece and ends and ends[-1][0] == i - 1:
            ends[-1] = (i, letter)  # a token without text of its own
        elif piece and decoded.startswith(known) and text.startswith(piece, letter):
            letter += len(piece)
            if ends and _one_character(text, ends[-1][1]):
                ends[-1] = (i, letter)
            else:
                ends.append((i, letter))
                if not whole_prefix:
                    anchor = token
            token = i
            known = decode(tokenizer, ids[anchor:token])
    if ids and (not ends or ends[-1][1] != len(text)):
        ends.append((len(ids), len(text)))
    elif ids:
        ends[-1] = (len(ids), len(text))
    return ends


def _one_character(text: str, place: int) -> bool:
    """Whether what stands before and after a place in the text is drawn as one sign."""
    before, after = text[place - 1], text[place]
    if (
        unicodedata.category(after).startswith("M")
        or "\u200d" in (before, after)
        or "\U0001f3fb" <= after <= "\U0001f3ff"
    ):
        return True
    flags = 0
    while flags < place and "\U0001f1e6" <= text[place - 1 - flags] <= "\U0001f1ff":
        flags += 1
    return flags % 2 == 1 and "\U0001f1e6" <= after <= "\U0001f1ff"
