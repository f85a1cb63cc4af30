"""How each of the others saves the same state. The fsync and the rename that somebody leaves out
are added after it.

A saver is made once a process, and told where to save: it returns when training may go on, and what
it returns is waited for until the checkpoint is durable. Each has its best known setting: buffers
that can be kept are kept.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark import disk
from benchmark.workload import Workload, copied, tensors


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Pending:
    """A save that goes on."""

    durable: Callable[[], None] = _nothing  # waits for it
    # to be waited for before the state may change, where that is not at once
    staged: Callable[[], None] | None = None


Start = Callable[[Path], Pending]


def write(payload: Any, path: Path) -> None:
    """`torch.save`, made durable and whole or not at all: what everybody should write who writes it
    by hand."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    disk.fsync(path.parent)


def torch_save(work: Workload) -> Start:
    def start(folder: Path) -> Pending:
        write(work.payload(), folder / "checkpoint.pt")
        return Pending()

    return start


def torch_save_thread(work: Workload) -> Start:
    def start(folder: Path) -> Pending:
        thread = threading.Thread(
            target=write, args=(copied(work.payload()), folder / "checkpoint.pt")
        )
        thread.start()
        return Pending(thread.join)

    return start


def safetensors(work: Workload) -> Start:
    from safetensors.torch import save_file

    def start(folder: Path) -> Pending:
        # it keeps nothing but tensors
        named = {str(number): tensor for number, tensor in enumerate(tensors(work.payload()))}
        save_file(named, folder / "checkpoint.safetensors")
        return Pending(lambda: disk.make_durable(folder))

    return start


def accelerate(work: Workload) -> Start:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(work.model, work.optimizer)

    def start(folder: Path) -> Pending:
        accelerator.save_state(str(folder / "checkpoint"))
        return Pending(lambda: disk.make_durable(folder))

    return start


def _join_alone() -> None:
    """A process group of one, which DCP's process wants."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    dist.init_process_group("gloo")


def _dcp(work: Workload, *, process: bool, background: bool) -> Start:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import (
        AsyncCheckpointerType,
        AsyncSaveResponse,
        async_save,
    )

    if process:
        _join_alone()
    on_gpu = next(work.model.parameters()).is_cuda
    options = StagingOptions(on_gpu, process, background, on_gpu)
    # its buffers are allocated once; PyTorch 2.11 closes one that pins them
    kept = None if on_gpu else DefaultStager(options)
    kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD

    def start(folder: Path) -> Pending:
        going = async_save(
            work.payload(),
            checkpoint_id=folder / "checkpoint",
            async_checkpointer_type=kind,
            no_dist=not (process or dist.is_initialized()),
            async_stager=kept or DefaultStager(options),
        )
        staged, saved = (
            (going.staging_completion.result, going.upload_completion)
            if isinstance(going, AsyncSaveResponse)
            else (None, going)
        )

        def durable() -> None:
            saved.result()
            disk.make_durable(folder)

        return Pending(durable, staged)

    return start


def dcp_thread(work: Workload) -> Start:
    return _dcp(work, process=False, background=False)


def dcp_staged(work: Workload) -> Start:
    return _dcp(work, process=False, background=True)


def dcp_process(work: Workload) -> Start:
    return _dcp(work, process=True, background=False)


def torchsnapshot(work: Workload) -> Start:
    from torchsnapshot import Snapshot

    def start(folder: Path) -> Pending:
        pending = Snapshot.async_take(
            str(folder / "checkpoint"), {"model": work.model, "optimizer": work.optimizer}
        )

        def durable() -> None:
            pending.wait()
            disk.make_durable(folder)

        return Pending(durable)

    return start


def lightning_torch_io(work: Workload) -> Start:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    plugin = TorchCheckpointIO()

    def start(folder: Path) -> Pending:
        plugin.save_checkpoint(work.payload(), folder / "checkpoint.ckpt")
        return Pending(lambda: disk.make_durable(folder))

    return start


def lightning_async_io(work: Workload) -> Start:
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    plugin = AsyncCheckpointIO(TorchCheckpointIO())

    def start(folder: Path) -> Pending:
        plugin.save_checkpoint(work.payload(), folder / "checkpoint.ckpt")

        def durable() -> None:
            plugin.teardown()
            disk.make_durable(folder)

        return Pending(durable)

    return start


def fabric(work: Workload) -> Start:
    from lightning.fabric import Fabric

    owner = Fabric(accelerator="cpu", devices=1)
    model, optimizer = owner.setup(work.model, work.optimizer)

    def start(folder: Path) -> Pending:
        owner.save(folder / "checkpoint.ckpt", {"model": model, "optimizer": optimizer})
        return Pending(lambda: disk.make_durable(folder))

    return start


BASELINE = "torch.save + fsync + rename"
SAVERS: dict[str, Callable[[Workload], Start]] = {
    BASELINE: torch_save,
    "torch.save in a thread": torch_save_thread,
    "safetensors": safetensors,
    "accelerate save_state": accelerate,
    "DCP async_save, thread": dcp_thread,
    "DCP async_save, staged in background": dcp_staged,
    "DCP async_save, process": dcp_process,
    "torchsnapshot async_take": torchsnapshot,
    "Lightning TorchCheckpointIO": lightning_torch_io,
    "Lightning AsyncCheckpointIO": lightning_async_io,
    "Fabric save": fabric,
}
