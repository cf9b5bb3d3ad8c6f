"""`alphatoken env`: what a bug report has to say about the machine."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__

_NEEDED = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors")
_BESIDE = ("axolotl", "llamafactory", "liger-kernel", "unsloth", "torchtune", "deepspeed", "flash-attn", "triton")


def run(args: argparse.Namespace) -> int:
    """The command; the exit status is 0."""
    for name, what in environment().items():
        print(f"{name}: {what}")
    return 0


def environment() -> dict[str, str]:
    """What is installed and what it runs on, by name."""
    found = {
        "alphatoken-loss": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }
    for name in (*_NEEDED, *_BESIDE):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in _NEEDED:
                found[name] = "not installed"
    found["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        found["cuda"] = f"none (torch is built for {torch.version.cuda or 'no CUDA'})"
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
        )
    found["executable"] = sys.executable
    return found
