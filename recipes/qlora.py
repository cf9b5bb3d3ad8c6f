"""What the QLoRA recipes share: arguments as in TRL's scripts, rows, the base model, and held-out losses."""

import copy
import itertools
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from tiny_lm import peak_memory, preference_rows
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback, TrainerCallback
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from alphatoken_loss import AlphaTokenConfig, sft_loss

LEARNING_RATE, LEARNING_RATE_REAL = 1e-3, 2e-5  # peak of the cosine schedule: the small model, a real one
VALIDATION_ROWS, TEST_ROWS = 32, 64  # held-out rows that define the target; held-out rows for the metrics
FLIPPED = 0.3  # share of the small task's training pairs with the wrong label
ON_GPU = torch.cuda.is_available()
DEFAULTS = {  # of TRL's own arguments; every one can be given on the command line or in a YAML file
    "max_steps": 40,  # optimizer steps
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "learning_rate": None,  # by model
    "max_length": 512,  # tokens of prompt and answer
    "fisher_prompts": 64,
    "fisher_new_tokens": 32,
    "seed": 0,
    "logging_steps": 10,
    "save_strategy": "no",
    "disable_tqdm": False,
    "use_cpu": not ON_GPU,
    "bf16": ON_GPU,
    "gradient_checkpointing": ON_GPU,
    "dtype": "bfloat16" if ON_GPU else "float32",
    "load_in_4bit": True,
    "use_peft": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
}


def parse(config_class, argv, **defaults):
    """Read TRL's arguments: data, training, model. Defaults are the recipes' and those of `config_class.best`.

    Which settings are best depends on the estimator, and on whether rho is given: else the preset finds it for SFT. So
    these two are read first.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    def read(settings):
        parser = TrlParser((ScriptArguments, config_class, ModelConfig))
        parser.set_defaults(**{**DEFAULTS, **settings, **defaults})
        return parser.parse_args_and_config(argv)

    not_given = 0.123  # a rho that nobody gives
    first = read({"estimator": "path", "rho": not_given})[1]
    best = config_class.best(
        estimator=first.estimator, bf16=False, **({} if first.rho == not_given else {"rho": first.rho})
    )
    data, args, model = read({**asdict(best.alphatoken_config), "gain_rows": best.gain_rows})
    if args.resume_from_checkpoint is not None:
        raise SystemExit("A recipe trains twice, and does not resume. Leave resume_from_checkpoint out.")
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE_REAL if model.model_name_or_path else LEARNING_RATE
    return data, args, model


def load_rows(data, args, corpus, *, flipped=0.0):
    """Return preference rows for training (noisy), validation and test (clean): prompt, chosen, rejected.

    Of the small task's training rows, a share of `flipped` is labelled wrongly.
    """
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    wanted = args.max_steps * per_step if args.max_steps > 0 else 10**9  # all, for so many epochs
    if data.dataset_name is None:
        train = preference_rows(corpus.code_train, noisy=True, seed=args.seed, limit=wanted, flipped=flipped)
        validation = preference_rows(corpus.code_validation, noisy=False, seed=1, limit=VALIDATION_ROWS)
        test = preference_rows(corpus.code_test, noisy=False, seed=2, limit=TEST_ROWS)
        return [Dataset.from_list(part) for part in (train, validation, test)]
    local = Path(data.dataset_name).is_file()
    source = {"path": "json", "data_files": data.dataset_name} if local else {"path": data.dataset_name}
    rows = load_dataset(**source, name=data.dataset_config, split=data.dataset_train_split).shuffle(seed=args.seed)
    if len(rows) <= VALIDATION_ROWS + TEST_ROWS:
        raise SystemExit(
            f"{data.dataset_name} has {len(rows)} rows, and {VALIDATION_ROWS} clean ones and {TEST_ROWS} of the test "
            "are held out of them. Give more."
        )
    ends = [0, VALIDATION_ROWS, VALIDATION_ROWS + TEST_ROWS, min(VALIDATION_ROWS + TEST_ROWS + wanted, len(rows))]
    validation, test, train = (rows.select(range(start, end)) for start, end in itertools.pairwise(ends))
    return train, validation, test


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_base(path, model_args):
    """The base model, in 4 bits (NF4) where asked for.

    Training mode throughout, also in evaluation (there is no dropout): one forward of a 4-bit linear in evaluation mode
    on a CPU, and bitsandbytes repacks its weight for inference, which lets no gradient through any more.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path,
        revision=model_args.model_revision,
        dtype=getattr(torch, model_args.dtype) if model_args.dtype != "auto" else "auto",
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        device_map={"": 0} if ON_GPU else None,
    )
    return model.train()


def adapters_in_float32(model):
    """Keep the adapter of a 4-bit model as PEFT made it. TRL stores it in bf16, which rounds small steps, and is far
    slower on a CPU without instructions for it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class Progress(ProgressCallback):
    """The progress bar, with some figures behind it instead of a line for each log."""

    def __init__(self, name, **figures):
        super().__init__()
        self.name, self.figures = name, figures

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: f"{logs[key]:.2f}" for name, key in self.figures.items() if key in logs}
        if shown and self.training_bar is not None:
            self.training_bar.set_postfix(shown)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())

    def seconds_per_step(self):
        """Without the first step, in which the Fisher is estimated."""
        return (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)


def train(trainer, name, **figures):
    """Train, save the adapter, and return what it cost."""
    clock = Clock()
    trainer.add_callback(clock)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(name, **figures))
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.save_model()
    kept = [log["alphatoken/kept"] for log in trainer.state.log_history if "alphatoken/kept" in log]
    if trainer.alphatoken is None:
        kept = [1.0]  # all of them, of which nothing is logged
    return {
        **({"kept": sum(kept) / len(kept)} if kept else {}),
        "seconds": clock.seconds_per_step(),
        "memory": peak_memory(trainer.accelerator.device),
    }


def run_arguments(args, name, *, plain):
    """The arguments of one of the runs; a plain one keeps all tokens, and starts where the adapter does."""
    changes = {**asdict(AlphaTokenConfig(rho=1.0)), "gain_rows": 0} if plain else {}
    args = copy.copy(args)
    args.__dict__.update(changes, output_dir=str(Path(args.output_dir) / name.lower().replace(" ", "-")))
    return args


def batches(trainer, rows):
    """Rows that the trainer has prepared, as collated batches on its device."""
    size = trainer.args.per_device_train_batch_size
    parts = (
        trainer.data_collator([rows[i] for i in range(s, min(s + size, len(rows)))]) for s in range(0, len(rows), size)
    )
    return [{name: value.to(trainer.accelerator.device) for name, value in part.items()} for part in parts]


def held_out(*parts):
    """One bar for an evaluation, which goes over these lists of batches."""
    return tqdm(total=sum(map(len, parts)), desc="held out", unit="batch", leave=False, dynamic_ncols=True)


@torch.no_grad()
def mean_loss(model, batches, bar):
    """Mean over batches of their loss, in nats per token; each moves the bar by one."""
    total = 0.0
    for batch in batches:
        total += float(sft_loss(model, batch))
        bar.update()
    return total / len(batches)
