"""The report of a run, one HTML file: what its tokens were worth, which were kept, and the curves of training."""

from __future__ import annotations

import argparse
import html
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...batches.read import read_batch
from ...files import save_text
from ...values import TokenValues
from ..arguments import REPORT_FILE
from ..cli import or_exit
from ..show.charts import CHART_STYLE, Line, chart
from ..show.page import escape, page, visible
from ..show.spans import decode
from ..show.tokens import WORDS, show_tokens
from .samples import FOLDER, METRICS_FILE, Sample, read_log, read_samples

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 10  # of the answer
_STYLE = """
.alpha h1 { font-size: 1.5em; margin: .4em 0 0; } .alpha h2 { font-size: 1.15em; margin: 1.8em 0 .4em; }
.alpha p { margin: .3em 0 .8em; max-width: 60em; color: var(--soft); } .alpha .missing { color: var(--ink);
  border-left: 3px solid rgb(var(--minus)); padding: .3em .8em; background: var(--card); }
.alpha .tables { display: grid; gap: 1.4em; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26em), 1fr)); }
.alpha .types { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
.alpha .types th { text-align: right; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line); }
.alpha .types td { text-align: right; padding: .15em .4em; border-bottom: 1px solid var(--line); }
.alpha .types :first-child { text-align: left; overflow-wrap: anywhere; } .alpha .types caption { text-align: left;
  font-weight: 600; padding-bottom: .3em; }
.alpha code { font: 13px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
"""


@or_exit()
def run(args: argparse.Namespace) -> int:
    """The subcommand: write the report, and print where it is and what it lacks."""
    path, missing = write_report(args.run_dir, out=args.out, tokenizer=args.tokenizer, rows=args.rows)
    print(f"Report written to {path}")
    for what in missing:
        print(f"Missing: {what}")
    return 0


def write_report(
    run_dir: str | Path, *, out: str | Path | None = None, tokenizer: Any = None, rows: int = 6
) -> tuple[Path, list[str]]:
    """Write the report of a run, from what its trainer or `SampleWriter` left in its folder.

    Args:
        run_dir (`str` or `Path`): folder of the run.
        out (`str` or `Path`, *optional*): the HTML file; by default "_alphatoken_report.html" in `run_dir`.
        tokenizer (*optional*): a tokenizer, or where to load it from; by default the one in `run_dir` or in its last
            checkpoint. Without one, token ids are shown.
        rows (`int`): sequences, or pairs, that are shown in full, at least 0.

    Returns:
        `tuple[Path, list[str]]`: the file, and sentences about what is missing from it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds neither logged figures nor samples; or `rows` is negative.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give the output_dir of a training run.")
    if rows < 0:
        raise ValueError(f"rows is {rows}; it must be at least 0.")
    log, samples = _history(folder), list(read_samples(folder))
    if not log and not samples:
        raise ValueError(
            f"{folder} has no {FOLDER} and no trainer_state.json with a log history, so there is nothing to report. "
            "Train with an AlphaToken trainer (sample_every above 0), or record a loop of your own with SampleWriter."
        )
    missing = []
    if not log:
        missing.append("curves: there is neither a trainer_state.json with a log history nor a recorded log.")
    elif not any(name.startswith("alphatoken/") for figures in log for name in figures):
        missing.append("curves of token values: the log has no alphatoken/ figures, as in a run with rho=1.0.")
    if not samples:
        missing.append(
            f"values, positions, tokens and sequences: no samples in {FOLDER}. Train with sample_every above 0."
        )
    if samples and (tokenizer is None or isinstance(tokenizer, (str, Path))):
        tokenizer, problem = _load_tokenizer(folder, tokenizer)
        missing += [problem] if problem else []
    parts = [f"<h1>{escape(f'Token values of {folder.resolve().name}')}</h1>", _summary(log, samples)]
    parts += [f'<p class="missing">Missing: {escape(what)}</p>' for what in missing]
    if log:
        parts.append(_curves(log))
    if samples:
        tokens = [token for sample in samples for token in _tokens(sample)]
        parts += [_distributions(samples), _positions(tokens), _types(tokens, tokenizer)]
        parts.append(_sequences(samples, tokenizer, rows))
    body = f'<style>{_STYLE}{CHART_STYLE}</style><div class="alpha">{"".join(parts)}</div>'
    path = Path(out) if out is not None else folder / REPORT_FILE
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder, so the report cannot be written there.")
    return save_text(path, page(f"Token values of {folder.resolve().name}", body)), missing


def _history(folder: Path) -> list[dict[str, float]]:
    """What was logged: by the recorded lines, else by the trainer's state, whichever goes further."""
    found = []
    if (folder / FOLDER / METRICS_FILE).is_file():
        found.append(read_log(folder / FOLDER / METRICS_FILE))
    for file in [folder / "trainer_state.json", *(c / "trainer_state.json" for c in _checkpoints(folder)[:1])]:
        if file.is_file():
            try:
                state = json.loads(file.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not valid JSON ({error}). Repair or remove it.") from error
            found.append([f for f in state.get("log_history", []) if "loss" in f and "step" in f])
    best: list[dict[str, float]] = max(found, key=lambda log: log[-1]["step"] if log else -1, default=[])
    return sorted(best, key=lambda figures: figures["step"])


def _checkpoints(folder: Path) -> list[Path]:
    """The last one first."""
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in folder.glob("checkpoint-*") if p.is_dir()]
    return [p for _, p in sorted(((int(n), p) for n, p in numbered if n.isdecimal()), reverse=True)]


