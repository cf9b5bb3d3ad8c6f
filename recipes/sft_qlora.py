"""SFT on a 4-bit base model with LoRA (QLoRA), plainly and with AlphaToken, from the same seed.

    python recipes/sft_qlora.py
    python recipes/sft_qlora.py --rho 0.3 --path_kl 0.2 --report_to tensorboard
    python recipes/sft_qlora.py --estimator difference
    python recipes/sft_qlora.py --config run.yaml     # any argument of TRL's SFT script, in a file
    python recipes/sft_qlora.py --model_name_or_path Qwen/Qwen3-8B --dataset_name rows.jsonl

Without arguments: the small language model of tiny_lm.py, quantised to NF4, learns to complete code in a house style
from answers with random forum lines around them; what counts is the loss on answers without those lines. With
arguments: any causal LM and any dataset with a prompt and a completion (or a chosen answer), text or conversations, of
the hub or a JSON Lines file, on a GPU. Arguments are those of TRL: data, AlphaTokenSFTConfig and ModelConfig with its
quantisation flags; defaults are in qlora.py, and AlphaToken's are those of `AlphaTokenSFTConfig.best()`.

Prints the loss on held-out answers (what was learned) and on held-out prose of the language reference (what was
forgotten), before and after either run, and what it cost.
"""

import math
from pathlib import Path

import quiet  # noqa: F401  first, before the libraries that it silences
from peft import PeftModel
from qlora import (
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
from tiny_lm import pieces, print_table, read_corpus, tiny_lm
from transformers import set_seed
from trl import get_peft_config

from alphatoken_loss import AlphaTokenSFTConfig, AlphaTokenSFTTrainer

RETENTION_PIECES = 32  # pieces of held-out prose, 128 tokens each
ROWS = {
    "answers": "loss on held-out answers, nats/token",
    "prose": "loss on held-out prose, nats/token",
    "kept": "share of answer tokens kept",
    "seconds": "seconds per step",
    "memory": "peak memory, MiB (CPU: process so far)",
}

READ = """
Read the loss on answers as what was learned and the loss on prose as what was forgotten (lower is better in both):
plain SFT learns the noise around the answers, too."""


def evaluate(model, answers, prose):
    """Losses in nats per token on answers and on prose."""
    model.train()  # see qlora.py, load_base
    with held_out(answers, prose) as bar:
        return {"answers": mean_loss(model, answers, bar), "prose": mean_loss(model, prose, bar)}


def main(argv=None):
    data, args, model_args = parse(AlphaTokenSFTConfig, argv, output_dir="outputs/sft_qlora")
    corpus = read_corpus()
    path = model_args.model_name_or_path or tiny_lm(corpus)
    tokenizer = load_tokenizer(path)
    parts = load_rows(data, args, corpus)
    if "chosen" in parts[0].column_names:
        parts = [part.rename_column("chosen", "completion") for part in parts]
    training, validation, test = (part.select_columns(["prompt", "completion"]) for part in parts)
    if data.dataset_name is None:
        print("A training row:", *(f"{name}: {text}" for name, text in training[0].items()), sep="\n")

    reports = {}
    for name in ("SFT", "AlphaToken SFT"):
        set_seed(args.seed)
        trainer = AlphaTokenSFTTrainer(
            load_base(path, model_args),
            args=run_arguments(args, name, plain=name == "SFT"),
            train_dataset=training,
            eval_dataset=test,
            target_dataset=validation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
        adapters_in_float32(trainer.model)
        answers = batches(trainer, trainer.eval_dataset)
        prose = pieces(tokenizer, corpus.prose_heldout, RETENTION_PIECES, 128).to(trainer.accelerator.device)
        prose = [{"input_ids": ids, "labels": ids} for ids in prose.split(16)]
        if not reports:
            reports["before"] = evaluate(trainer.model, answers, prose)
        cost = train(trainer, name, loss="loss")
        reports[name] = {**evaluate(trainer.model, answers, prose), **cost}

    folder = trainer.args.output_dir
    del trainer
    again = evaluate(PeftModel.from_pretrained(load_base(path, model_args), folder), answers, prose)
    if not all(math.isclose(again[key], reports[name][key], rel_tol=1e-2, abs_tol=1e-3) for key in again):
        raise SystemExit(f"The adapter in {folder} does not reproduce its metrics: {again}")
    print(f"\nAdapters are in {args.output_dir}; {Path(folder).name}, loaded again with PEFT, gives the same metrics.")
    print_table(reports, ROWS)
    print(READ)
    return reports


if __name__ == "__main__":
    main()
