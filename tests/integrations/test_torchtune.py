"""A scored folder in torchtune's own recipe, and the gate on its models, which it refuses; for `make test-tools`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

pytest.importorskip(
    "torchtune", reason="torchtune is not installed here; `make test-tools` makes an environment for it"
)

import tiny
import torch
import torchtune
from datasets import load_from_disk
from omegaconf import OmegaConf
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from alphatoken_loss import AlphaToken, AlphaTokenConfig
from alphatoken_loss.estimators import ESTIMATORS

RECIPES = Path(torchtune.__file__).parents[1] / "recipes"  # files that `tune run` runs, and no package


def lora_recipe():
    spec = importlib.util.spec_from_file_location("lora_recipe", RECIPES / "lora_finetune_single_device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


SCORED = os.environ.get("ALPHATOKEN_SCORED")
MODEL = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "vocab_size": 259,
         "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 256,
         "intermediate_dim": 40, "norm_eps": 1e-6, "rope_base": 10_000, "lora_rank": 4, "lora_alpha": 8}  # fmt: skip


def settings(folder, **dataset):
    """torchtune's own configuration of a LoRA run, on a tiny model and a CPU."""
    tiny.base().save_pretrained(folder / "model")
    defaults = OmegaConf.load(RECIPES / "configs" / "llama3_2" / "1B_lora_single_device.yaml")
    own = {
        "output_dir": str(folder / "out"), "device": "cpu", "dtype": "fp32", "batch_size": 3, "seed": 0,
        "gradient_accumulation_steps": 1, "log_peak_memory_stats": False,
        "model": {"_component_": "torchtune.models.llama3.lora_llama3", **MODEL},
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0, "max_seq_len": 64},
        "dataset": {"_component_": "with_torchtune.scored_rows", "source": SCORED, **dataset},
        "checkpointer": {"_component_": "torchtune.training.FullModelHFCheckpointer", "model_type": "LLAMA3",
                         "checkpoint_dir": str(folder / "model"), "checkpoint_files": ["model.safetensors"],
                         "recipe_checkpoint": None, "output_dir": str(folder / "out")},
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.0},
    }  # fmt: skip
    return OmegaConf.create({**defaults, **own})


@pytest.mark.skipif(SCORED is None, reason="ALPHATOKEN_SCORED names no scored folder; `make test-tools` makes one")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_labels_of_a_scored_folder_arrive_whole_and_make_the_masked_loss(tmp_path, monkeypatch, packed):
    """Against Transformers' model of the same weights: a new adapter adds nothing, and the rate is 0."""
    fed, base, recipe = [], tiny.base().eval(), lora_recipe()
    loss_step = recipe._loss_step

    def recording(self, batch):
        rows = rows_of(batch)
        fed.extend(rows)
        loss = loss_step(self, batch)
        total, count = 0.0, 0
        for ids, labels in rows:
            with torch.no_grad():
                logps = base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            kept = [i for i, label in enumerate(labels) if label != -100]
            total -= float(sum(logps[i - 1, ids[i]] for i in kept))
            count += len(kept)
        assert loss.item() == pytest.approx(total / count, rel=1e-5)
        return loss

    monkeypatch.setattr(recipe, "_loss_step", recording)
    cfg = settings(tmp_path, packed=packed)
    run = recipe(cfg=cfg)
    run.setup(cfg=cfg)
    run.train()
    rows = load_from_disk(SCORED)["train"]
    written = sorted(zip(rows["input_ids"], rows["labels"], strict=True))
    assert len(fed) == len(written) if not packed else 12 < len(fed) <= len(written)  # its last batch is dropped
    assert all(row in written for row in fed) and len({tuple(ids) for ids, _ in fed}) == len(fed)


def rows_of(batch):
    """The rows that a batch was made of: a packed one begins where positions begin anew."""
    found = []
    for number, (ids, labels) in enumerate(zip(batch["tokens"], batch["labels"], strict=True)):
        starts = (batch["input_pos"][number] == 0).nonzero().flatten().tolist() if "input_pos" in batch else [0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            real = ids[start:stop] != 0  # padding
            if real.any():
                found.append((ids[start:stop][real].tolist(), labels[start:stop][real].tolist()))
    return found


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_gate_refuses_its_models_by_name(estimator):
    model = lora_llama3(**MODEL)
    set_trainable_params(model, get_adapter_params(model))
    ids = torch.arange(3, 11)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.raises(ValueError, match=r"TransformerDecoder is no model of Transformers.*`alphatoken score`"):
        AlphaToken(model, target=[batch], config=AlphaTokenConfig(estimator=estimator))
