"""A trainer's target in forms of its own, cut, empty, or too large for the device; and a mixture of experts."""

from __future__ import annotations

import pytest
import torch
import tuning
from checks import assert_close
from datasets import Dataset
from trainer_cases import feature, make
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from tuning import arguments, base, lora, rows, sft_data, tokenizer, trained

SFT, DPO = (tuning.TRAINERS[kind][0] for kind in ("sft", "dpo"))
pytestmark = pytest.mark.filterwarnings("ignore")


def trainer_of(folder, train, target, formatting=None, trainer_class=SFT, **args):
    options = {"formatting_func": formatting} if formatting else {}
    return trainer_class(
        base(), args=arguments("sft" if trainer_class is SFT else "dpo", folder, **args), train_dataset=train,
        target_dataset=target, processing_class=tokenizer(), peft_config=lora(), **options,
    )  # fmt: skip


def texts(trainer):
    """The target's rows as text, with what is learned of each."""
    found = []
    for batch in trainer.alphatoken.source.batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            ids, labels = ids[mask.bool()], labels[mask.bool()]
            found.append((tokenizer().decode(ids), tokenizer().decode(labels[labels != -100])))
    return found


QUESTIONS = Dataset.from_list([{"q": row["prompt"], "a": row["completion"]} for row in rows()])
PAIRS = Dataset.from_list([{"prompt": "1:", "chosen": " 1", "rejected": " 2"}] * 4)


def asked(row):
    return f"Q{row['q']} A{row['a']}"


@pytest.mark.parametrize(("target", "wanted"), [
    (sft_data(count=3), [(r["prompt"] + r["completion"] + "</s>", r["completion"] + "</s>") for r in rows(3)]),
    (sft_data("text", count=3), [(r["prompt"] + r["completion"] + "</s>",) * 2 for r in rows(3)]),
    (QUESTIONS.select(range(3)), [(asked({"q": r["prompt"], "a": r["completion"]}) + "</s>",) * 2 for r in rows(3)]),
    (Dataset.from_list([{"input_ids": [70, 71, 72], "labels": [-100, 71, 72]}]), [("abc", "bc")]),
], ids=["prompt-completion", "text", "the training data's", "tokenised"])  # fmt: skip
def test_a_formatting_function_is_for_rows_of_the_training_datas_form(target, wanted, tmp_path):
    found = texts(trainer_of(tmp_path, QUESTIONS, target, asked))
    if "input_ids" in target.column_names:
        wanted = [tuple(tokenizer().decode(ids) for ids in ([70, 71, 72], [71, 72]))]
    assert found == wanted


def test_a_formatting_function_of_a_stream(tmp_path):
    found = texts(trainer_of(tmp_path, QUESTIONS.to_iterable_dataset(), QUESTIONS.select(range(3)), asked))
    wanted = [asked({"q": r["prompt"], "a": r["completion"]}) + "</s>" for r in rows(3)]
    assert found == [(text, text) for text in wanted]


@pytest.mark.parametrize("column", ["text", "content", None])
def test_a_text_field_is_the_targets_where_it_has_one(column, tmp_path):
    train = sft_data("text").rename_column("text", "content")
    target = sft_data(count=3) if column is None else sft_data("text", count=3).rename_columns({"text": column})
    trainer = trainer_of(tmp_path, train, target, dataset_text_field="content")
    found, trained_on = texts(trainer), tokenizer().decode(trainer.train_dataset[0]["input_ids"])
    end = "</s>" if column != "content" or trained_on.endswith("</s>") else ""  # TRL 1.14 adds none to this column
    whole = [r["prompt"] + r["completion"] + end for r in rows(3)]
    learned = whole if column else [r["completion"] + "</s>" for r in rows(3)]
    assert found == list(zip(whole, learned, strict=True))


@pytest.mark.parametrize("trainer_class", [SFT, DPO])
@pytest.mark.parametrize(("target", "message"), [
    (PAIRS, r"holds preference pairs.*as prompt and completion.*estimator=\"path\""),
    (sft_data().select([]), "has no rows"),
    (QUESTIONS, r"has the columns a, q\. They must hold prompt and completion"),
])  # fmt: skip
def test_targets_that_are_none(trainer_class, target, message, tmp_path):
    train = sft_data() if trainer_class is SFT else tuning.dpo_data()
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, train, target, trainer_class=trainer_class)


