"""A small model, its data and a tuning run, shared by the scripts that ask how well token values agree.

The base is a Llama of six blocks with bytes as tokens, trained on Python source of the standard library. A LoRA adapter
then learns sums in words, of which a quarter of the answers' bytes are random, masked by the difference estimator.
"""

from __future__ import annotations

import copy
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from alphatoken_loss import AlphaToken, AlphaTokenConfig, Fisher, Target, sft_loss, target_gradient

Batch = dict[str, torch.Tensor]
BLOCKS = 6
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def source_batch(size: int, generator: torch.Generator, length: int = 96) -> Batch:
    """Pieces of Python source; all tokens are response."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:80])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(0, len(data) - length, (size,), generator=generator)
    ids = torch.stack([data[start : start + length] for start in starts]).long()
    return {"input_ids": ids, "labels": ids.clone()}


def sum_batch(size: int, generator: torch.Generator, noise: float = 0.0, length: int = 64) -> Batch:
    """Sums in words of digits, e.g. `# 17 + 58\\nresult = 75`; a share of the answer's bytes may be random."""
    rows, labels = [], []
    for _ in range(size):
        a, b = torch.randint(0, 100, (2,), generator=generator).tolist()
        prompt = f"# {a} + {b}\n".encode()
        answer = f"result = {a + b}  # the sum of {a} and {b}\n".encode()[: length - len(prompt)]
        noisy = bytearray(answer)
        for i in range(len(noisy)):
            if torch.rand((), generator=generator) < noise:
                noisy[i] = int(torch.randint(32, 127, (), generator=generator))
        row = prompt + bytes(noisy)
        rows.append(F.pad(torch.tensor(list(row)), (0, length - len(row))))
        labels.append(F.pad(torch.tensor([-100] * len(prompt) + list(noisy)), (0, length - len(row)), value=-100))
    ids = torch.stack(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.stack(labels)}


def counted(batch: Batch) -> torch.Tensor:
    """`(B, T)` bool: the labels that have a value."""
    return F.pad(batch["labels"][:, 1:] != -100, (1, 0))


def pretrained(steps: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in (bar := tqdm(range(steps), desc="pretraining")):
        loss = sft_loss(model, source_batch(16, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def with_adapter(base: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy of the base with a fresh adapter."""
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), LORA).train()  # type: ignore[arg-type]


def in_nf4(model: torch.nn.Module) -> torch.nn.Module:
    """The same base in NF4, computing in float32, with the same adapter."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = copy.deepcopy(model).unload()  # type: ignore[operator]
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.float32)
    quantised = get_peft_model(base, LORA).train()
    set_peft_model_state_dict(quantised, get_peft_model_state_dict(model))  # type: ignore[arg-type]
    return quantised


def last_blocks(fisher: Fisher, layers: int | str) -> Fisher:
    """What a Fisher over all blocks holds of the last so many."""
    first = 0 if layers == "all" else BLOCKS - int(layers)
    inside = {name: f for name, f in fisher.factors.items() if int(name.split(".layers.")[1].split(".")[0]) >= first}
    return Fisher(inside, fisher.prompts, fisher.base)


def joined(targets: list[Target]) -> Target:
    """The target of several sets of sequences together."""
    tokens = sum(target.tokens for target in targets)
    names = targets[0].gradients
    return Target({name: sum(t.tokens / tokens * t.gradients[name] for t in targets) for name in names}, tokens)  # type: ignore[misc]


class Run:
    """One tuning run of a fresh adapter, at the library's default schedule of the target.

    Attributes:
        validation (`list`): 128 clean sequences in batches of 8, of which the run's own target takes the first four.
        large (`list`): 256 more, in batches of 64.
        past (`dict`): optimizer step -> the fresh target that was kept there.
    """

    def __init__(self, base: torch.nn.Module, fisher: Fisher, learning_rate: float, seed: int) -> None:
        self.model, self.fisher, self.learning_rate, self.seed = with_adapter(base, seed), fisher, learning_rate, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.validation = [sum_batch(8, self.generator) for _ in range(16)]
        self.large = [sum_batch(64, self.generator) for _ in range(4)]
        self.past: dict[int, Target] = {}

    def noisy(self, size: int) -> Batch:
        """Another batch of the training data."""
        return sum_batch(size, self.generator, noise=0.25)

    def target(self, batches: list[Batch] | None = None, model: torch.nn.Module | None = None) -> Target:
        """A fresh target over all blocks, by default from the 32 sequences of the run's own."""
        batches = self.validation[:4] if batches is None else batches
        return target_gradient(model or self.model, batches, config=AlphaTokenConfig(estimator="exact"))

    def steps(self, count: int) -> Iterator[tuple[int, Batch]]:
        """Optimizer step and training batch, before each of `count` steps and after the last."""
        config = AlphaTokenConfig(estimator="difference")
        alphatoken = AlphaToken(self.model, target=self.validation[:4], fisher=self.fisher, config=config)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate)
        name = f"tuning at {self.learning_rate:g}, seed {self.seed}"
        for step in tqdm(range(count + 1), desc=name):
            batch = self.noisy(8)
            yield step, batch
            with alphatoken(batch):
                self.model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
