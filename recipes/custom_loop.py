"""Supervised fine-tuning in a plain PyTorch and accelerate loop, in which AlphaToken is one changed line.

    python recipes/custom_loop.py
    python recipes/custom_loop.py --plain     # the same loop without AlphaToken
    python recipes/custom_loop.py --model Qwen/Qwen3-0.6B --dataset rows.jsonl --clean clean.jsonl

Before the first step it asks what the training rows share with the clean ones (`shared_gain`), and takes the preset
`AlphaTokenConfig.best` with the share of tokens that this tells. Without `--model`: a small language model made from
text that ships with Python learns to complete code in a house style, from answers with random forum lines around them
(see tiny_lm.py). Rows of a dataset have "prompt" and "completion" as text. Some of the clean rows say what is to be
learned, the others are tested on. Prints the loss on held-out answers and on held-out prose, before and after.
"""

import argparse
import itertools
import time
from pathlib import Path

import quiet  # noqa: F401  first, before the libraries that it silences
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from tiny_lm import peak_memory, pieces, preference_rows, print_table, read_corpus, tiny_lm
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from alphatoken_loss import AlphaToken, AlphaTokenConfig, estimate_fisher, sft_loss, shared_gain

STEPS, BATCH_SIZE = 60, 16  # optimizer steps; sequences per step
LEARNING_RATE, LEARNING_RATE_REAL = 1e-3, 2e-5  # the small model; --model
LORA_RANK = 8
MAX_LENGTH = 512  # tokens of prompt and answer
HELD_OUT = 32, 128  # rows that define the target; rows for the test loss (at most)
ASKED = 4  # batches by which it is told what there is to mask
FISHER_PROMPTS, FISHER_TOKENS = 64, 32  # prompts; tokens sampled for each
ROWS = {
    "answers": "loss on held-out answers, nats/token",
    "prose": "loss on held-out prose, nats/token",
    "kept": "share of answer tokens kept",
    "seconds": "seconds per step",
    "memory": "peak memory, MiB (CPU: process so far)",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="causal LM, hub name or folder; default: the small LM made here")
    add("--dataset", help="hub name or .jsonl file with prompt and completion; default: the task made here")
    add("--clean", help="the same, of clean rows; default: rows of the dataset that are then not trained on")
    add("--output-dir", type=Path, default=Path("outputs/custom_loop"), help="where the adapter goes")
    add("--steps", type=int, default=STEPS, help="optimizer steps")
    add("--batch-size", type=int, default=BATCH_SIZE, help="sequences per step")
    add("--learning-rate", type=float, help="constant; 1e-3, with --model 2e-5")
    add("--rho", type=float, help="share of answer tokens trained on, in (0, 1]; default: what shared_gain tells")
    add("--plain", action="store_true", help="train on all tokens, without AlphaToken")
    add("--lora-rank", type=int, default=LORA_RANK, help="rank of the adapters")
    add("--max-length", type=int, default=MAX_LENGTH, help="tokens of prompt and answer kept")
    add("--seed", type=int, default=0, help="of adapters and batches")
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE_REAL if args.model else LEARNING_RATE
    return args


def load_rows(args, corpus):
    """Return (prompt, answer) for training, target and test."""
    wanted = args.steps * args.batch_size
    if args.dataset is None:
        parts = (
            preference_rows(corpus.code_train, noisy=True, seed=args.seed, limit=wanted),
            preference_rows(corpus.code_validation, noisy=False, seed=1, limit=HELD_OUT[0]),
            preference_rows(corpus.code_test, noisy=False, seed=2, limit=HELD_OUT[1]),
        )
        return [[(row["prompt"], row["chosen"]) for row in part] for part in parts]

    def read(name):
        local = Path(name).is_file()
        data = load_dataset("json", data_files=name) if local else load_dataset(name)
        return [(row["prompt"], row["completion"]) for row in data["train"].shuffle(seed=args.seed)]

    rows = read(args.dataset)
    clean = rows[: min(sum(HELD_OUT), len(rows) // 2)] if args.clean is None else read(args.clean)
    target = min(HELD_OUT[0], len(clean) // 2)
    parts = rows if args.clean else rows[len(clean) :], clean[:target], clean[target : target + HELD_OUT[1]]
    if not all(parts):
        raise SystemExit(f"{len(rows)} rows of --dataset and {len(clean)} clean ones are too few. Give more.")
    return parts


def collate(rows, tokenizer, ending, max_length):
    """Pad rows on the right; labels are -100 on the prompt and the padding."""
    ids, labels = [], []
    for prompt, answer in rows:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(answer + ending, add_special_tokens=False)["input_ids"]
        ids.append(torch.tensor((before + after)[:max_length]))
        labels.append(torch.tensor(([-100] * len(before) + after)[:max_length]))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@torch.no_grad()
def mean_loss(model, batches):
    model.eval()
    losses = [float(model(**batch).loss) for batch in tqdm(batches, desc="held out", leave=False, dynamic_ncols=True)]
    model.train()
    return sum(losses) / len(losses)


def main(argv=None):
    args = parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    corpus = read_corpus()
    path = args.model or tiny_lm(corpus)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ending = tokenizer.eos_token if args.dataset else ""
    set_seed(args.seed)
    lora = LoraConfig(
        r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)

    accelerator = Accelerator()
    loaders = [
        DataLoader(
            part,
            batch_size=args.batch_size,
            shuffle=index == 0,
            collate_fn=lambda rows: collate(rows, tokenizer, ending, args.max_length),
        )
        for index, part in enumerate(load_rows(args, corpus))
    ]
    model, optimizer, loader, target, test = accelerator.prepare(model, optimizer, *loaders)
    target, test = list(target), list(test)
    prompts = pieces(tokenizer, corpus.prose, FISHER_PROMPTS, 64).tolist()
    prose = pieces(tokenizer, corpus.prose_heldout, 64, 128).to(accelerator.device)
    prose = [{"input_ids": ids, "labels": ids} for ids in prose.split(16)]

    alphatoken = None
    if not args.plain:
        gain = shared_gain(model, target, list(itertools.islice(loader, ASKED)))
        print(f"\n{gain}")
        config = AlphaTokenConfig.best(rho=gain.rho if args.rho is None else args.rho)
        fisher = estimate_fisher(model, prompts, tokenizer=tokenizer, config=config, max_new_tokens=FISHER_TOKENS)
        alphatoken = AlphaToken(model, target=target, fisher=fisher, config=config)
    before = {"answers": mean_loss(model, test), "prose": mean_loss(model, prose)}

    start, steps = time.perf_counter(), 0
    progress = tqdm(total=args.steps, desc="SFT", unit="step", dynamic_ncols=True)
    while steps < args.steps:
        for batch in loader:
            loss = sft_loss(model, batch, alphatoken)  # the one changed line; it was: loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{loss.item():.3f}")
            progress.update()
            steps += 1
            if steps == args.steps:
                break
    progress.close()

    seconds = (time.perf_counter() - start) / steps
    kept = 1.0 if alphatoken is None else alphatoken.metrics()["kept"]
    after = {"answers": mean_loss(model, test), "prose": mean_loss(model, prose)}
    after |= {"kept": kept, "seconds": seconds, "memory": peak_memory(accelerator.device)}
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    print(f"\nThe adapter is in {args.output_dir}.")
    print_table({"before": before, "after": after}, ROWS)
    print("\nRead the loss on answers as what was learned and the loss on prose as what was forgotten.")


if __name__ == "__main__":
    main()
