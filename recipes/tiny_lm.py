"""A small causal LM, trained here on text that ships with Python, a preference task made from it, and helpers.

The recipes use it when no model is given, so that they run anywhere, offline and without a GPU:

- *Text*: the language reference (the topics behind `help()`) is the prose, the modules of the standard
  library are the code. Every tenth topic is held out; modules are divided between pretraining, preference
  training and preference tests, so no test prompt comes from a file that anything was trained on.
- *Model*: a Llama of 0.9 million parameters with a byte-level BPE of 1,024 tokens, trained in a minute or
  more on two cores. It is kept in the user's cache folder; another Python version has other text and trains its own.
- *Task*: complete code in a house style. The rejected answer is what the module's author wrote, the chosen one
  the same lines with camelCase names and double quotes, which the model has hardly seen. In the training
  set both answers look scraped from a forum: a header with a user, date and score before the code and a line
  of counters after it, random and drawn alike on both sides. Those tokens, about half of an answer, carry no
  preference, nor do most tokens of the code. Three pairs in ten have the wrong label: their answers change places,
  as in preferences that people gave. Validation and test answers are the code alone, rightly labelled.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pretraining:
    """All that decides what the cached model is; a change of any of it trains another one."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    steps: int = 300
    batch_size: int = 8  # sequences
    code_sequences: int = 2  # of them; the others are prose
    seq_len: int = 128  # tokens
    learning_rate: float = 6e-3
    warmup_steps: int = 30
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Text that ships with Python, as lists of documents."""

    prose: list[str]
    prose_heldout: list[str]
    code: list[str]
    code_train: list[str]
    code_validation: list[str]
    code_test: list[str]


def read_corpus() -> Corpus:
    """Read the language reference and the mid-sized top-level modules of the standard library."""
    prose = [topics[name] for name in sorted(topics)]
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    code = [f.read_text(encoding="utf-8") for f in files if 8_000 < f.stat().st_size < 60_000]
    return Corpus(
        prose=[text for i, text in enumerate(prose) if i % 10],
        prose_heldout=prose[::10],
        code=[text for i, text in enumerate(code) if i % 10 not in (0, 3, 6)],
        code_train=code[3::10] + code[6::10],
        code_validation=code[:10:10],
        code_test=code[10::10],
    )


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def token_stream(tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, each ended by the end-of-text token."""
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in [*row, tokenizer.eos_token_id]])


def pieces(tokenizer, documents: list[str], count: int, length: int) -> torch.Tensor:
    """The first `count` pieces of `length` tokens, `(count, length)`."""
    return token_stream(tokenizer, documents)[: count * length].view(-1, length)


