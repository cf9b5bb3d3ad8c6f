"""The model of a scoring run, and the values it gives to rows."""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ...config import AlphaTokenConfig
from ...directions.estimate import estimate_fisher
from ...directions.fisher import Fisher
from ...directions.follow import make_path
from ...directions.path import Path as ThetaStar
from ...directions.target import target_gradient
from ...estimators import estimator_class
from ...models.structure import causal_lm
from ...weights import alphatoken_weights
from ..cli import UserError, first_line
from .rows import Row, by_length, collate, tokenised

FISHER, PATH = "fisher.safetensors", "path.safetensors"


class Scorer:
    """The model and what its values need, loaded when there is something left to score."""

    def __init__(
        self, args: argparse.Namespace, config: AlphaTokenConfig, rows: Any, target_rows: Any, folder: Path
    ) -> None:
        self.args, self.config, self.rows = args, config, rows
        self.device = read_device(args.device)
        self.tokenizer = load_tokenizer(args.tokenizer, args.adapter, args.model)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.options = {"max_length": args.max_length, "assistant_only": args.assistant_only_loss}
        self.vocabulary = 0  # not known yet
        for some, option in ((rows, "--dataset"), (target_rows, "--target")):
            if "messages" in some.column_names and not args.assistant_only_loss:
                print(
                    f"{option} holds messages: tokens of all turns are valued, the system's and the user's too. Give "
                    "--assistant-only-loss to value assistant turns only.",
                    file=sys.stderr,
                )
        self.tokenised(rows, [0], "--dataset")  # a chat template that is missing, before a model is loaded
        target = self.tokenised(target_rows, range(len(target_rows)), "--target")
        self.model = load_model(args, self.device)
        self.vocabulary = causal_lm(self.model).get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._check_ids(target, range(len(target)), "--target")
        self.fisher = self._fisher(folder) if config.stability_weight > 0 else None
        self.given: dict[str, Any] = {"fisher": self.fisher, "config": config}
        if estimator_class(config.estimator).in_forward:
            self.given["path"] = self._path(folder, target)
        else:
            self.given["target"] = target_gradient(self.model, self._batches(target), config=config)

    def tokenised(self, rows: Any, places: Any, option: str) -> list[Row]:
        found = tokenised(rows, places, self.tokenizer, option=option, **self.options)
        self._check_ids(found, places, option)
        return found

    def _check_ids(self, rows: list[Row], places: Any, option: str) -> None:
        """See that the model has an embedding for each token, once it is loaded."""
        for place, row in zip(places, rows if self.vocabulary else [], strict=False):
            ids = [token for sequence in row for token in sequence.ids]
            if ids and not (0 <= min(ids) and max(ids) < self.vocabulary):
                raise UserError(
                    f"{option}: row {place + 1} has the token {max(ids) if min(ids) >= 0 else min(ids)}, and the model "
                    f"knows 0 to {self.vocabulary - 1}. The tokenizer belongs to another model, or had tokens added "
                    "that the adapter has no embeddings for: give --tokenizer, or a model with embeddings resized to "
                    "it."
                )

    def part(self, start: int, stop: int, bar: Any) -> list[tuple[Row, list[torch.Tensor]]]:
        """Rows start to stop with the values of each of their sequences, in the data set's order."""
        rows = self.tokenised(self.rows, range(start, stop), "--dataset")
        values: list[list[torch.Tensor]] = [[] for _ in rows]
        for places in by_length(rows, self.args.tokens_per_batch):
            try:
                found = self._values([rows[i] for i in places])
            except FloatingPointError as error:
                numbers = sorted(start + i + 1 for i in places)
                raise FloatingPointError(f"rows {numbers}, counted from 1: {error}") from error
            for i, value in zip(places, found, strict=True):
                values[i] = value
            bar.update(len(places))
        return list(zip(rows, values, strict=True))

    def _values(self, rows: list[Row]) -> list[list[torch.Tensor]]:
        batch = collate(rows, self.pad, self.device)
        _, values = alphatoken_weights(self.model, None, batch, beta=self.args.beta, return_values=True, **self.given)
        total = values.total.float().cpu()
        branches = total.split(len(rows))  # pairs are stacked, chosen first
        return [
            [branch[i, : len(sequence.ids)] for branch, sequence in zip(branches, row, strict=True)]
            for i, row in enumerate(rows)
        ]

    def _batches(self, rows: list[Row], rng: random.Random | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Rows of like length together; with `rng` in no order of length, so that a batch's last rows are as others."""
        batches = list(by_length(rows, self.args.tokens_per_batch))
        for places in rng.sample(batches, len(batches)) if rng else batches:
            taken = rng.sample(places, len(places)) if rng else places
            yield collate([rows[i] for i in taken], self.pad, self.device)

    def _path(self, folder: Path, target: list[Row]) -> ThetaStar:
        """theta* that an interrupted run has left, or a new one, which may depend on how target rows run together."""
        if (folder / PATH).is_file():
            return ThetaStar.load(folder / PATH)
        path = make_path(self.model, self._batches(target, random.Random(self.args.seed)), **self.given)
        path.save(folder / PATH)
        return path

    def _fisher(self, folder: Path) -> Fisher:
        """The Fisher that was given, that an interrupted run has left, or a new one."""
        args, path = self.args, folder / FISHER
        if args.fisher is not None or path.is_file():
            return Fisher.load(args.fisher or path)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(args.seed))
        chosen = self.tokenised(self.rows, order[: args.fisher_prompts].tolist(), "--dataset")
        fisher = estimate_fisher(
            self.model,
            [row[0].prompt for row in chosen if row[0].prompt],
            tokenizer=self.tokenizer,
            config=self.config,
            max_new_tokens=args.fisher_new_tokens,
            seed=args.seed,
        )
        fisher.save(path)
        return fisher