def _load_tokenizer(folder: Path, name: str | Path | None) -> tuple[Any, str]:
    """The tokenizer, or `None` and why."""
    from transformers import AutoTokenizer

    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(str(name)), ""
        except (OSError, ValueError) as error:
            raise ValueError(f"No tokenizer can be loaded from {name}: {error}") from error
    places = [p for p in (folder, *_checkpoints(folder)) if (p / "tokenizer_config.json").is_file()]
    for place in places[:1]:
        try:
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True), ""
        except (OSError, ValueError) as error:
            return (
                None,
                f"text: the tokenizer in {place} cannot be loaded ({error}), so ids are shown. Pass --tokenizer.",
            )
    return None, "text: no tokenizer is in the folder or its checkpoints, so ids are shown. Pass --tokenizer."


@dataclass(frozen=True)
class _Token:
    """A response token of a sample: where it stands in its answer, as a share of it, and what became of it."""

    id: int
    branch: str
    place: float
    kept: bool
    total: float


def _tokens(sample: Sample) -> Iterator[_Token]:
    batch = read_batch(sample.batch)
    response = batch.at_labels(torch.ones_like(batch.labels)).bool()
    owners = batch.at_labels(batch.segments + 1)  # a label is of its row's sequence, also at the seam of packed ones
    for owner in owners[response].unique():
        places = ((owners == owner) & response).nonzero()
        branch = "" if not batch.pairs else "chosen" if int(places[0, 0]) < batch.shape[0] // 2 else "rejected"
        for i, (row, column) in enumerate(places.tolist()):
            yield _Token(
                int(batch.labels[row, column]),
                branch,
                (i + 0.5) / len(places),
                bool(sample.weights[row, column] > 0),
                float(sample.values.total[row, column]),
            )


def _summary(log: list[dict[str, float]], samples: list[Sample]) -> str:
    words = []
    if log:
        words.append(f"{len(log)} log entries up to step {log[-1]['step']:g}.")
    if samples:
        steps = f"steps {samples[0].step} to {samples[-1].step}" if len(samples) > 1 else f"step {samples[0].step}"
        words.append(
            f"{len(samples)} recorded {'batches' if len(samples) > 1 else 'batch'} from {steps}; a step counts the "
            "optimizer steps taken before."
        )
    return f"<p>{' '.join(words)}</p>"


