"""What `show_tokens` shows: the text of the batch, whole and escaped, with the tensors' own figures and marks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

import batches
import pytest
import torch
from shown import TEXTS, Reader, batch_of, tokenizer, values_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alphatoken_loss import TokenValues, show_tokens
from alphatoken_loss.batches.read import read_batch
from alphatoken_loss.tools.show.spans import decode


def spiece() -> PreTrainedTokenizerFast:
    """SentencePiece-like: spaces belong to the words behind them, the first is stripped, bytes stand for the rest."""
    vocab = {"<pad>": 0, "<unk>": 1, "▁": 2, "▁a": 3, "b": 4, "▁ab": 5, "a": 6}
    vocab |= {f"<0x{i:02X}>": 7 + i for i in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")


def rows_of(batch: Any) -> list[list[int]]:
    read = read_batch(batch)
    attended = read.attended if read.attended is not None else torch.ones(read.shape, dtype=torch.bool)
    return [read.inputs["input_ids"][i][attended[i]].tolist() for i in range(read.shape[0])]


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_texts_of_the_spans_are_the_decoded_text(side):
    batch = batch_of(TEXTS, side)
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights)
    assert len(shown.groups) == len(TEXTS)
    for (row,), ids, text in zip(shown.groups, rows_of(batch), TEXTS, strict=True):
        assert row.text == decode(tokenizer(), ids) == tokenizer().decode(ids)
        assert row.text == (text or "</s>")
        assert [token.id for span in row.spans for token in span.tokens] == ids
        assert all(span.text for span in row.spans)


def test_characters_over_several_tokens_are_one_span_and_no_more_is_joined_than_needed():
    batch = batch_of(["a日b e\u0301 👍🏽 👩‍👩‍👧 🇩🇪🇫🇷 c"], prompt=0)
    (row,) = show_tokens(tokenizer(), batch, values_of(batch)[0]).groups[0]
    assert [span.text.strip() for span in row.spans if len(span.tokens) > 1 or not span.text.isascii()] == [
        "日", "e\u0301", "👍🏽", "👩‍👩‍👧", "🇩🇪", "🇫🇷",
    ]  # fmt: skip
    assert all(len(span.tokens) == 1 for span in row.spans if span.text.isascii())


@pytest.mark.parametrize("seed", range(5))
def test_any_bytes_round_trip(seed):
    """Random tokens: broken characters, orphaned continuation bytes, special tokens, ids of no token."""
    generator = torch.Generator().manual_seed(seed)
    for made in (tokenizer(), spiece()):
        ids = torch.randint(0, len(made) + 2, (3, 60), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        shown = show_tokens(made, batch, values_of(batch)[0])
        for (row,), expected in zip(shown.groups, ids.tolist(), strict=True):
            assert row.text == decode(made, expected)
            assert [token.id for span in row.spans for token in span.tokens] == expected


def test_a_decoder_that_reads_spaces_from_what_stands_before():
    made = spiece()
    ids = torch.tensor([[3, 4, 5, 2, 6, 7 + 0xE6, 7 + 0x97, 7 + 0xA5, 3, 3]])
    (row,) = show_tokens(made, {"input_ids": ids, "labels": ids}, torch.ones(1, 10)).groups[0]
    assert [span.text for span in row.spans] == ["a", "b", " ab", " ", "a", "日", " a", " a"]
    assert row.text == made.decode(ids[0])


def test_long_text_takes_linear_time():
    class Counting:
        letters = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.letters += len(ids)
            return tokenizer().decode(ids, **options)

    counting, ids = Counting(), torch.tensor([tokenizer()("some 日本 words\n" * 300)["input_ids"]])
    show_tokens(counting, {"input_ids": ids, "labels": ids}, torch.ones(ids.shape))
    assert counting.letters < 20 * ids.numel()


def test_html_is_text_and_nothing_else():
    batch = batch_of(TEXTS, prompt=3)
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights, title="</title><script>1</script>")
    plain = show_tokens(tokenizer(), batch_of(["x"] * len(TEXTS)), torch.ones(len(TEXTS), 1), title="t")
    for made, ours in ((shown.html(), plain.html()), (shown._repr_html_(), plain._repr_html_())):
        found, safe = Reader(made), Reader(ours)
        assert found.tags.count("script") == safe.tags.count("script")
        assert found.tags.count("style") == safe.tags.count("style")
        assert not found.stack
        for text, expected in zip(found.texts, [text or "</s>" for text in TEXTS], strict=True):
            shown_as = {"\0": "␀", "\x01": "␁", "\x1b": "␛", "\x7f": "␡", "\r": "␍"}
            shown_as |= {c: f"⟨U+{ord(c):04X}⟩" for c in "\u202e\u2066\ufeff\u200b\u2028"}
            assert text == "".join(shown_as.get(letter, letter) for letter in expected)
        assert not set(map(chr, range(32))) - {"\n", "\t"} & set(made)
    assert 'class="nl">\n</span>' in shown.html()


def test_hover_figures_are_the_tensors(tmp_path):
    batch = batch_of(TEXTS[:4])
    weights, values = values_of(batch)
    logps = -torch.rand(weights.shape)
    saved = show_tokens(tokenizer(), batch, values, weights=weights, logps=logps, path=tmp_path / "map.html")
    assert saved.terms == (*(f.name for f in fields(TokenValues)), "probability")
    found = Reader((tmp_path / "map.html").read_text())
    assert os.listdir(tmp_path) == ["map.html"]
    tokens = [token for span in found.spans for token in json.loads(str(span["data-v"]))]
    response = batch["labels"] != -100
    expected = torch.stack([*(getattr(values, f.name) for f in fields(TokenValues)), logps.exp()], -1)[response]
    assert [token[0] for token in tokens if token[1] is not None] == batch["labels"][response].tolist()
    assert [token[1] for token in tokens if token[1] is not None] == weights[response].bool().tolist()
    figures = torch.tensor([token[2] for token in tokens if token[1] is not None])
    torch.testing.assert_close(figures, expected, rtol=1e-5, atol=1e-5)
    for span in found.spans:
        kept = [token[1] for token in json.loads(str(span["data-v"])) if token[1] is not None]
        mark = "t drop" if not any(kept) else "t" if all(kept) else "t part"
        assert span["class"] == mark
    assert {str(span["class"]) for span in found.spans} == {"t", "t drop", "t part"}


def test_what_is_not_finite_is_left_out():
    batch = batch_of(["some words and"], prompt=1)
    weights, values = values_of(batch)
    total = values.total.clone()
    total[0, 2] = float("nan")
    shown = show_tokens(tokenizer(), batch, TokenValues(total), weights=weights)
    found = Reader(shown.html())
    assert any(token[2] == [None] for span in found.spans for token in json.loads(str(span["data-v"])))


@pytest.mark.parametrize("kind", ["stacked", "stacked_left", "separate", "separate_mask"])
def test_pairs_stand_side_by_side(kind):
    batch = batches.pair_batch(kind)
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights)
    assert len(shown.groups) == 3 and all(len(group) == 2 for group in shown.groups)
    expected = rows_of(batch)
    for i, (chosen, rejected) in enumerate(shown.groups):
        for row, word, at in ((chosen, "chosen", i), (rejected, "rejected", i + 3)):
            ids = expected[at]
            while "separate" in kind and ids[-1] == 0:
                ids = ids[:-1]
            assert row.title.startswith(f"pair {i}, {word}: {int(weights[at].sum())} of ")
            assert [token.id for span in row.spans for token in span.tokens][: len(ids)] == ids
    assert shown.html().count('class="group pair"') == 3


def test_packed_rows_are_taken_apart():
    batch = batches.sft_batch("packed")
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights)
    lengths = [len([t for span in row.spans for t in span.tokens]) for (row,) in shown.groups]
    assert lengths == [7, 5, 8]
    ids = [t.id for (row,) in shown.groups for span in row.spans for t in span.tokens]
    assert ids == batch["input_ids"][0].tolist()


def test_plain_text_marks_what_is_dropped():
    batch = batch_of(["some words and\nsome"], prompt=1)
    ids = batch["input_ids"][0]
    weights = torch.ones(ids.shape)[None]
    weights[0, 2:4] = 0
    shown = show_tokens(tokenizer(), batch, weights)
    parts = [tokenizer().decode(ids[a:b]).replace("\n", "⏎\n") for a, b in ((0, 2), (2, 4), (4, len(ids)))]
    assert f"{parts[0]}[-{parts[1]}-]{parts[2]}" in str(shown)
    assert repr(shown) == "TokenMap(1 sequences, by weight)"


@pytest.mark.parametrize("options", [{"color_system": None}, {"no_color": True, "color_system": "truecolor"}])
def test_a_terminal_without_colour_shows_the_same(options):
    rich = pytest.importorskip("rich.console")
    batch = batch_of(TEXTS)
    weights, values = values_of(batch)
    shown = show_tokens(tokenizer(), batch, values, weights=weights)
    console = rich.Console(file=io.StringIO(), width=500, force_terminal=True, **options)
    shown.print(console)
    written = console.file.getvalue()
    assert "[-" in written and "-]" in written
    for line in str(shown).splitlines():
        assert line.rstrip() in written.expandtabs(8) or line.expandtabs(8).rstrip() in written
    assert "\x1b[31mred" not in written and "\0" not in written


def test_a_terminal_with_colour_dims_what_is_dropped():
    rich = pytest.importorskip("rich.console")
    batch = batch_of(["some words"], prompt=0)
    shown = show_tokens(tokenizer(), batch, torch.tensor([[0.0, *[0.0] * (batch["labels"].shape[1] - 1)]]))
    console = rich.Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    shown.print(console)
    styled = console.export_text(styles=True)
    assert "\x1b[2;9;" in styled and "[-" not in styled
    assert "some" in console.file.getvalue()


def test_without_a_tokenizer_ids_are_shown():
    batch = batches.sft_batch("right")
    (row,) = show_tokens(None, batch, values_of(batch)[0]).groups[1]
    assert row.text == "".join(f"⟨{i}⟩" for i in rows_of(batch)[1])


def test_difference_values_have_fewer_terms():
    batch = batches.sft_batch("right")
    weights, values = values_of(batch)
    assert show_tokens(tokenizer(), batch, TokenValues(values.total), weights=weights).terms == ("total",)
    assert show_tokens(tokenizer(), batch, values.total, weights=weights).terms == ("total",)
    assert show_tokens(tokenizer(), batch, weights).terms == ("weight",)


def test_errors_say_what_is_wrong(tmp_path, monkeypatch):
    batch = batches.sft_batch("right")
    weights, values = values_of(batch)
    with pytest.raises(ValueError, match=r"weights has shape .2, 11. and the batch .3, 11."):
        show_tokens(tokenizer(), batch, values, weights=weights[:2])
    with pytest.raises(ValueError, match="term is 'depth'; there are 'total'"):
        show_tokens(tokenizer(), batch, TokenValues(values.total), term="depth")
    with pytest.raises(TypeError, match="values_or_weights is a list"):
        show_tokens(tokenizer(), batch, [1.0])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        show_tokens(tokenizer(), batch, weights, path=tmp_path / "nowhere" / "map.html")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"alphatoken-loss.plots."):
        show_tokens(tokenizer(), batch, weights).print()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "map.html"
    path.write_text("old")
    batch = batches.sft_batch("right")
    shown = show_tokens(tokenizer(), batch, values_of(batch)[0])
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        shown.save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["map.html"]


@pytest.mark.slow
def test_importing_the_package_imports_none_of_this():
    code = (
        "import sys, alphatoken_loss; from alphatoken_loss import show_tokens, SampleWriter; "
        "print([m for m in ('rich', 'matplotlib', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
