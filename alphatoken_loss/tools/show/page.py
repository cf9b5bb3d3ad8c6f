"""Self-contained HTML pages: escaping, styles, the one script, and files that are never half-written."""

from __future__ import annotations

import html
import unicodedata

_JOINERS = "\u200c\u200d"  # emoji and several scripts are spelled with them


def picture(letter: str) -> str | None:
    """What stands for a character that would be invisible or act on what is around it; `None` for all others."""
    code = ord(letter)
    if letter in "\n\t" or letter in _JOINERS:
        return None
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return None


def visible(text: str) -> str:
    """The text on one line, with its spaces and control characters to be seen."""
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return "".join(marks.get(letter) or picture(letter) or letter for letter in text)


def escape(text: str) -> str:
    """Text as HTML that cannot be anything but text. Line breaks and tabs keep their place and get a mark."""
    parts = []
    for letter in text:
        shown = picture(letter)
        if letter == "\n":
            parts.append('<span class="nl">\n</span>')
        elif letter == "\t":
            parts.append('<span class="tab">\t</span>')
        elif shown is not None:
            parts.append(f'<span class="ctl" title="U+{ord(letter):04X}">{shown}</span>')
        else:
            parts.append(html.escape(letter))
    return "".join(parts)


def page(title: str, body: str) -> str:
    """A whole document that loads nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(visible(title))}</title>\n<style>{PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# Blue and orange are told apart by all common kinds of colour vision; --v in [-1, 1] is a token's share of the scale.
STYLE = """
.alpha { --ink: #1c2126; --soft: #59636e; --line: #d4d9df; --paper: #ffffff; --card: #f6f8fa;
  --plus: 31 111 191; --minus: 219 112 10;
  color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { .alpha { --ink: #e8ebef; --soft: #a3adb8; --line: #3b434c; --paper: #14181c;
  --card: #1d2329; --plus: 64 148 240; --minus: 236 134 36; } }
.alpha .bar { display: flex; flex-wrap: wrap; gap: .4em 1.2em; align-items: center; margin: .4em 0 .8em;
  color: var(--soft); font-size: 13px; }
.alpha select { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: .2em .4em; }
.alpha .scale { display: inline-flex; gap: .5em; align-items: center; font-variant-numeric: tabular-nums; }
.alpha .ramp { width: 9em; height: .9em; border: 1px solid var(--line); border-radius: 2px;
  background: linear-gradient(90deg, rgb(var(--minus) / .7), transparent, rgb(var(--plus) / .7)); }
.alpha .ramp.oneway { background: linear-gradient(90deg, transparent, rgb(var(--plus) / .7)); }
.alpha .group { display: grid; gap: .8em; margin: 0 0 .8em; }
.alpha .group.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20em), 1fr)); }
.alpha .seq { min-width: 0; border: 1px solid var(--line); border-radius: 6px; }
.alpha .seq h3 { margin: 0; padding: .3em .8em; font-size: 12px; font-weight: 600; color: var(--soft);
  border-bottom: 1px solid var(--line); background: var(--card); border-radius: 6px 6px 0 0; }
