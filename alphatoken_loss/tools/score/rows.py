"""Data sets in the forms people have them -> token ids and which of them are the response, as TRL tokenises them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...batches.batch import IGNORE
from ..cli import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_TEXTS = {"prompt", "completion", "chosen", "rejected", "messages", "text"}
_NOT_TEXT = {"image", "images", "audio", "audios", "video", "videos"}
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Tokens:
    """Token ids of one sequence, whether each is part of the response, and how many more were cut off."""

    ids: list[int]
    response: list[bool]
    cut: int = 0

    @property
    def labels(self) -> list[int]:
        return [token if inside else IGNORE for token, inside in zip(self.ids, self.response, strict=True)]

    @property
    def prompt(self) -> list[int]:
        """What stands before the response; of a sequence without a prompt, its first half."""
        start = self.response.index(True) if True in self.response else len(self.ids)
        return self.ids[: start or (len(self.ids) + 1) // 2]


Row = tuple[Tokens, ...]  # one sequence, or the chosen and the rejected one


def load_rows(source: str, split: str, option: str) -> Dataset:
    """Rows of a JSON Lines or Parquet file, a folder that `datasets` saved, or a data set of the hub.

    Raises:
        UserError: there is no such data set, or it has no rows.
    """
    import datasets
    from datasets import DatasetDict, load_dataset, load_from_disk

    path, said = Path(source), datasets.utils.logging.get_verbosity()
    try:
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # it logs what it raises
        if path.is_file():
            if path.suffix not in FILES:
                raise UserError(f"{option} {source}: the file's name must end in {', '.join(FILES)}.")
            if not path.stat().st_size:
                raise UserError(f"{option} {source}: the file is empty.")
            rows = load_dataset(FILES[path.suffix], data_files=str(path), split="train")
        elif path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            rows = load_from_disk(source)
            if isinstance(rows, DatasetDict):
                if split not in rows:
                    raise UserError(f"{option} {source}: there is no split {split!r}; there are {', '.join(rows)}.")
                rows = rows[split]
        elif path.suffix in FILES or path.is_absolute() or source.startswith("."):
            raise UserError(f"{option} {source}: there is no such file or folder.")
        else:
            rows = load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file, an unknown name or a missing network makes of it
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` says only that something went wrong
            cause = cause.__cause__
        if "corresponds to no data" in str(cause):
            raise UserError(f"{option} {source}: there are no rows.") from error
        hint = " It is not in UTF-8: save it so." if _is_other_text(path) else ""
        raise UserError(f"{option} {source}: could not be read ({first_line(cause)}).{hint}") from error
    finally:
        datasets.utils.logging.set_verbosity(said)
    if not len(rows):
        raise UserError(f"{option} {source}: there are no rows.")
    return rows


def _is_other_text(path: Path) -> bool:
    """Whether a file that should be text is not in UTF-8."""
    if FILES.get(path.suffix) != "json" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        return True
    return False


def form_of(rows: Dataset, option: str) -> str:
    """ "pairs" or "sft".

    Raises:
        UserError: the columns are not those of a form that is known.
    """
    columns = set(rows.column_names)
    if columns & _NOT_TEXT:
        raise UserError(
            f"{option}: there is a column {sorted(columns & _NOT_TEXT)[0]}, and only text is valued: without it, "
            "values would be those of other answers. Leave such rows out, or the column if it says nothing."
        )
    if {"chosen", "rejected"} <= columns:
        return "pairs"
    if {"prompt", "completion"} <= columns or columns & {"messages", "text", "input_ids"}:
        return "sft"
    raise UserError(
        f"{option}: the columns are {', '.join(sorted(columns))}. They must hold prompt and completion; messages; "
        "text; chosen and rejected (with or without prompt); or input_ids and labels."
    )


def tokenised(
    rows: Dataset, places: Sequence[int], tokenizer: Any, *, max_length: int, assistant_only: bool, option: str
) -> list[Row]:
    """Rows by their numbers, as TRL's trainers tokenise them, cut to their first `max_length` tokens; none is left out.

    Raises:
        UserError: TRL could not tokenise them.
    """
    import datasets
    from datasets import Dataset

    prepared = _prepared_pairs if form_of(rows, option) == "pairs" else _prepared_sft
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # In memory, so that nothing is left in the cache folder of `datasets`.
        some = Dataset.from_dict(rows.with_format(None)[list(places)], features=rows.features)
        _check_whole(some, places, option)
        found = list(prepared(some, tokenizer, assistant_only))
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{option}: rows {places[0] + 1} to {places[-1] + 1} could not be read or tokenised ({first_line(error)})."
        ) from error
    finally:
        if not shown:
            datasets.enable_progress_bars()
    return [tuple(_cut(sequence, max_length) for sequence in row) for row in found]


def _check_whole(rows: Dataset, places: Sequence[int], option: str) -> None:
    columns = set(rows.column_names)
    forms = {"chosen", "rejected"}, {"input_ids"}, {"prompt", "completion"}, {"messages"}, {"text"}
    read = next(form for form in forms if form <= columns)  # as `form_of`
    beside = next((name for name in ("labels", "completion_mask") if name in columns), "")
    if read == {"input_ids"} and beside:
        read = {"input_ids", beside}
    for number, row in zip(places, rows, strict=True):
        missing = sorted(name for name in read & row.keys() if row[name] is None)
        if missing:
            other = any(all(row.get(name) is not None for name in form) for form in forms if form != read)
            then = "Put rows of other forms in files of their own." if other else "Leave the row out."
            raise UserError(f"{option}: row {number + 1} has nothing in its column {missing[0]}. {then}")
        odd = next((name for name in sorted(read & _TEXTS) if not isinstance(row[name], (str, list))), None)
        if odd:
            raise UserError(
                f"{option}: row {number + 1} has a {type(row[odd]).__name__} in its column {odd}. It must be a text or "
                "a list of messages."
            )
        if beside in read and len(row[beside]) != len(row["input_ids"]):
            raise UserError(
                f"{option}: row {number + 1} has {len(row['input_ids'])} input_ids and {len(row[beside])} {beside}. "
                "Give one for each token."
            )


def _cut(sequence: Tokens, length: int) -> Tokens:
    return Tokens(sequence.ids[:length], sequence.response[:length], max(len(sequence.ids) - length, 0))


def prepared_by_trl(
    rows: Dataset,
    tokenizer: Any,
    *,
    answers_only: bool,
    about: str,
    processing: Any = None,
    template: Any = None,
    formatting: Any = None,
    **options: Any,
) -> Dataset:
    """Rows in SFT form as TRL's own trainer tokenises them, not packed; by a method of it that is not public.

    Args:
        answers_only (`bool`): completions alone have labels.
        about (`str`): what progress bars call the rows.
        processing (`Any`, *optional*): a processor around the tokenizer.
        template (`str`, *optional*): the chat template, by default the tokenizer's.
        formatting (`Callable`, *optional*): makes text of a row.
        options: arguments of the trainer, where they are not as here.
    """
    from trl import SFTTrainer

    reader = SimpleNamespace(_tokenizer=tokenizer, chat_template=template, completion_only_loss=answers_only)
    args = {
        "dataset_num_proc": None,
        "max_length": None,
        "assistant_only_loss": False,
        "dataset_text_field": "text",
        "truncation_mode": "keep_start",
        "shuffle_dataset": False,
        "use_liger_kernel": False,  # trl 1.14 asks
    }
    given = SimpleNamespace(**{**args, **options})
    return SFTTrainer._prepare_dataset(reader, rows, processing or tokenizer, given, False, formatting, about)


def _prepared_sft(rows: Dataset, tokenizer: Any, assistant_only: bool) -> Iterator[Row]:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    answers_only = bool({"completion", "completion_mask"} & set(rows.column_names))
    template = None
    if assistant_only and tokenizer.chat_template and not has_generation_markers(tokenizer.chat_template):
        template = get_training_chat_template(tokenizer)  # of the models that TRL knows, as its trainer does
    given = {"template": template, "assistant_only_loss": assistant_only}
    for row in prepared_by_trl(rows, tokenizer, answers_only=answers_only, about="scored", **given):
        yield (Tokens(list(row["input_ids"]), [label != IGNORE for label in row["labels"]]),)


def _prepared_pairs(rows: Dataset, tokenizer: Any, assistant_only: bool) -> Iterator[Row]:
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    for row in DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "scored"):
        prompt = row["prompt_ids"]
        answers = (row["chosen_ids"], row["rejected_ids"])
        yield tuple(Tokens([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)) for ids in answers)


def collate(rows: Iterable[Row], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of rows of one form, padded on the right; pairs as `chosen_*` and `rejected_*`."""
    branches = list(zip(*rows, strict=True))
    names = ("",) if len(branches) == 1 else ("chosen_", "rejected_")
    batch = {}
    for name, sequences in zip(names, branches, strict=True):
        parts = {
            "input_ids": (pad, [s.ids for s in sequences]),
            "attention_mask": (0, [[1] * len(s.ids) for s in sequences]),
            "labels": (IGNORE, [s.labels for s in sequences]),
        }
        for part, (fill, lists) in parts.items():
            padded = pad_sequence([torch.tensor(each, dtype=torch.long) for each in lists], True, fill)
            batch[name + part] = padded.to(device)
    return batch


def by_length(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows to run together: of like length, at most `tokens` with padding, but always at least one row."""
    lengths = [max(len(sequence.ids) for sequence in row) for row in rows]
    together: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: lengths[i]):
        if together and lengths[place] * len(rows[place]) * (len(together) + 1) > tokens:
            yield together
            together = []
        together.append(place)
    if together:
        yield together