def load_tokenizer(named: str | None, adapter: str | None, model: str) -> Any:
    """The one that was named; else the adapter's own, which knows its template and added tokens; else the model's.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    option, source = "--model", model
    if named is not None:
        option, source = "--tokenizer", named
    elif adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file():
        option, source = "--adapter", adapter
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{option} {source}: no tokenizer could be loaded ({first_line(error)}). Name one with --tokenizer."
        ) from error


def read_device(name: str | None) -> torch.device:
    """The device of that name, which can be used; by default CUDA where there is one.

    Raises:
        UserError: it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)}).") from error
    return device


def load_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The base model with its adapter, or with a new one, in training mode."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if args.load_in_4bit:
        compute = torch.bfloat16 if device.type == "cuda" else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {args.model}: could not be loaded ({first_line(error)}).") from error
    if not args.load_in_4bit:
        model = model.to(device)
    if args.adapter is None:
        torch.manual_seed(args.seed)
        new = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, new).train()  # 4-bit linears in evaluation mode lose their backward on a CPU
    _resize_as_saved(model, Path(args.adapter))
    try:
        with warnings.catch_warnings():
            # PEFT only warns where an adapter lacks weights, and would leave them as they were initialised.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, args.adapter, is_trainable=True).train()
    except (OSError, ValueError, KeyError, RuntimeError, UserWarning) as error:
        raise UserError(
            f"--adapter {args.adapter}: does not fit --model {args.model} ({first_line(error)})."
        ) from error


def _resize_as_saved(model: Any, adapter: Path) -> None:
    """Give the base as many embeddings as an adapter was saved with, whose tokenizer had tokens added."""
    file, embedding = adapter / "adapter_model.safetensors", model.get_input_embeddings()
    if not file.is_file():
        return
    (name,) = (name for name, module in model.named_modules() if module is embedding)
    key = f"base_model.model.{name}.weight"
    with safe_open(file, framework="pt") as saved:
        if key in saved.keys() and (rows := saved.get_slice(key).get_shape()[0]) != embedding.weight.shape[0]:
            model.resize_token_embeddings(rows)
