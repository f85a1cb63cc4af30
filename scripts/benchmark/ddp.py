"""A DDP loop by hand, as the tutorials write it: what the harness's is compared with."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def meet() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    meet()
    if dist.is_initialized():
        dist.destroy_process_group()


def batches(dataset: TensorDataset, batch_size: int) -> Iterator[Any]:
    """This rank's batches of one epoch after another."""
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, drop_last=True)
    loader = DataLoader(dataset, batch_size, sampler=sampler, drop_last=True)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def saver_thread(payload: Any, path: Any) -> Any:
    """`torch.save` of a copy in a thread, durable at its end; the thread."""
    import threading

    from benchmark.savers import write
    from benchmark.workload import copied

    thread = threading.Thread(target=write, args=(copied(payload), path))
    thread.start()
    return thread


def wrap(model: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel:
    return torch.nn.parallel.DistributedDataParallel(model)
