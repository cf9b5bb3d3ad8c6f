"""Several processes that train together on one machine, through accelerate."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def _work(rank: int, port: int, count: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")  # fmt: skip
    torch.set_num_threads(1)
    work(rank, *args)
    torch.distributed.destroy_process_group()


def together(work: Callable[..., None], *args: Any, count: int = 2) -> None:
    """`work(rank, *args)` in each process. They are forked from one that has only imported the trainers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["alphatoken_loss.trl.trainers"])
    mp.start_processes(_work, args=(port, count, work, args), nprocs=count, start_method="forkserver")