def _curves(log: list[dict[str, float]]) -> str:
    first = ["loss", "alphatoken/kept"]
    rest = sorted({n for figures in log for n in figures if n.startswith("alphatoken/")} - set(first))
    order = [f"alphatoken/{name}" for name in WORDS]
    rest.sort(key=lambda n: order.index(n) if n in order else len(order))
    about = {
        "loss": "training loss",
        "alphatoken/kept": "share kept",
        "alphatoken/target_age": "age of the target, optimizer steps",
        "alphatoken/seconds": "seconds spent valuing, since the last entry",
        "alphatoken/difference_rms": "effect of the nudge",
    }
    about |= {f"alphatoken/{name}": f"mean {words}" for name, words in WORDS.items()}
    charts = []
    for name in (*first, *rest):
        points = [(f["step"], f[name]) for f in log if isinstance(f.get(name), (int, float))]
        if points:
            x, y = zip(*points, strict=True)
            zero = name in ("alphatoken/kept", "alphatoken/target_age", "alphatoken/seconds")
            title = about.get(name, name.removeprefix("alphatoken/"))
            charts.append(chart(title, x, [Line(y)], x_name="optimizer steps", from_zero=zero))
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _distributions(samples: list[Sample]) -> str:
    charts = []
    for field in fields(TokenValues):
        steps, found = [], []
        for sample in samples:
            values = getattr(sample.values, field.name)
            if values is None:
                continue
            batch = read_batch(sample.batch)
            known = values[batch.at_labels(torch.ones_like(batch.labels)).bool()].double()
            known = known[known.isfinite()]
            if len(known):
                steps.append(float(sample.step))
                found.append(known.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist())
        if found:
            bands = [[(q[0], q[4]) for q in found], [(q[1], q[3]) for q in found]]
            line = Line([q[2] for q in found], bands=bands)
            charts.append(chart(WORDS[field.name], steps, [line], x_name="optimizer steps"))
    return (
        "<h2>Distribution of the terms over training</h2><p>Over the response tokens of each recorded batch, in units "
        "of the loss: the line is the median, the darker band the middle half, the lighter one nine tenths.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _positions(tokens: list[_Token]) -> str:
    x = [(i + 0.5) / _BINS * 100 for i in range(_BINS)]
    lines = []
    for branch in dict.fromkeys(token.branch for token in tokens):
        bins: list[list[bool]] = [[] for _ in range(_BINS)]
        for token in tokens:
            if token.branch == branch:
                bins[min(int(token.place * _BINS), _BINS - 1)].append(token.kept)
        lines.append(Line([sum(b) / len(b) if b else math.nan for b in bins], branch))
    drawn = chart("share kept", x, lines, x_name="place in the answer, %", from_zero=True)
    return (
        f"<h2>Share kept by place in the answer</h2><p>{len(tokens)} response tokens of all recorded batches, in "
        f'tenths of their answer.</p><div class="charts">{drawn}</div>'
    )


def _types(tokens: list[_Token], tokenizer: Any, count: int = 20) -> str:
    types: dict[int, list[_Token]] = defaultdict(list)
    for token in tokens:
        types[token.id].append(token)
    overall = sum(token.kept for token in tokens) / max(len(tokens), 1)
    about = []
    for number, found in types.items():
        kept = sum(token.kept for token in found)
        mean = sum(token.total for token in found) / len(found)
        about.append((number, len(found), kept, mean))
    kept_most = sorted(about, key=lambda t: (-_at_least(t[2], t[1]), -t[1], t[0]))
    kept_most = [t for t in kept_most if t[2] / t[1] > overall][:count]
    dropped_most = sorted(about, key=lambda t: (-_at_least(t[1] - t[2], t[1]), -t[1], t[0]))
    dropped_most = [t for t in dropped_most if t[2] / t[1] < overall][:count]
    tables = _table("Kept most", kept_most, tokenizer) + _table("Dropped most", dropped_most, tokenizer)
    return (
        f"<h2>Share kept by token</h2><p>{len(types)} different tokens; of all, {overall:.1%} are kept. Ranked by the "
        "lower end of a 95% interval of the share, so that a token seen once or twice does not lead.</p>"
        f'<div class="tables">{tables}</div>'
    )


def _at_least(hits: int, count: int) -> float:
    """Lower end of Wilson's 95% interval of a share."""
    z, share = 1.96, hits / count
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (share + z * z / (2 * count) - spread) / (1 + z * z / count)


def _table(caption: str, types: Sequence[tuple[int, int, int, float]], tokenizer: Any) -> str:
    lines = []
    for number, seen, kept, mean in types:
        text = "" if tokenizer is None else decode(tokenizer, [number])
        whole = text and "\ufffd" not in text
        shown = f"<code>{html.escape(visible(text))}</code>" if whole else f"id {number}"
        if not whole and tokenizer is not None:
            shown += " (part of a character)" if text else ""
        lines.append(
            f"<tr><td>{shown}</td><td>{seen}</td><td>{kept}</td><td>{kept / seen:.1%}</td><td>{mean:.3g}</td></tr>"
        )
    head = "<tr><th>token</th><th>seen</th><th>kept</th><th>share kept</th><th>mean value</th></tr>"
    return f'<table class="types"><caption>{caption}</caption>{head}{"".join(lines)}</table>'


def _sequences(samples: list[Sample], tokenizer: Any, rows: int) -> str:
    """Some sequences of the first, a middle and the last sample."""
    chosen = [samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    parts = ["<h2>Sequences</h2>"]
    for i, sample in enumerate(chosen):
        share = rows // len(chosen) + (i < rows % len(chosen))
        if share:
            batch = read_batch(sample.batch)
            shown = show_tokens(tokenizer, batch, sample.values, weights=sample.weights)
            parts.append(f"<h3>Step {sample.step}</h3>{shown.first(share).html()}")
    return "".join(parts) if len(parts) > 1 else ""
