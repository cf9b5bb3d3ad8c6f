"""TRL's DPO loss where adapters off do not take the model back to where it started."""

from __future__ import annotations

import math

import pytest
import tuning
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM

from alphatoken_loss import AlphaTokenDPOTrainer


def trainer_of(tmp_path, peft: dict, **arguments):
    tokenizer = tuning.tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AlphaTokenDPOTrainer(
        Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)),  # its projections have biases
        args=tuning.arguments("dpo", tmp_path, **arguments),
        train_dataset=tuning.dpo_data(),
        target_dataset=tuning.sft_data(count=4, first=50),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **peft),
    )


def test_the_first_loss_of_a_pissa_adapter_is_ln_2_and_the_next_is_not(tmp_path):
    trainer = trainer_of(tmp_path, {"init_lora_weights": "pissa"})
    trainer.train()
    first, second, _ = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert abs(first - math.log(2)) < 1e-5 and abs(second - first) > 1e-3
    drifts = [log["alphatoken/direct_drift"] for log in trainer.state.log_history if "loss" in log]
    assert abs(drifts[0]) < 1e-3 * abs(drifts[1])


def test_a_reference_that_was_run_with_adapters_off_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"took its part out of the base.*precompute_ref_log_probs=False"):
        trainer_of(tmp_path, {"init_lora_weights": "pissa"}, precompute_ref_log_probs=True)


def test_biases_that_stay_trained_in_trls_reference_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'q_proj.base_layer.bias is trained beside the adapters.*bias="none"'):
        trainer_of(tmp_path, {"bias": "all"})
