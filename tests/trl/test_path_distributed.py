"""Two processes through accelerate: one theta* and one column, each made of both shares, and those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tuning
from checks import error
from datasets import Dataset
from processes import RANKS, side_by_side
from test_trainers_distributed import some_fisher
from tuning import arguments, base, dpo_data, lora, sft_data, tokenizer, trained

from alphatoken_loss import Fisher

pytestmark = pytest.mark.slow


def run(kind: str, folder: Path, *, size: int, together: int, fisher: Fisher) -> dict[str, object]:
    """Train on the same global batches, and to theta* by the same steps, whatever the number of processes."""
    args = arguments(
        kind, folder, per_device_train_batch_size=size, target_batch_size=together, target_size=8,
        threshold_scope="sequence", gradient_checkpointing=False, estimator="path", num_layers=None, path_steps=4,
        path_rate=2e-2, path_start=True, precompute_path_log_probs=True, learning_rate=0.1,
    )  # fmt: skip
    data: Dataset = (sft_data if kind == "sft" else dpo_data)(count=23)
    trainer = tuning.TRAINERS[kind][0](
        base(), args=args, train_dataset=data, processing_class=tokenizer(), peft_config=lora(), fisher=fisher
    )
    before = dict(trained(trainer.model))
    trainer.train()
    names = ["path_logps"] if kind == "sft" else ["chosen_path_logps", "rejected_path_logps"]
    return {
        "parameters": dict(trained(trainer.model)),
        "path": dict(trainer.alphatoken.path.parameters),
        "before": before,
        "column": torch.cat([torch.tensor(row[name]) for row in trainer.train_dataset for name in names]),
        "rows": len(trainer.train_dataset),
    }


def work(rank: int, folder: str, fisher: Fisher) -> None:
    for kind in ("sft", "dpo"):
        torch.save(run(kind, Path(folder) / kind, size=2, together=4, fisher=fisher), f"{folder}/{kind}-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    fisher = some_fisher(folder, estimator="path", num_layers=None)
    side_by_side(work, str(folder), fisher)
    ranks = {kind: [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(RANKS)] for kind in ("sft", "dpo")}
    alone = {kind: run(kind, folder / "alone", size=4, together=8, fisher=fisher) for kind in ("sft", "dpo")}
    return ranks, alone


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_both_processes_have_the_same(results, kind):
    first, second = results[0][kind]
    assert first["rows"] == second["rows"] == 15  # the last batch is of one process alone
    assert torch.equal(first["column"], second["column"])
    for what in ("path", "parameters"):
        for name, tensor in first[what].items():
            assert torch.equal(tensor, second[what][name]), (what, name)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_they_are_those_of_one_process(results, kind):
    ranks, alone = results[0][kind][0], results[1][kind]
    assert error(ranks["column"], alone["column"]) < 1e-3
    for what in ("path", "parameters"):
        moved = max(float((tensor - alone["before"][name]).abs().max()) for name, tensor in alone[what].items())
        assert moved > 0.01
        for name, tensor in alone[what].items():
            assert float((ranks[what][name] - tensor).abs().max()) < 1e-3 * moved, (what, name)
