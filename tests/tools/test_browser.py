"""The pages in headless Chromium: what is there to be read, what hovering shows, and that nothing is loaded."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import batches
import pytest
import torch
from shown import TEXTS, batch_of, tokenizer, values_of

from alphatoken_loss import SampleWriter, TokenValues, show_tokens
from alphatoken_loss.tools.report.report import write_report
from alphatoken_loss.tools.show.page import picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def browse(path: Path, script: str, *options: str) -> Any:
    """What a script that is run at the end of the page returns, by way of the page itself."""
    seen = path.with_suffix(".seen.html")
    probe = (
        "<script>const out = document.createElement('pre'); out.id = 'out';"
        "const wrong = []; addEventListener('error', e => wrong.push(e.message));"
        f"const found = (() => {{ {script} }})();"
        "out.textContent = JSON.stringify([found, wrong, performance.getEntriesByType('resource').length]);"
        "document.body.append(out);</script>"
    )
    seen.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--window-size=1000,900", *options]
    dom = subprocess.run([*command, "--dump-dom", seen.as_uri()], capture_output=True, text=True, timeout=60).stdout
    result, errors, loaded = json.loads(html.unescape(re.findall(r'<pre id="out">(.*?)</pre>', dom, re.S)[0]))
    assert errors == [] and loaded == 0
    return result


def test_text_terms_and_hover(tmp_path):
    batch = batch_of(TEXTS)
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights, path=tmp_path / "map.html")
    result = browse(
        tmp_path / "map.html",
        """
        const spans = [...document.querySelectorAll(".text .t")], map = document.querySelector(".alpha-map");
        const select = document.querySelector("select"), tip = document.querySelector(".tip");
        const paint = () => spans.map(s => Number(s.style.getPropertyValue("--v")));
        const first = paint();
        select.selectedIndex = 3; select.dispatchEvent(new Event("change"));
        const rows = spans.map(span => {
          span.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
          return [...tip.querySelectorAll("tr")].map(r => [...r.cells].map(c => c.textContent));
        });
        const open = getComputedStyle(tip).display;
        map.dispatchEvent(new MouseEvent("mouseleave"));
        return {texts: [...document.querySelectorAll(".text")].map(t => t.textContent), first, second: paint(), rows,
          open, closed: getComputedStyle(tip).display, scripts: document.scripts.length, scale:
          document.querySelector(".high").textContent, bold: document.querySelector(".tip .now th").textContent};
        """,
    )
    for text, expected in zip(result["texts"], TEXTS, strict=True):
        assert text == "".join(picture(letter) or letter for letter in expected or "</s>")
    spans = [span for (row,) in shown.groups for span in row.spans if span.response]
    for term, painted in ((0, result["first"]), (3, result["second"])):
        expected = [max(-1.0, min(1.0, (span.figure(term) or 0.0) / shown._scale(term))) for span in spans]
        assert painted == pytest.approx(expected, abs=2e-3)
    assert result["open"] == "block" and result["closed"] == "none" and result["scripts"] == 2
    assert float(result["scale"]) == pytest.approx(shown._scale(3), rel=1e-3)
    assert result["bold"] == "direct target"
    for span, rows in zip(spans, result["rows"], strict=True):
        cells = {row[0]: row[1:] for row in rows}
        assert cells["token id"] == [str(token.id) for token in span.tokens]
        words = {None: "prompt", True: "kept", False: "dropped"}
        assert cells[""] == [words[token.kept] for token in span.tokens]
        for token, cell in zip(span.tokens, cells["ghost norm"], strict=True):
            assert cell == "-" if not token.figures else float(cell) == pytest.approx(token.figures[-1], rel=1e-3)
        assert len(cells) == 2 + len(fields(TokenValues))


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_pairs_stand_beside_each_other_and_text_is_legible(tmp_path, scheme):
    batch = batches.pair_batch()
    weights, values = values_of(batch)
    show_tokens(None, batch, values, weights=weights, path=tmp_path / "pairs.html")
    boxes, ink, paper = browse(
        tmp_path / "pairs.html",
        """
        const style = getComputedStyle(document.querySelector(".text .t:not(.drop)"));
        const paper = getComputedStyle(document.querySelector(".alpha")).backgroundColor;
        const boxes = [...document.querySelectorAll(".seq")].map(s => s.getBoundingClientRect().toJSON());
        return [boxes, style.color, paper];
        """,
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    for left, right in zip(boxes[::2], boxes[1::2], strict=True):
        assert left["top"] == right["top"] and left["right"] < right["left"]
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert light[0] - light[1] > 500 if scheme == 0 else light[1] - light[0] > 500


def test_the_report_opens_and_its_charts_are_inside_their_frames(tmp_path):
    batch, writer = batches.sft_batch(), SampleWriter(tmp_path, every=1)
    for step in range(30):
        weights, values = values_of(batch, step)
        writer.add(step, batch, type("Valued", (), {"weights": weights, "values": values})())
        writer.log(step, {"loss": 3.0 / (step + 1), "alphatoken/kept": 0.5, "alphatoken/total": torch.rand(()).item()})
    path, _ = write_report(tmp_path, tokenizer=tokenizer())
    outside, charts, maps = browse(
        path,
        """
        const outside = [...document.querySelectorAll("svg *")].filter(e => {
          if (!e.getBBox || e.tagName === "title") return false;
          const b = e.getBBox();
          return b.x < 0 || b.y < 0 || b.x + b.width > 360 || b.y + b.height > 210;
        }).map(e => e.outerHTML);
        const count = name => document.querySelectorAll(name).length;
        return [outside, count("svg"), count(".alpha-map[data-ready]")];
        """,
    )
    assert outside == [] and charts == 3 + len(fields(TokenValues)) + 1 and maps == 3


def test_a_screenshot_is_not_blank(tmp_path):
    batch = batch_of(TEXTS[:3])
    weights, values = values_of(batch)
    show_tokens(tokenizer(), batch, values, weights=weights, path=tmp_path / "map.html")
    browse(tmp_path / "map.html", "return 0;", f"--screenshot={tmp_path / 'shot.png'}")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pixels = torch.tensor(pyplot.imread(tmp_path / "shot.png"))[..., :3]
    blue = (pixels[..., 2] > pixels[..., 0] + 0.15).float().mean()
    orange = (pixels[..., 0] > pixels[..., 2] + 0.15).float().mean()
    assert blue > 1e-3 and orange > 1e-3
