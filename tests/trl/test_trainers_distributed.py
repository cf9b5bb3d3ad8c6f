"""Two processes through accelerate: the same parameters, target and Fisher on each, and those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tuning
from checks import error
from datasets import Dataset
from processes import RANKS, side_by_side
from tuning import arguments, base, dpo_data, lora, sft_data, tokenizer, trained

from alphatoken_loss import Fisher

pytestmark = pytest.mark.slow

STEPS = 3
PENALTY = {"sft": {"kl_coef": 1.0}, "dpo": {}}


def run(kind: str, folder: Path, *, size: int, fisher: Fisher | None, **more: object) -> dict[str, object]:
    """Train on the same global batches, whatever the number of processes; count what was held out and logged."""
    args = arguments(
        kind, folder, per_device_train_batch_size=size, max_steps=STEPS, threshold_scope="sequence", target_size=8,
        gradient_checkpointing=False, target_batch_size=4, **more,
    )  # fmt: skip
    data: Dataset = (sft_data if kind == "sft" else dpo_data)(count=24)
    trainer = tuning.TRAINERS[kind][0](
        base(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=lora(), fisher=fisher
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    fisher = trainer.alphatoken.fisher
    return {
        "parameters": dict(trained(trainer.model)),
        "target": dict(trainer.alphatoken.target.gradients),
        "fisher": {name: fisher.diagonal(name) for name in fisher.names},
        "prompts": fisher.prompts,
        "share": sum(len(batch["input_ids"]) for batch in trainer.alphatoken.source.batches),
        "kept": [log.get("alphatoken/kept") for log in logs],
        "kl": [log.get("alphatoken/kl") for log in logs],
        "losses": [log["loss"] for log in logs],
    }


def work(rank: int, folder: str, fisher: Fisher) -> None:
    for kind in ("sft", "dpo"):
        result = {
            "given": run(kind, Path(folder) / kind, size=2, fisher=fisher, **PENALTY[kind]),
            "estimated": run(kind, Path(folder) / kind, size=2, fisher=None),
        }
        torch.save(result, f"{folder}/{kind}-{rank}.pt")


def some_fisher(folder: Path, **settings: Any) -> Fisher:
    trainer = tuning.TRAINERS["sft"][0](
        base(), args=arguments("sft", folder, **settings), train_dataset=sft_data(), target_dataset=sft_data(count=4),
        processing_class=tokenizer(), peft_config=lora(),
    )  # fmt: skip
    return trainer._estimate_fisher()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    given = some_fisher(folder)
    side_by_side(work, str(folder), given)
    ranks = {kind: [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(RANKS)] for kind in ("sft", "dpo")}
    alone = {kind: run(kind, folder / "alone", size=4, fisher=given, **PENALTY[kind]) for kind in ("sft", "dpo")}
    return ranks, alone


@pytest.mark.parametrize("what", ["parameters", "target", "fisher"])
@pytest.mark.parametrize("how", ["given", "estimated"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_every_rank_has_the_same(results, kind, how, what):
    first, second = (rank[how] for rank in results[0][kind])
    assert set(first[what]) == set(second[what])
    for name, tensor in first[what].items():
        assert torch.equal(tensor, second[what][name]), name


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_target_and_fisher_are_shared_out_between_ranks(results, kind):
    answers = 2 if kind == "dpo" else 1
    for rank in results[0][kind]:
        assert rank["estimated"]["share"] == 4 * answers  # of 8 rows
        assert rank["estimated"]["prompts"] == 4  # the sum over ranks


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_an_even_split_is_one_process(results, kind):
    ranks, alone = results[0][kind][0]["given"], results[1][kind]
    start = dict(trained(tuning.get_peft_model(base(), lora())))
    for name, tensor in alone["target"].items():
        if float(tensor.abs().max()) > 0:
            assert error(ranks["target"][name], tensor) < 1e-3, name
    assert set(alone["parameters"]) == set(start)
    for name, tensor in alone["parameters"].items():
        assert error(ranks["parameters"][name], tensor) < 1e-5, name
    assert ranks["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    if kind == "sft":  # the mean of the ranks' means, whose numbers of tokens are not quite the same
        assert ranks["kl"] == pytest.approx(alone["kl"], rel=0.2) and alone["kl"][-1] > 0.01
    assert ranks["kept"] == pytest.approx(alone["kept"], abs=0.05)
    assert len(set(alone["losses"])) == STEPS