.alpha .text { padding: .6em .8em; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 14px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.alpha .p { color: var(--soft); }
.alpha .t { --v: 0; cursor: default; padding: .1em 0; border-radius: 2px; box-shadow: inset -1px 0 var(--paper);
  background-image:
    linear-gradient(rgb(var(--plus) / calc(max(0, var(--v)) * .7)) 0 100%),
    linear-gradient(rgb(var(--minus) / calc(max(0, -1 * var(--v)) * .7)) 0 100%); }
.alpha .drop { color: color-mix(in srgb, var(--ink) 60%, transparent); }
.alpha .drop, .alpha .part { text-decoration: underline dotted 2px; text-underline-offset: 3px; }
.alpha .t:hover, .alpha .t.on { outline: 2px solid var(--ink); color: var(--ink); }
.alpha .nl::before { content: "⏎"; color: var(--soft); }
.alpha .tab::before { content: "⇥"; color: var(--soft); }
.alpha .nl, .alpha .tab { text-decoration: none; }
.alpha .ctl { color: var(--soft); font-size: .85em; }
.alpha .tip { position: fixed; z-index: 9; display: none; max-width: min(46em, 94vw); pointer-events: none;
  padding: .5em .7em; border: 1px solid var(--line); border-radius: 6px; background: var(--card); color: var(--ink);
  box-shadow: 0 3px 14px rgb(0 0 0 / .25); font-size: 12.5px; }
.alpha .tip table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.alpha .tip th { text-align: left; font-weight: 500; color: var(--soft); padding-right: 1em; }
.alpha .tip td { text-align: right; padding-left: .8em; }
.alpha .tip tr.now th, .alpha .tip tr.now td { font-weight: 700; color: var(--ink); }
.alpha .tip q { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .alpha .t { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: #ffffff; }
@media (prefers-color-scheme: dark) { body { background: #14181c; } }
body > .alpha { max-width: 76em; margin: 0 auto; padding: 1em 1.4em 3em; box-sizing: border-box; }
"""
# Token texts never pass through innerHTML: they are moved as text nodes only.
SCRIPT = """
(() => {
  const number = v => v == null ? "-" : v === 0 ? "0" :
    Math.abs(v) >= 0.01 && Math.abs(v) < 1e4 ? v.toPrecision(4) : v.toExponential(3);
  const add = (parent, tag, text) => {
    const node = parent.appendChild(document.createElement(tag));
    if (text !== undefined) node.textContent = text;
    return node;
  };
  for (const map of document.querySelectorAll(".alpha-map:not([data-ready])")) {
    map.dataset.ready = "1";
    const terms = JSON.parse(map.dataset.terms);   // [name, words, scale, oneway]
    const select = map.querySelector("select"), ramp = map.querySelector(".ramp");
    const tip = add(map, "div"), spans = [...map.querySelectorAll(".t")];
    tip.className = "tip"; tip.setAttribute("role", "tooltip");
    const tokens = span => JSON.parse(span.dataset.v);  // [id, kept, figures] each
    let pinned = null;
    const paint = () => {
      const at = select.selectedIndex, [, , scale, oneway] = terms[at];
      for (const span of spans) {
        const found = tokens(span).map(t => t[2][at]).filter(v => v != null);
        const mean = found.length ? found.reduce((a, b) => a + b, 0) / found.length : 0;
        span.style.setProperty("--v", scale ? Math.max(-1, Math.min(1, mean / scale)).toFixed(3) : 0);
      }
      ramp.classList.toggle("oneway", oneway);
      map.querySelector(".low").textContent = oneway ? "0" : number(-scale);
      map.querySelector(".high").textContent = number(scale);
    };
    const show = span => {
      tip.replaceChildren();
      const each = tokens(span), head = add(tip, "div"), table = add(tip, "table");
      add(head, "q", span.dataset.text);
      if (each.length > 1) head.append(` shared by ${each.length} tokens`);
      const line = (name, cells, now) => {
        const row = add(table, "tr");
        if (now) row.className = "now";
        add(row, "th", name);
        cells.forEach(cell => add(row, "td", cell));
      };
      line("token id", each.map(t => t[0]));
      const mark = kept => kept === null ? "prompt" : kept ? "kept" : "dropped";
      if (each.some(t => t[1] !== null)) line("", each.map(t => mark(t[1])));
      terms.forEach(([, words], i) => line(words, each.map(t => number(t[2][i])), i === select.selectedIndex));
      tip.style.display = "block";
      const box = span.getClientRects()[0], size = tip.getBoundingClientRect();
      const below = box.bottom + 6 + size.height < innerHeight;
      tip.style.left = Math.max(4, Math.min(box.left, innerWidth - size.width - 8)) + "px";
      tip.style.top = Math.max(4, below ? box.bottom + 6 : box.top - size.height - 6) + "px";
    };
    const hide = () => { tip.style.display = "none"; };
    const pin = span => {
      if (pinned) pinned.classList.remove("on");
      pinned = span === pinned ? null : span;
      if (pinned) { pinned.classList.add("on"); show(pinned); } else hide();
    };
    map.addEventListener("mouseover", e => {
      const span = e.target.closest(".t");
      if (span) show(span); else if (pinned) show(pinned); else hide();
    });
    map.addEventListener("mouseleave", () => pinned ? show(pinned) : hide());
    map.addEventListener("click", e => { const span = e.target.closest(".t"); if (span) pin(span); });
    addEventListener("keydown", e => { if (e.key === "Escape" && pinned) pin(pinned); });
    addEventListener("scroll", () => pinned ? show(pinned) : hide(), {passive: true});
    select.addEventListener("change", paint);
    paint();
  }
})();
"""
