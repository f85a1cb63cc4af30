"""Runs that begin with the files of recipes.py: how they are imported, gone on with, and compared;
for several test modules."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recipes
import torch
import torch.distributed as dist
from recipes import BATCH, Trained, TrainedPair
from s3_server import S3Server
from there import there

from harness import train
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.store import LocalStore

TASK = (
    "task.name=recipe_task:build",
    f"train.global_batch_size={BATCH}",
    "train.clip_norm=null",
    "checkpoint.every_s=null",
    "eval.every_steps=null",
    "checkpoint.best=val_loss:min",
)
PAIR = ("task.name=recipe_task:build_pair", *TASK[1:])
MEMORY_LIMIT = 80 << 20
BOMB_BYTES = 200 << 20


@pytest.fixture(scope="session", name="done")
def done_() -> Trained:
    """What a script had after two epochs with SGD."""
    return recipes.trained()


@pytest.fixture(scope="session", name="adamw")
def adamw_() -> Trained:
    return recipes.trained("adamw")


@pytest.fixture(scope="session", name="pair")
def pair_() -> TrainedPair:
    return recipes.trained_pair()


@pytest.fixture(scope="session", name="bombs")
def bombs_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files that would unpack to BOMB_BYTES: a pickle, a storage that is larger than its
    tensor, and one that is as it says."""
    folder = tmp_path_factory.mktemp("bombs")
    recipes.bomb_in_pickle(folder / "pickle.pt", BOMB_BYTES)
    torch.save(recipes.Net().state_dict(), folder / "small.pt")
    recipes.bomb_in_storage(folder / "small.pt", folder / "storage.pt", BOMB_BYTES)
    torch.save({"weight": torch.zeros(BOMB_BYTES // 4)}, folder / "big.pt")
    recipes.repacked(
        folder / "big.pt", folder / "honest.pt", lambda name, data: data, deflated=True
    )
    (folder / "big.pt").unlink()
    made = {name: folder / f"{name}.pt" for name in ("pickle", "storage", "honest")}
    assert all(file.stat().st_size < BOMB_BYTES // 100 for file in made.values())
    return made


Command = Callable[..., SimpleNamespace]


@pytest.fixture(name="command")
def command_(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command of the `harness` program, in this process: exit code, what it printed, and what it
    complained of."""

    def execute(*arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code: str | int | None = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return execute


def newest(directory: Path) -> dict[str, Any]:
    """The newest checkpoint, verified and read."""
    store = LocalStore(directory)
    return load.load(store, there(read_catalog(store).head))


def manifest(directory: Path) -> Any:
    return read_catalog(LocalStore(directory)).head


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested structures differ; tensors by their bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        return [] if alike else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            line
            for key in {**a, **b}
            for line in (
                differing(a[key], b[key], f"{where}.{key}")
                if key in a and key in b
                else [f"{where}.{key}"]
            )
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            line
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differing(x, y, f"{where}[{i}]")
        ]
    return [] if a == b and not isinstance(a, torch.Tensor) else [where]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def row(text: str, *words: str) -> str | None:
    """The first line that has all of the words."""
    return next((line for line in text.splitlines() if all(word in line for word in words)), None)


def train_on(directory: Path, *settings: str, task: tuple[str, ...] = TASK) -> None:
    """Go on with a run, in this process."""
    train.main([*task, f"run.dir={directory}", *settings])
    dist.destroy_process_group() if dist.is_initialized() else None


def refused(
    answer: SimpleNamespace, directory: Path | None, codes: tuple[int, ...] = (1, 78)
) -> None:
    """In words, once, with the right code, and nothing is there that was not."""
    assert answer.code in codes, f"exit code {answer.code}\n{answer.out}{answer.err}"
    errors = [line for line in answer.err.splitlines() if line.startswith("harness: error: ")]
    assert len(errors) == 1 and len(errors[0]) < 400, answer.err
    assert "Traceback" not in answer.err + answer.out
    if directory is not None:
        assert not directory.exists(), f"{list(directory.rglob('*'))} was written"


def bounded(command: Command, *line: object, limit: int = MEMORY_LIMIT) -> SimpleNamespace:
    """A command, and that it took no more memory than what is in its file deserves."""
    recipes.forget_peak_memory()
    before = recipes.peak_memory_bytes()
    answer = command(*line)
    grown = recipes.peak_memory_bytes() - before
    assert grown < limit, f"{grown >> 20} MiB for a file of {os.path.getsize(str(line[1]))} bytes"
    return answer


def put(server: S3Server, place: str, file: Path) -> str:
    """A file in a bucket; its URL."""
    with file.open("rb") as body:
        server.client().put_object(Bucket=place, Key=f"zoo/{file.name}", Body=body)
    return f"s3://{place}/zoo/{file.name}"