def test_a_target_cut_away_by_truncation(tmp_path, caplog):
    """How many of how many, and by which length; where some are left, a warning."""
    long = [{"prompt": "x" * 40, "completion": "yes"}] * 3
    with pytest.raises(ValueError, match=r"3 of 3 target rows .* max_length=20 .*'keep_start'.*Raise max_length"):
        trainer_of(tmp_path, sft_data(), Dataset.from_list(long), max_length=20)
    with caplog.at_level("WARNING"):
        trainer = trainer_of(tmp_path, sft_data(), Dataset.from_list([*long, *rows(2)]), max_length=30)
    assert "3 of 5 target rows have no response token within max_length=30" in caplog.text
    assert len(texts(trainer)) == 2
    assert len(texts(trainer_of(tmp_path, sft_data(), Dataset.from_list(long), max_length=None))) == 3


def with_room_for_two(folder, size, options=None, **args):
    """Training on a device with room for two rows, and the batch sizes that were tried."""
    case = feature(options=options, per_device_train_batch_size=size, max_steps=3, **args)
    trainer = make("sft", SFT, case, folder)
    sizes, limit = [], 2

    def room(module, args, kwargs):
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > limit:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.base_model.model.model.register_forward_pre_hook(room, with_kwargs=True)
    trainer.train()
    return trainer, sizes


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ghost", "difference"])
def test_a_batch_size_that_is_found_is_the_targets_and_the_fishers_too(estimator, tmp_path):
    """Training begins with eight rows where two have room; then it is as if it had begun with two."""
    ours = {"estimator": estimator, "options": lambda: {"target_dataset": sft_data(count=4, first=50)}}
    found, sizes = with_room_for_two(tmp_path / "found", 8, auto_find_batch_size=True, **ours)
    wanted, _ = with_room_for_two(tmp_path / "two", 2, fisher_batch_size=2, **ours)
    assert found.state.global_step == 3 and found._train_batch_size == 2
    first = next(i for i, size in enumerate(sizes) if max(sizes[i:]) <= 2)
    assert max(sizes) > 2 and len(sizes) - first > 3 * 2
    for name, gradient in wanted.alphatoken.target.gradients.items():
        assert_close(found.alphatoken.target.gradients[name], gradient, 1e-3, name)  # padding differs
    for (name, after), (_, expected) in zip(trained(found.model), trained(wanted.model), strict=True):
        assert_close(after.detach(), expected.detach(), 1e-3, name)


@pytest.mark.slow
def test_a_batch_size_that_is_found_draws_what_it_would_have_drawn(tmp_path):
    ours = {"selection": "random", "num_layers": None, "options": dict}
    found, sizes = with_room_for_two(tmp_path / "found", 8, auto_find_batch_size=True, **ours)
    wanted, _ = with_room_for_two(tmp_path / "two", 2, **ours)
    assert max(sizes) > 2 and found._train_batch_size == 2
    for (name, after), (_, expected) in zip(trained(found.model), trained(wanted.model), strict=True):
        assert_close(after.detach(), expected.detach(), 1e-3, name)


def test_a_mixture_with_trls_router_loss(tmp_path):
    """The Fisher's completions are sampled although the model's configuration asks for router logits."""

    def mixture():
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=259, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, router_aux_loss_coef=0.5,
        )  # fmt: skip
        return Qwen3MoeForCausalLM(config)

    adapter = lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    trainer = make("sft", SFT, feature(model=mixture, peft=lambda: adapter, max_steps=2), tmp_path)
    config = trainer.model.config
    assert config.output_router_logits
    trainer.train()
    assert config.output_router_logits and trainer.alphatoken.fisher.prompts == 4
    assert all("aux_loss" in log for log in trainer.state.log_history if "loss" in log)
    assert all(bool(parameter.isfinite().all()) for _, parameter in trained(trainer.model))
