"""Asking a trainer whether there is something to mask, against `shared_gain` on batches made by hand."""

from __future__ import annotations

import random

import pytest
import torch
import tuning
from state import differences, snapshot
from trainer_cases import feature, make
from tuning import dpo_data, lora, trained

from alphatoken_loss import shared_gain

SETTINGS = {"estimator": "path", "num_layers": None, "path_steps": 3, "path_rate": 5e-2}


def asked(kind, folder, **changes):
    options = changes.pop("options", dict)
    settings = {**SETTINGS, **changes}
    model = settings.pop("model", tuning.base)
    return make(kind, tuning.TRAINERS[kind][0], feature(peft=lora, options=options, model=model, **settings), folder)


@pytest.mark.parametrize("model", [tuning.base, tuning.nf4])
@pytest.mark.parametrize("how", ["drawn", "stream"])
@pytest.mark.filterwarnings("ignore")
def test_of_its_own_rows(how, model, tmp_path):
    trainer = asked("sft", tmp_path, model=model, options=lambda: {"stream": how == "stream"})
    data = list(trainer.train_dataset)
    before, rng = snapshot(trainer.model), torch.get_rng_state()
    found = trainer.shared_gain(rows=5)
    assert not differences(before, snapshot(trainer.model)) and torch.equal(rng, torch.get_rng_state())
    places = range(5) if how == "stream" else random.Random(trainer.args.seed).sample(range(len(data)), 5)
    rows = [{key: data[place][key] for key in ("input_ids", "labels")} for place in places]
    batch = trainer.alphatoken_batch(trainer._prepare_inputs(trainer.data_collator(rows)))
    by_hand = shared_gain(trainer.model.train(), trainer.alphatoken.source.batches, batch,
                          config=trainer.alphatoken.config, progress=False)  # fmt: skip
    assert found.clean == pytest.approx(by_hand.clean, rel=1e-5)
    assert found.training == pytest.approx(by_hand.training, rel=1e-4)
    other = trainer.shared_gain(rows=len(data))
    assert other.training != pytest.approx(found.training, rel=1e-4) and other.clean == found.clean


@pytest.mark.filterwarnings("ignore")
def test_asking_changes_no_training(tmp_path):
    after = []
    for ask in (False, True):
        trainer = asked("sft", tmp_path, lr_scheduler_type="constant")
        if ask:
            trainer.shared_gain()
        trainer.train()
        after.append({name: tensor.clone() for name, tensor in trained(trainer.model)})
    assert after[0].keys() == after[1].keys() and all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_asked(tmp_path):
    with pytest.raises(ValueError, match=r"no target to compare training rows with: rho is 1.*rho below 1 and a targ"):
        asked("sft", tmp_path, rho=1.0).shared_gain()
    with pytest.raises(ValueError, match="There is no target to compare training rows with"):
        asked("sft", tmp_path, selection="random", stability_weight=0.0).shared_gain()
    with pytest.raises(ValueError, match=r"The target is of preference pairs.*batches of chosen answers.*by their si"):
        asked("dpo", tmp_path, options=lambda: {"target_dataset": dpo_data(count=4)}).shared_gain()
    with pytest.raises(ValueError, match="batches holds preference pairs"):
        asked("dpo", tmp_path).shared_gain()


@pytest.mark.filterwarnings("ignore")
def test_a_rho_that_comes_too_late_is_refused(tmp_path):
    trainer = asked("sft", tmp_path)
    trainer.args.rho = 0.9
    with pytest.raises(ValueError, match=r"args\.rho is 0\.9 now, and was 0\.5 when the trainer was made.*Make the tr"):
        trainer.train()


class OfThree:
    """An accelerator as the second of three processes has it."""

    process_index, num_processes = 1, 3

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)


@pytest.mark.parametrize("how", ["drawn", "stream"])
@pytest.mark.filterwarnings("ignore")
def test_each_process_gives_rows_of_its_own(how, tmp_path, monkeypatch):
    trainer = asked("sft", tmp_path, options=lambda: {"stream": how == "stream"})
    data, seen = list(trainer.train_dataset), []
    take = lambda model, target, batches, **_: seen.extend(batches)  # noqa: E731
    monkeypatch.setattr("alphatoken_loss.trl.gain.shared_gain", take)
    trainer.accelerator = OfThree(trainer.accelerator)
    trainer.shared_gain(rows=8)
    places = range(8) if how == "stream" else random.Random(trainer.args.seed).sample(range(len(data)), 8)
    rows = [data[place]["input_ids"] for place in list(places)[1::3]]
    found = [ids[mask.bool()].tolist() for batch in seen for ids, mask in
             zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert found == [list(ids) for ids in rows]


@pytest.mark.filterwarnings("ignore")
def test_of_a_target_that_nothing_needs_one_is_told(tmp_path, caplog):
    asked("sft", tmp_path, selection="random")
    assert "target_dataset and fisher are not used" in caplog.text
