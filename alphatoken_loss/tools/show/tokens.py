"""`show_tokens`: the text of a batch, coloured by token value, in a terminal, a notebook or one HTML file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ...batches.batch import Batch
from ...batches.read import read_batch
from ...files import save_text
from ...values import TokenValues
from .page import SCRIPT, STYLE, escape, page, picture
from .spans import Span, Token, TokenRow, spans_of

WORDS = {
    "total": "value",
    "adaptation": "adaptation",
    "stability": "stability",
    "direct_target": "direct target",
    "causal_target": "causal target",
    "direct_drift": "direct drift",
    "causal_drift": "causal drift",
    "grad_norm": "ghost norm",
    "probability": "probability",
    "weight": "weight",
}
_ONE_WAY = {"grad_norm", "probability", "weight"}  # never negative
_BLUE, _ORANGE, _PALE = (31, 111, 191), (219, 112, 10), (240, 240, 240)


def show_tokens(
    tokenizer: Any,
    batch: Mapping[str, Any] | Batch,
    values_or_weights: TokenValues | torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    logps: torch.Tensor | None = None,
    term: str | None = None,
    path: str | Path | None = None,
    title: str = "Token values",
) -> TokenMap:
    """Show what the tokens of a batch are worth and which of them are kept.

    In a notebook the result shows itself; `print(result)` writes plain text with dropped tokens in `[-...-]`;
    `result.print()` writes to the terminal in colour (needs rich); `result.save(path)` writes one HTML file that loads
    nothing, in which pointing at a token shows all its figures.

    Args:
        tokenizer: what made the ids; a processor with a `tokenizer` will do. `None` shows ids in place of text.
        batch (`Mapping`): SFT, packed or pairs, in any form that `alphatoken_weights` takes. Padding is left out, each
            sequence of a packed row stands alone, and pairs stand side by side.
        values_or_weights (`TokenValues` or `torch.Tensor`): values; or `(B, T)` weights, above 0 where a token is kept.
            With `weights` given, a tensor is read as values.
        weights (`torch.Tensor`, *optional*): `(B, T)`, any dtype, above 0 where a token is kept.
        logps (`torch.Tensor`, *optional*): `(B, T)` log-probabilities of the labels, in nats, aligned with them.
        term (`str`, *optional*): what to colour by at first: a field of `TokenValues`, "probability" or "weight". By
            default "total", or else the first there is.
        path (`str` or `Path`, *optional*): save as HTML there.
        title (`str`): of the page.

    Returns:
        `TokenMap`

    Raises:
        TypeError: `values_or_weights` is neither of the two.
        ValueError: a tensor's shape is not the batch's, or there is no such term; the message says which there are.

    Example:
        >>> weights, values = alphatoken_weights(model, None, batch, target=target, return_values=True)
        >>> show_tokens(tokenizer, batch, values, weights=weights, path="tokens.html").print()
    """
    read = read_batch(batch)
    if isinstance(values_or_weights, torch.Tensor):
        if weights is None:
            weights, columns = values_or_weights, {"weight": values_or_weights}
        else:
            columns = {"total": values_or_weights}
    elif isinstance(values_or_weights, TokenValues):
        columns = {f.name: getattr(values_or_weights, f.name) for f in fields(TokenValues)}
    else:
        raise TypeError(
            f"values_or_weights is a {type(values_or_weights).__name__}; it must be TokenValues or a (B, T) tensor of "
            "weights, as alphatoken_weights gives them."
        )
    if logps is not None:
        columns["probability"] = logps.detach().exp()
    columns = {name: column for name, column in columns.items() if column is not None}
    for name, column in (*columns.items(), ("weights", weights)):
        if column is not None and tuple(column.shape) != read.shape:
            raise ValueError(f"{name} has shape {tuple(column.shape)} and the batch {read.shape}; they must agree.")
    if term is None:
        term = next(iter(columns))
    if term not in columns:
        raise ValueError(f"term is {term!r}; there are {', '.join(map(repr, columns))}.")
    shown = TokenMap(_groups(tokenizer, read, list(columns.values()), weights), tuple(columns), term, title)
    if path is not None:
        shown.save(path)
    return shown


@dataclass(frozen=True)
class TokenMap:
    """A batch to be looked at; see `show_tokens`.

    Attributes:
        groups: what stands side by side: one sequence, or the chosen and the rejected one of a pair.
        terms: names of the figures of each token.
        term: the one that colours.
        title: of the page.
    """

    groups: tuple[tuple[TokenRow, ...], ...]
    terms: tuple[str, ...]
    term: str
    title: str

    def __str__(self) -> str:
        """Plain text: dropped tokens stand in `[-...-]`, line breaks have a mark."""
        return "\n".join(f"{seq.title}\n{_plain(seq)}\n" for group in self.groups for seq in group)

    def __repr__(self) -> str:
        return f"TokenMap({sum(map(len, self.groups))} sequences, by {self.term})"

    def _repr_html_(self) -> str:
        return f"<style>{STYLE}</style><div class='alpha'>{self.html()}</div><script>{SCRIPT}</script>"

    def first(self, count: int) -> TokenMap:
        """The first `count` sequences or pairs."""
        return replace(self, groups=self.groups[:count])

    def save(self, path: str | Path) -> Path:
        """Write one HTML file; it takes the place of an older one only when it is complete."""
        heading = f"<h1>{escape(self.title)}</h1>"
        return save_text(path, page(self.title, f'<div class="alpha">{heading}{self.html()}</div>'))

    def html(self) -> str:
        """The map as a part of a page that has the styles and the script."""
        scales = [self._scale(i) for i in range(len(self.terms))]
        about = [(t, WORDS[t], _short(scale), t in _ONE_WAY) for t, scale in zip(self.terms, scales, strict=True)]
        at = self.terms.index(self.term)
        options = "".join(
            f"<option{' selected' if name == self.term else ''}>{html.escape(words)}</option>"
            for name, words, *_ in about
        )
        spans = [span for seq in self._sequences() for span in seq.spans]
        key = '<span class="p">prompt</span>'
        key += '<span class="drop">dropped</span>' if any(span.dropped for span in spans) else ""
        key += '<span class="part">partly dropped</span>' if any(span.split for span in spans) else ""
        parts = [
            f'<div class="alpha-map" data-terms="{_attribute(about)}"><div class="bar">'
            f'<label>Colour by <select autocomplete="off">{options}</select></label>'
            '<span class="scale"><span class="low"></span><span class="ramp"></span><span class="high"></span></span>'
            f"{key}</div>"
        ]
        for group in self.groups:
            parts.append(f'<div class="group{" pair" if len(group) > 1 else ""}">')
            for seq in group:
                text = "".join(_span(span, at, scales[at]) for span in seq.spans)
                parts.append(
                    f'<section class="seq"><h3>{html.escape(seq.title)}</h3><div class="text" dir="auto">{text}</div>'
                    "</section>"
                )
            parts.append("</div>")
        return "".join([*parts, "</div>"])

    def print(self, console: Any = None) -> None:
        """Write to a terminal, by rich, or to the given `rich.console.Console`.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.console import Console
        except ImportError as error:
            raise ImportError(
                "Colour in a terminal needs rich: pip install 'alphatoken-loss[plots]'. Without it, print(...) the "
                "map, or save it as HTML."
            ) from error
        (console or Console()).print(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        colour = console.color_system is not None and not console.no_color
        at = self.terms.index(self.term)
        scale = self._scale(at)
        if colour:
            low = Text("0" if self.term in _ONE_WAY else f"{-scale:.3g}", _style(-1.0, False))
            yield Text.assemble(
                f"{WORDS[self.term]}: ", low, " to ", Text(f"{scale:.3g}", _style(1.0, False)), "; ",
                Text("dropped", "dim strike"),
            )  # fmt: skip
        for seq in self._sequences():
            yield Text(f"── {seq.title}", "bold")
            if not colour:
                yield Text(_plain(seq))
                continue
            line = Text()
            for span in seq.spans:
                figure = span.figure(at)
                share = figure / scale if figure is not None and scale else 0.0
                line.append(_one_sign(span.text), _style(share, span.dropped) if span.response else "dim")
            yield line

    def _sequences(self) -> Iterator[TokenRow]:
        return (seq for group in self.groups for seq in group)

    def _scale(self, term: int) -> float:
        """What the full colour stands for: 95% of the response tokens are no further from 0."""
        figures = [t.figures[term] for seq in self._sequences() for span in seq.spans for t in span.tokens if t.figures]
        sizes = sorted(abs(figure) for figure in figures if figure is not None)
        if not sizes:
            return 0.0
        return sizes[int(0.95 * (len(sizes) - 1))] or sizes[-1]


def _groups(
    tokenizer: Any, batch: Batch, columns: list[torch.Tensor], weights: torch.Tensor | None
) -> tuple[tuple[TokenRow, ...], ...]:
    ids = batch.inputs["input_ids"].cpu()
    response = batch.at_labels(torch.ones_like(batch.labels)).bool().cpu()
    kept = None if weights is None else (weights > 0).cpu()
    figures = torch.stack([column.detach().double().cpu() for column in columns], -1)
    padding = getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)
    sequences: dict[int, list[TokenRow]] = {}
    for row in range(batch.shape[0]):
        places = batch.segments[row].cpu()
        if batch.attended is not None:
            places = places.masked_fill(~batch.attended[row].cpu() & ~response[row], -1)
        for number in places[places >= 0].unique():
            columns_of = (places == number).nonzero().flatten()
            if batch.packed and not response[row, columns_of].any() and bool((ids[row, columns_of] == padding).all()):
                continue
            tokens = [
                Token(
                    int(ids[row, t]),
                    bool(kept[row, t]) if kept is not None and response[row, t] else None,
                    tuple(map(_finite, figures[row, t].tolist())) if response[row, t] else (),
                )
                for t in columns_of.tolist()
            ]
            sequences.setdefault(row, []).append(TokenRow("", tuple(spans_of(tokenizer, tokens))))
    if not batch.pairs:
        every = [sequence for row in sequences.values() for sequence in row]
        return tuple((TokenRow(f"sequence {i}{_share(s)}", s.spans),) for i, s in enumerate(every))
    half = batch.shape[0] // 2
    pairs = []
    for i in range(half):
        branches = (("chosen", sequences.get(i, [])), ("rejected", sequences.get(i + half, [])))
        pairs.append(
            tuple(TokenRow(f"pair {i}, {word}{_share(s)}", s.spans) for word, found in branches for s in found)
        )
    return tuple(pairs)


