"""DPO on a 4-bit base model with LoRA (QLoRA), plainly and with AlphaToken, from the same seed.

    python recipes/dpo_qlora.py
    python recipes/dpo_qlora.py --learning_rate 3e-4 --report_to tensorboard
    python recipes/dpo_qlora.py --estimator ghost --rho 0.3
    python recipes/dpo_qlora.py --config run.yaml     # any argument of TRL's DPO script, in a file
    python recipes/dpo_qlora.py --model_name_or_path Qwen/Qwen3-8B --dataset_name trl-lib/ultrafeedback_binarized

Without arguments: a small language model is trained from scratch on text that ships with Python (once, then
cached), quantised to NF4, and tuned to prefer code in a house style to the code that its author wrote, while
random forum lines around both answers carry no preference and three training pairs in ten are labelled wrongly (see
tiny_lm.py). With arguments: any causal LM and any preference dataset of the hub or a JSON Lines file, on a GPU.
Arguments are those of TRL: data, AlphaTokenDPOConfig and ModelConfig with its quantisation flags; defaults are in
qlora.py, and AlphaToken's are those of `AlphaTokenDPOConfig.best()`.

For both runs it prints what was learned (accuracy and margin of the implicit reward on held-out pairs, loss on
the chosen answers), what was forgotten (loss on held-out prose of the language reference), and what it cost.
Both take the same steps at the same learning rate. AlphaToken begins at theta*, to where the clean validation pairs
lead, so it goes further in them and may forget more: compare margin and forgetting together.
"""

import math
from pathlib import Path

import quiet  # noqa: F401  first, before the libraries that it silences
import torch
from peft import PeftModel
from qlora import (
    FLIPPED,
    adapters_in_float32,
    batches,
    held_out,
    load_base,
    load_rows,
    load_tokenizer,
    mean_loss,
    parse,
    run_arguments,
    train,
)
from tiny_lm import chosen_answers, pieces, print_table, read_corpus, tiny_lm
from transformers import set_seed
from trl import get_peft_config, maybe_extract_prompt

from alphatoken_loss import AlphaTokenDPOConfig, AlphaTokenDPOTrainer, dpo_loss

RETENTION_PIECES = 32  # pieces of held-out prose, 128 tokens each
ROWS = {
    "accuracy": "held-out preference accuracy",
    "margin": "held-out reward margin",
    "chosen": "loss on held-out chosen answers, nats/token",
    "prose": "loss on held-out prose, nats/token",
    "kept": "share of answer tokens kept",
    "seconds": "seconds per step",
    "memory": "peak memory, MiB (CPU: process so far)",
}

READ = """
Read accuracy and margin as what was learned and the two losses as what was forgotten, and read them together:
AlphaToken begins where a few clean pairs lead, so it goes further in the same steps."""


@torch.no_grad()
def evaluate(model, pairs, prose, *, beta):
    """Accuracy and margin of the implicit reward, and losses in nats per token on chosen answers and on prose."""
    model.train()  # see qlora.py, load_base
    chosen = [chosen_answers(batch) for batch in pairs]
    sums = {"accuracy": 0.0, "margin": 0.0}
    with held_out(pairs, chosen, prose) as bar:
        for batch in pairs:
            _, metrics = dpo_loss(model, None, batch, beta=beta, return_metrics=True)
            half = len(batch["input_ids"]) // 2
            sums["accuracy"] += half * float(metrics["rewards/accuracies"])
            sums["margin"] += half * float(metrics["rewards/margins"])
            bar.update()
        losses = {"chosen": mean_loss(model, chosen, bar), "prose": mean_loss(model, prose, bar)}
    count = sum(len(batch["input_ids"]) // 2 for batch in pairs)
    return {**{name: total / count for name, total in sums.items()}, **losses}


def main(argv=None):
    data, args, model_args = parse(AlphaTokenDPOConfig, argv, output_dir="outputs/dpo_qlora")
    corpus = read_corpus()
    path = model_args.model_name_or_path or tiny_lm(corpus)
    tokenizer = load_tokenizer(path)
    training, validation, test = load_rows(data, args, corpus, flipped=FLIPPED)
    if args.estimator != "path":  # the others' target is the loss of good answers
        validation = validation.map(maybe_extract_prompt)  # which conversations may hold inside
        validation = validation.rename_column("chosen", "completion").remove_columns("rejected")
    if data.dataset_name is None:
        print("A training pair:", *(f"{name}: {text}" for name, text in training[0].items()), sep="\n")

    reports = {}
    for name in ("DPO", "AlphaToken DPO"):
        set_seed(args.seed)
        trainer = AlphaTokenDPOTrainer(
            load_base(path, model_args),
            args=run_arguments(args, name, plain=name == "DPO"),
            train_dataset=training,
            eval_dataset=test,
            target_dataset=validation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
        adapters_in_float32(trainer.model)
        pairs = batches(trainer, trainer.eval_dataset)
        prose = pieces(tokenizer, corpus.prose_heldout, RETENTION_PIECES, 128).to(trainer.accelerator.device)
        prose = [{"input_ids": ids, "labels": ids} for ids in prose.split(16)]
        if not reports:
            before = evaluate(trainer.model, pairs, prose, beta=args.beta)
            reports["before"] = {key: before[key] for key in ("chosen", "prose")}
        cost = train(trainer, name, loss="loss", margin="rewards/margins")
        reports[name] = {**evaluate(trainer.model, pairs, prose, beta=args.beta), **cost}

    folder = trainer.args.output_dir
    del trainer
    again = evaluate(PeftModel.from_pretrained(load_base(path, model_args), folder), pairs, prose, beta=args.beta)
    if not all(math.isclose(again[key], reports[name][key], rel_tol=1e-2, abs_tol=1e-3) for key in again):
        raise SystemExit(f"The adapter in {folder} does not reproduce its metrics: {again}")
    print(f"\nAdapters are in {args.output_dir}; {Path(folder).name}, loaded again with PEFT, gives the same metrics.")
    print_table(reports, ROWS)
    print(READ)
    return reports


if __name__ == "__main__":
    main()
