"""Asking a trainer whether there is something to mask, against `shared_gain` on batches made by hand."""

from __future__ import annotations

import random

import pytest
import torch
import tuning
from safetensors.torch import load_file
from state import differences, snapshot
from trainer_cases import feature, make
from transformers import TrainerCallback
from tuning import dpo_data, lora, trained

from alphatoken_loss import SharedGain, shared_gain

SETTINGS = {"estimator": "path", "num_layers": None, "path_steps": 3, "path_rate": 5e-2}


def asked(kind, folder, **changes):
    options = changes.pop("options", dict)
    settings = {**SETTINGS, **changes}
    model = settings.pop("model", tuning.base)
    return make(kind, tuning.TRAINERS[kind][0], feature(peft=lora, options=options, model=model, **settings), folder)


@pytest.mark.parametrize(("how", "model"), [("drawn", tuning.base), ("stream", tuning.nf4)])
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


# ------------------------------------------------------------------------------------ rho found when training starts


def told(share):
    """An answer of `shared_gain` that is as sure of a share as can be."""
    return SharedGain(clean=1.0, training=share, interval=(share, share))


def finding(folder, monkeypatch, share, **changes):
    """A trainer that is to find rho from six rows, and is told this share; what it asks is in its `asked`."""
    settings = {"path_start": True, "path_kl": 0.25, "gain_rows": 6, "learning_rate": 1e-2, **changes}
    trainer = asked("sft", folder, gradient_checkpointing=False, **settings)
    trainer.asked = []
    tell = lambda *args, **options: trainer.asked.append(args) or told(share)  # noqa: E731
    monkeypatch.setattr("alphatoken_loss.trl.gain.shared_gain", tell)
    return trainer


@pytest.mark.parametrize(("share", "rho"), [(0.2, 0.6), (-0.4, 0.5), (0.9, 1.0)])
@pytest.mark.filterwarnings("ignore")
def test_training_is_that_with_the_rho_it_is_told(share, rho, tmp_path, monkeypatch, caplog):
    trainer = finding(tmp_path, monkeypatch, share)
    before = trainer.args.to_dict()
    trainer.train()
    assert f"rho is {rho:.2f}. theta* gains" in caplog.text
    assert trainer.args.to_dict() == before, "another trainer may be made with the same arguments"
    by_hand = asked("sft", tmp_path, gradient_checkpointing=False, path_start=True, path_kl=0.25 * rho / 0.5, rho=rho,
                    learning_rate=1e-2)  # fmt: skip
    by_hand.train()
    assert trainer.alphatoken.config == by_hand.alphatoken.config
    found, expected = dict(trained(trainer.model)), dict(trained(by_hand.model))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert len(trainer.asked) == 1 and sum(len(batch["input_ids"]) for batch in trainer.asked[0][2]) == 6
    trainer.train()
    assert len(trainer.asked) == 1, "it is found once"


@pytest.mark.filterwarnings("ignore")
def test_what_is_asked_is_what_a_user_would_ask(tmp_path, caplog):
    trainer = asked("sft", tmp_path, gradient_checkpointing=False, path_start=True, gain_rows=6, fisher_prompts=4,
                    fisher_new_tokens=4)  # fmt: skip
    expected = trainer.shared_gain(rows=6)
    trainer.train()
    assert str(expected) in caplog.text and trainer.alphatoken.config.rho == expected.rho
    assert trainer.alphatoken.fisher is not None