def _share(sequence: TokenRow) -> str:
    marks = [token.kept for span in sequence.spans for token in span.tokens if token.kept is not None]
    return f": {sum(marks)} of {len(marks)} response tokens kept" if marks else ""


def _finite(figure: float) -> float | None:
    return figure if abs(figure) < float("inf") else None


def _short(figure: float | None) -> float | None:
    return None if figure is None else float(f"{figure:.6g}")


def _attribute(value: Any) -> str:
    return html.escape(json.dumps(value, separators=(",", ":"), allow_nan=False))


def _span(span: Span, term: int, scale: float) -> str:
    if not span.response:
        return f'<span class="p">{escape(span.text)}</span>'
    figure = span.figure(term)
    share = max(-1.0, min(1.0, figure / scale)) if figure is not None and scale else 0.0
    tokens = [(t.id, t.kept, [_short(f) for f in t.figures]) for t in span.tokens]
    mark = " part" if span.split else " drop" if span.dropped else ""
    return (
        f'<span class="t{mark}" style="--v:{share:.3f}" data-text="{html.escape(_one_sign(span.text, keep=""))}" '
        f'data-v="{_attribute(tokens)}">{escape(span.text)}</span>'
    )


def _one_sign(text: str, keep: str = "\n") -> str:
    """The text with marks for what is not to be seen; line breaks remain behind their mark where they are kept."""
    marks = {"\n": f"⏎{keep}", "\t": "⇥\t" if keep else "⇥"}
    return "".join(marks.get(letter) or picture(letter) or letter for letter in text)


def _plain(sequence: TokenRow) -> str:
    """Text in which runs of dropped tokens stand between marks."""
    parts, open_ = [], False
    for span in sequence.spans:
        if span.dropped != open_:
            parts.append("[-" if span.dropped else "-]")
            open_ = span.dropped
        parts.append(_one_sign(span.text))
    return "".join([*parts, "-]" if open_ else ""])


def _style(share: float, dropped: bool) -> str:
    """A rich style: dark text on paper that turns blue or orange, also where the terminal itself is dark."""
    share = max(-1.0, min(1.0, share))
    full = _BLUE if share > 0 else _ORANGE
    red, green, blue = (round(p + abs(share) * 0.7 * (c - p)) for p, c in zip(_PALE, full, strict=True))
    return f"{'dim strike ' if dropped else ''}rgb(20,20,20) on rgb({red},{green},{blue})"
