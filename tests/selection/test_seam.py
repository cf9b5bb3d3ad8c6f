"""A selection is one class and one line: the gate, trainers and their arguments know none by name."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
import tuning
from batches import response, sft_batch
from checks import TOL64, assert_same_grads, grads_of
from models import lora_model
from tuning import arguments, base, lora, sft_data, tokenizer

import alphatoken_loss
from alphatoken_loss import AlphaToken
from alphatoken_loss.selection import SELECTIONS, make_selection, selection_class
from alphatoken_loss.selection.base import Selection

ROOT = Path(alphatoken_loss.__file__).parent


@dataclass
class OddIds(Selection):
    """Tokens of an odd id count `much`, the others once."""

    much: float = 3.0

    def before(self, model, ref_model, batch, seed):
        return torch.where(batch.labels % 2 == 1, self.much, 1.0)


@dataclass
class Surprise(Selection):
    """A token counts as much as it surprises."""

    def after(self, forward):
        return -forward.logps


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "a_users_own", sys.modules[__name__])
    monkeypatch.setitem(SELECTIONS, "odd_ids", "a_users_own:OddIds")
    monkeypatch.setitem(SELECTIONS, "surprise", "a_users_own:Surprise")


def weights_of(name, model, batch):
    if name == "odd_ids":
        return torch.where(batch["labels"] % 2 == 1, 5.0, 1.0)
    return reference.token_nll(reference.frozen_copy(model), batch).detach()


@pytest.mark.parametrize("name", ["odd_ids", "surprise"])
def test_in_the_gate(name):
    model, batch = lora_model("llama"), sft_batch("right")
    inside = response(batch)
    weights = weights_of(name, model, batch) * inside
    _, grads = reference.masked_sft(model, batch, weights, float(inside.sum()))
    options = {"much": 5.0} if name == "odd_ids" else None
    with AlphaToken(model, selection=name, selection_options=options)(batch):
        model(**batch).loss.backward()
    assert_same_grads(grads_of(model), grads, TOL64)


@pytest.mark.parametrize("name", ["odd_ids", "surprise"])
@pytest.mark.filterwarnings("ignore")
def test_in_a_trainer(name, tmp_path):
    cls, _ = tuning.TRAINERS["sft"]
    args = arguments("sft", tmp_path, selection=name, max_steps=1)
    common = {"train_dataset": sft_data(), "processing_class": tokenizer(), "peft_config": lora()}
    trainer = cls(base(), args=args, **common)
    trainer.train()
    assert type(trainer.alphatoken.selection).__name__ == {"odd_ids": "OddIds", "surprise": "Surprise"}[name]
    assert "alphatoken/weight" in trainer.state.log_history[0]


def test_every_name_in_the_table_is_a_selection():
    for name in SELECTIONS:
        assert issubclass(selection_class(name), Selection), name
        assert make_selection(name, alphatoken_loss.AlphaTokenConfig()).config.rho == 0.5
    assert [name for name in SELECTIONS if selection_class(name).valued] == ["alphatoken"]
    assert [name for name in SELECTIONS if selection_class(name).pairs] == ["log_ratio"]


@pytest.mark.parametrize(
    "name", ["gate/alphatoken.py", "gate/weighers.py", "gate/step.py", "trl/mixin.py", "trl/selecting.py"]
)
def test_known_by_name_to_none(name):
    tree = ast.parse((ROOT / name).read_text())
    constants = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not constants & (set(SELECTIONS) - {"alphatoken"})