@pytest.mark.parametrize("share", [0.2, 0.9])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_does_not_ask_again(share, tmp_path, monkeypatch):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = finding(tmp_path, monkeypatch, share, **common)
    whole.train()
    resumed = finding(tmp_path, monkeypatch, -1.0, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not resumed.asked and resumed.alphatoken.config == whole.alphatoken.config
    for (name, after), (_, expected) in zip(trained(resumed.model), trained(whole.model), strict=True):
        assert torch.equal(after, expected), name


@pytest.mark.filterwarnings("ignore")
def test_where_there_is_nothing_to_mask_and_no_kl_training_is_trls(tmp_path, monkeypatch):
    trainer = finding(tmp_path, monkeypatch, 0.9, path_start=False, path_kl=0.0)
    trainer.train()
    assert trainer.alphatoken.config.off
    plain = feature(gradient_checkpointing=False, learning_rate=1e-2)
    stock = make("sft", tuning.TRAINERS["sft"][1], plain, tmp_path, ours=False)
    stock.train()
    for (name, after), (_, expected) in zip(trained(trainer.model), trained(stock.model), strict=True):
        assert torch.equal(after, expected), name


@pytest.mark.parametrize(("changes", "message"), [
    ({"rho": 1.0, "path_kl": 0.1}, r"gain_rows is 4, .* but rho=1.0 was given too. Leave rho out"),
    ({"rho": 0.75}, r"gain_rows is 4, .* but rho=0.75 was given too. Leave rho out"),
    ({"kl_on": "dropped"}, r'kl_on is "dropped", and where rho is found to be 1 none is'),
    ({"estimator": "ghost"}, r'told along the way to theta\*; here estimator="ghost".*or gain_rows=0'),
    ({"gain_rows": -1}, r"gain_rows is -1; it must be at least 0, which leaves rho as it is"),
    ({"options": lambda: {"token_weights": lambda forward: forward.logps.exp()}}, "token weights were given. Set gain"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_where_no_rho_can_be_found(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        asked("sft", tmp_path, **{"gain_rows": 4, **changes})
    with pytest.raises(ValueError, match="pairs are kept or dropped by a sign"):
        asked("dpo", tmp_path, gain_rows=4)


@pytest.mark.filterwarnings("ignore")
def test_where_the_data_or_deepspeed_leave_nothing_to_ask(tmp_path):
    trainer = asked("sft", tmp_path, gain_rows=4)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="under DeepSpeed the model is placed only after"):
        trainer._check_gain_rows(valued=True)
    rows = trainer.train_dataset
    trainer.train_dataset = rows.add_column("path_logps", [[0.0] * len(row["input_ids"]) for row in rows])
    with pytest.raises(ValueError, match="the training data bring path_logps, so there is no target"):
        trainer._check_gain_rows(valued=True)


@pytest.mark.filterwarnings("ignore")
def test_what_holds_the_gate_holds_the_one_that_trains(tmp_path, monkeypatch):
    trainer = finding(tmp_path, monkeypatch, 0.2)
    held = trainer.alphatoken
    trainer.get_train_dataloader()
    assert not trainer.asked, "looking at batches asks nothing"
    trainer.train()
    assert trainer.alphatoken is held and held.config.rho == 0.6 and held.path is not None and held.weights is not None


class Still(TrainerCallback):
    """The first step moves nothing."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 0.0


@pytest.mark.parametrize("how", ["model_only", "state_deleted", "off"])
@pytest.mark.filterwarnings("ignore")
def test_what_was_found_is_kept_without_the_librarys_own_file(how, tmp_path, monkeypatch):
    """And training goes on where it was, not at theta*."""
    common = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "save_only_model": how == "model_only"}
    if how == "off":  # nothing to mask, and no KL: no file of the library is written
        common.update(path_start=False, path_kl=0.0)
    whole = finding(tmp_path, monkeypatch, 0.9 if how == "off" else 0.2, **common)
    whole.train()
    if how == "state_deleted":
        (tmp_path / "checkpoint-2" / "alphatoken.safetensors").unlink()
    assert (tmp_path / "checkpoint-2" / "alphatoken.safetensors").exists() is False
    resumed = finding(tmp_path, monkeypatch, -1.0, **common)
    resumed.add_callback(Still())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not resumed.asked and resumed.alphatoken.config == whole.alphatoken.config
    there = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    for name, after in trained(resumed.model):
        assert torch.equal(after, there[name.replace(".default", "")]), name


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_does_not_tell_what_was_found(tmp_path, monkeypatch):
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    finding(tmp_path, monkeypatch, 0.2, **common, gain_rows=0).train()
    later = finding(tmp_path, monkeypatch, 0.2, **common)
    with pytest.raises(ValueError, match=r"does not tell what was found. Set gain_rows=0, and rho to what the run"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("form", ["padding_free", "packing"])
@pytest.mark.filterwarnings("ignore")
def test_sequences_count_however_they_are_packed(form, tmp_path):
    """The same clean and training sequences give the same answer."""
    changes = {"padding_free": {"max_length": None}, "packing": {"max_length": 64}}[form]
    if form == "padding_free":  # the target too; rows that were held out of packs would be packs
        changes["options"] = lambda: {"target_dataset": None}
    plain = asked("sft", tmp_path, options=changes.get("options", dict))
    packed = asked("sft", tmp_path, **{form: True}, **changes)
    found, expected = packed.shared_gain(rows=10**6), plain.shared_gain(rows=10**6)
    assert found.clean == pytest.approx(expected.clean, rel=1e-4)
    assert found.training == pytest.approx(expected.training, rel=1e-4)
    assert found.interval == pytest.approx(expected.interval, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_target_of_one_row_says_what_to_do(tmp_path):
    trainer = asked(
        "sft", tmp_path, gain_rows=4, options=lambda: {"target_dataset": tuning.sft_data(count=1, first=50)}
    )
    with pytest.raises(ValueError, match=r"Fewer than two rows of the target.*Or set gain_rows=0, which leaves rho"):
        trainer.train()
