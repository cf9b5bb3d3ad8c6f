"""Several processes that train together on one machine, through accelerate."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

RANKS = 2


def _work(rank: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage before they train; what was imported is none
    work(rank, *args)
    torch.distributed.destroy_process_group()


def side_by_side(work: Callable[..., None], *args: Any) -> None:
    """`work(rank, *args)` in each process. They are forked from one that has only imported the trainers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["alphatoken_loss.trl.trainers"])
    mp.start_processes(_work, args=(port, work, args), nprocs=RANKS, start_method="forkserver")
