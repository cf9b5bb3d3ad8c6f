"""Rivals' weights and losses against their formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import rivals
from worlds.rows import Pair, Row, as_batch, pair_batch

from alphatoken_loss import dpo_loss

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **SIZES)).double()
    found = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).double()
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_their_formulas(seed):
    logits = 3 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[..., 7] += 4  # a label that is likely, often
    logps = logits.log_softmax(-1)[..., 7]
    found = {name: rule(logits, logps) for name, rule in rivals.RULES.items()}
    kept = rivals.stm(logps, threshold=30.0)
    for b in range(2):
        for t in range(4):
            p = [math.exp(x) for x in logits[b, t].tolist()]
            best = sorted(p)[-20:]
            share = [x / sum(best) for x in best]
            entropy = -sum(x * math.log(x) for x in share) / math.log(20)
            assert found["eaft"][b, t].item() == pytest.approx(entropy, rel=1e-9)
            assert found["dft"][b, t].item() == pytest.approx(p[7] / sum(p), rel=1e-9)
            assert kept[b, t].item() == float(sum(p) / p[7] <= 30.0)
    assert 0 < kept.mean() < 1


@pytest.mark.parametrize("name", list(rivals.RULES))
def test_a_rule_weighs_the_gradient_and_is_none_itself(model, name):
    batch = as_batch([Row((1, 2, 3), (4, 5, 6, 7)), Row((3,), (9, 8))], pad=0)
    loss, weights = rivals.self_weighted_loss(model, batch, rivals.RULES[name])
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = 0.0
    for row, start, end in ((0, 3, 7), (1, 1, 3)):
        for t in range(start, end):
            at = logits[row, t - 1].log_softmax(-1)
            label = batch["input_ids"][row, t]
            weight = rivals.RULES[name](logits[row, t - 1].detach(), at[label].detach())
            assert weights[row, t].item() == pytest.approx(weight.item(), rel=1e-5)
            total = total - weight * at[label] / 6
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert weights[batch["labels"] == -100].abs().max() == 0
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-7)


def test_pair_loss_is_dpo_smoothed_and_with_likelihood(model):
    pairs = [Pair((1, 2), (3, 4, 5), (6, 7)), Pair((8,), (9, 10), (11, 12, 13, 14))]
    batch = pair_batch(pairs, pad=0)
    batch |= {"ref_chosen_logps": torch.tensor([-9.0, -8.0]), "ref_rejected_logps": torch.tensor([-7.0, -15.0])}

    def logp(prompt, answer):
        ids = torch.tensor([[*prompt, *answer]])
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(answer)).item()

    expected = 0.0
    for i, pair in enumerate(pairs):
        chosen, rejected = logp(pair.prompt, pair.chosen), logp(pair.prompt, pair.rejected)
        s = 0.2 * (chosen - batch["ref_chosen_logps"][i] - rejected + batch["ref_rejected_logps"][i]).item()
        expected += 0.7 * math.log1p(math.exp(-s)) + 0.3 * math.log1p(math.exp(s)) - 0.5 * chosen / len(pair.chosen)
    found = rivals.pair_loss(model, batch, beta=0.2, smoothing=0.3, likelihood=0.5)
    assert found.item() == pytest.approx(expected / 2, rel=1e-5)
    assert rivals.pair_loss(model, batch, beta=0.2).item() == pytest.approx(
        dpo_loss(model, None, batch, beta=0.2).item(), rel=1e-5
    )


def test_stm_asks_the_base(model):
    from worlds.training import SELECTIONS, Moment

    batch = as_batch([Row((1, 2, 3), (4, 5, 6, 7))], pad=0)
    found = SELECTIONS["stm"](Moment(model, batch, torch.empty(0), torch.Generator()))
    with model.disable_adapter():
        logps = rivals.at_labels(model, batch)[1]
    assert torch.equal(found, ((-logps).exp() <= 2.5).float() * (batch["labels"] != -100))
