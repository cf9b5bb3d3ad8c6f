"""Small charts as SVG text: lines and quantile bands over an axis of numbers. They take their colours from the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 28, 34
CHART_STYLE = """
.alpha .charts { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21em), 1fr)); }
.alpha svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--paper);
  color: var(--soft); font: 11px system-ui, sans-serif; }
.alpha svg text { fill: currentColor; } .alpha svg .name { font-weight: 600; font-size: 12px; fill: var(--ink); }
.alpha svg .grid { stroke: var(--line); stroke-width: 1; } .alpha svg .zero { stroke: var(--soft); stroke-width: 1; }
.alpha svg .a { --c: rgb(var(--plus)); } .alpha svg .b { --c: rgb(var(--minus)); }
.alpha svg .line { fill: none; stroke: var(--c); stroke-width: 1.8; } .alpha svg .b.line { stroke-dasharray: 5 3; }
.alpha svg .dot { fill: var(--c); } .alpha svg .band { fill: var(--c); opacity: .2; stroke: none; }
"""


@dataclass(frozen=True)
class Line:
    """Points of a curve; a name appears in the legend, and `bands` are (low, high) for each x, drawn beneath."""

    y: Sequence[float]
    name: str = ""
    bands: Sequence[Sequence[tuple[float, float]]] = ()


def chart(title: str, x: Sequence[float], lines: Sequence[Line], *, x_name: str, from_zero: bool = False) -> str:
    """One to two lines over the same x, both ascending; points that are not finite leave a gap."""
    ends = [v for line in lines for v in (*line.y, *(v for band in line.bands for pair in band for v in pair))]
    finite = [v for v in ends if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    low = min(low, 0.0) if from_zero else low
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
    ticks, low, high = _ticks(low, high)
    first, last = (min(x), max(x)) if x else (0.0, 1.0)
    first, last = (first - 0.5, last + 0.5) if first == last else (first, last)

    def at(v: float) -> str:
        return f"{_LEFT + (v - first) / (last - first) * (WIDTH - _LEFT - _RIGHT):.1f}"

    def up(v: float) -> str:
        return f"{HEIGHT - _BOTTOM - (v - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="name" x="10" y="17">{html.escape(title)}</text>'
    ]
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{up(tick)}" y2="{up(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{float(up(tick)) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in [t for t in _ticks(first, last)[0] if first <= t <= last]:
        parts.append(f'<text x="{at(tick)}" y="{HEIGHT - 18}" text-anchor="middle">{_number(tick)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_name)}</text>')
    for kind, line in zip("ab", lines, strict=False):
        for band in line.bands:
            known = [(v, *pair) for v, pair in zip(x, band, strict=True) if all(map(math.isfinite, pair))]
            edge = [f"{at(v)},{up(b)}" for v, _, b in known] + [f"{at(v)},{up(a)}" for v, a, _ in reversed(known)]
            parts.append(f'<polygon class="{kind} band" points="{" ".join(edge)}"/>')
        for run in _runs(x, line.y):
            points = " ".join(f"{at(v)},{up(w)}" for v, w in run)
            parts.append(f'<polyline class="{kind} line" points="{points}"/>')
            if len(run) == 1 or len(x) <= 24:
                for v, w in run:
                    about = f"<title>{v:g}: {w:.5g}</title>"
                    parts.append(f'<circle class="{kind} dot" cx="{at(v)}" cy="{up(w)}" r="2.4">{about}</circle>')
    named = [(kind, line.name) for kind, line in zip("ab", lines, strict=False) if line.name]
    for i, (kind, name) in enumerate(named):
        right = WIDTH - _RIGHT - 80 * (len(named) - i)
        parts.append(f'<polyline class="{kind} line" points="{right},13 {right + 18},13"/>')
        parts.append(f'<text x="{right + 22}" y="17">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _runs(x: Sequence[float], y: Sequence[float]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for v, w in zip(x, y, strict=True):
        if math.isfinite(w):
            runs[-1].append((v, w))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float) -> tuple[list[float], float, float]:
    """About four round numbers, and the range widened to them."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)], first * step, last * step


def _number(v: float) -> str:
    return f"{v:.3g}".replace("e-0", "e-").replace("e+0", "e")