class Float32(TorchFunctionMode):
    """`Tensor.bfloat16()` keeps float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def has_bf16(device: torch.device | str) -> bool:
    """Whether bf16 is the faster type there: on a CPU without AVX-512 it is many times slower than float32."""
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def precise_muon(device: torch.device):
    """Muon computes in bf16; see `has_bf16`."""
    return contextlib.nullcontext() if has_bf16(device) else Float32()


def pretrain(
    tokenizer, streams: list[tuple[torch.Tensor, int]], settings: Pretraining, device: str = "cpu"
) -> LlamaForCausalLM:
    """Train a Llama from scratch: Muon on matrices, AdamW on embedding and norms; under bf16 autocast on a GPU.

    `streams` are rows of token ids, each with the number of sequences that a batch takes from it.
    """
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(f"This is torch {torch.__version__}; the small model is trained by Muon, which is in 2.9.")
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.hidden_size // 32,
        num_key_value_heads=settings.hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95)),
    ]
    offsets = torch.arange(settings.seq_len)
    progress = tqdm(range(settings.steps), desc="pretraining", unit="step", dynamic_ncols=True)
    for step in progress:
        decay = min((step + 1) / settings.warmup_steps, 1.0) * (1 - 0.95 * step / settings.steps)
        rows = []
        for stream, count in streams:
            for _ in range(count):
                start = torch.randint(len(stream) - settings.seq_len, ())
                rows.append(stream[start + offsets])
        batch = torch.stack(rows).to(device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * decay
            with precise_muon(batch.device):
                optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model.cpu().eval()


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "alphatoken_loss"


def tiny_lm(corpus: Corpus, *, cache_dir: Path | None = None, settings: Pretraining | None = None) -> Path:
    """Return the folder of the small LM and its tokenizer, training them where they are not cached yet."""
    settings = settings or Pretraining()

    def make():
        tokenizer = train_tokenizer(corpus.prose + corpus.code[:30], settings.vocab_size)
        prose, code = token_stream(tokenizer, corpus.prose), token_stream(tokenizer, corpus.code)
        counts = settings.code_sequences, settings.batch_size - settings.code_sequences
        return pretrain(tokenizer, [(code, counts[0]), (prose, counts[1])], settings), tokenizer

    return cached("tiny-lm", [asdict(settings), corpus.prose, corpus.code], make, cache_dir)


def cached(name: str, what, make, cache_dir: Path | None = None) -> Path:
    """Return the folder of a model and tokenizer, `make()` where they are not cached yet.

    The folder's name is a digest of `what` makes them, and it appears under that name only when complete.
    """
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    folder = (cache_dir or cache_root()) / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = make()
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def house_style(code: str) -> str:
    """Write snake_case names in camelCase, and single quotes as double quotes."""
    return re.sub(r"(?<=[a-z0-9])_([a-z])", lambda match: match[1].upper(), code).replace("'", '"')


def scraped(answer: str, rng: random.Random) -> str:
    """The answer between the lines that a scraper leaves around it: random, and no sign of its quality."""
    user, day, month, score = rng.randrange(10**5), rng.randrange(1, 29), rng.randrange(1, 13), rng.randrange(100)
    header = f"# by user{user} on {day}.{month}., score {score}"
    return f"\n{header}{answer}\n# views {rng.randrange(10**4)}, id {rng.randrange(16**6):06x}"


def preference_rows(
    modules: list[str], *, noisy: bool, seed: int, limit: int, flipped: float = 0.0
) -> list[dict[str, str]]:
    """Cut modules into prompts and answers of three lines each, and make up to `limit` preference pairs.

    A share of `flipped` of them gets the wrong label.
    """
    rng = random.Random(seed)
    rows = []
    for module in modules:
        lines = module.splitlines(keepends=True)
        for start in range(0, len(lines) - 6, 3):
            prompt, rejected = ("\n" + "".join(lines[i : i + 3]).rstrip() for i in (start, start + 3))
            chosen = house_style(rejected)
            if chosen == rejected or not 40 <= len(chosen) <= 120 or len(prompt) > 160 or '"""' in chosen:
                continue
            if noisy:
                chosen, rejected = scraped(chosen, rng), scraped(rejected, rng)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    rng.shuffle(rows)
    rows = rows[:limit]
    for row in rng.sample(rows, round(flipped * len(rows))):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def chosen_answers(pairs):
    """The chosen half of a batch of pairs in SFT form: labels are -100 on the prompt and the padding."""
    half = len(pairs["input_ids"]) // 2
    ids, answer = pairs["input_ids"][:half], pairs["completion_mask"][:half].bool()
    return {"input_ids": ids, "attention_mask": pairs["attention_mask"][:half], "labels": ids.where(answer, -100)}


def peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: on a GPU since it was last reset, else of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def print_table(columns: dict[str, dict[str, float]], titles: dict[str, str]) -> None:
    """Print one row per title and one column per run; a run without a figure gets a dash."""
    print("\n" + " " * 48 + "".join(f"{name:>17}" for name in columns))
    for name, title in titles.items():
        cells = (f"{column[name]:.3f}" if name in column else "-" for column in columns.values())
        print(f"{title:<48}" + "".join(f"{cell:>17}" for cell in cells))
