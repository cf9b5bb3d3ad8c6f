"""Draws way_of_a_batch.svg, the picture of docs/architecture.md: python docs/images/way_of_a_batch.py"""

from pathlib import Path

INK, ROOM, PLAIN, ROWS = "#1f2933", "#dbeafe", "#f1f3f5", "#b45309"
parts: list[str] = []


def text(x: float, y: float, words: str, style: str = "", colour: str = INK, anchor: str = "middle") -> None:
    size = 'font-family="sans-serif" font-size="13"'
    parts.append(f'<text x="{x}" y="{y}" {size} text-anchor="{anchor}" fill="{colour}"{style}>{words}</text>')


def box(x: int, y: int, w: int, h: int, title: str, *lines: str, room: bool = True) -> None:
    fill = ROOM if room else PLAIN
    parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{INK}"/>')
    top = y + h / 2 - 8 * len(lines) + 5
    text(x + w / 2, top, title, ' font-weight="bold"')
    for number, line in enumerate(lines, 1):
        text(x + w / 2, top + 16 * number, line)


def arrow(*points: tuple[int, int], colour: str = INK, label: str = "", at: tuple[int, int] = (0, 0)) -> None:
    path = " ".join(f"{x},{y}" for x, y in points)
    head = "rows" if colour == ROWS else "ink"
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" marker-end="url(#{head})"/>')
    if label:
        text(*at, label, ' font-style="italic"', colour)


# The forward, left to right.
box(20, 60, 120, 60, "batches/", "every form", "&#8594; one view")
box(180, 60, 130, 60, "model", "first blocks", room=False)
box(330, 60, 130, 60, "model", "last K blocks", room=False)
box(500, 60, 120, 60, "gate", "gate/step.py", "an identity")
box(660, 60, 110, 60, "model", "norm, head", room=False)
box(800, 60, 120, 60, "loss", "any, or losses/", room=False)
for left, right in ((140, 180), (310, 330), (460, 500), (620, 660), (770, 800)):
    arrow((left, 90), (right, 90))
# The backward, right to left.
arrow((865, 120), (865, 260), (770, 260), colour=ROWS, label="gradient, a row a token", at=(840, 310))
box(610, 230, 160, 60, "estimators/", "rows &#8594; values", "one class a module")
arrow((610, 260), (570, 260), colour=ROWS, label="values", at=(592, 220))
box(440, 230, 130, 60, "selection/", "values &#8594; kept", "0 or 1 a token")
arrow((440, 260), (390, 260), colour=ROWS, label="mask", at=(415, 220))
box(250, 230, 140, 60, "gate", "gate/step.py", "rows times mask")
arrow((250, 260), (100, 260), (100, 200), colour=ROWS)
box(20, 150, 160, 50, "adapters", "gradient of the masked loss", room=False)
# What values are taken along.
box(560, 350, 270, 60, "directions/", "target gradient, Fisher drift, Adam's scale", "kept fresh as the model moves")
arrow((695, 350), (695, 290))
box(200, 350, 270, 60, "models/", "structure, scored adapters, reference", "taps and replay of the last K blocks")
arrow((470, 372), (515, 372), (515, 318), (650, 318), (650, 290))


def marker(name: str, colour: str) -> str:
    size = 'markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto"'
    return f'<marker id="{name}" {size}><path d="M0 0 9 4.5 0 9" fill="{colour}"/></marker>'


text(20, 35, "Forward: the ordinary one. Blue: this package. Brown: what goes back.", anchor="start")
ways = "gate/ (AlphaToken), weights.py (alphatoken_weights), trl/ (trainers), tools/ (score, report)"
text(20, 450, f"Ways in: {ways}", anchor="start")
SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 470" role="img" aria-label="The way of a batch">
<defs>
{chr(10).join(map(marker, ("ink", "rows"), (INK, ROWS)))}
</defs>
<rect width="940" height="470" fill="#ffffff"/>
{chr(10).join(parts)}
</svg>
"""

if __name__ == "__main__":
    (Path(__file__).parent / "way_of_a_batch.svg").write_text(SVG, encoding="utf-8")
