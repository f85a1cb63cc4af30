"""Show what is in a checkpoint: progress, settings, and the table of tensors, whose data is not read.

example: harness show runs/a/checkpoints/step_00000120-0003.pt
example: harness show runs/a          (its newest)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from harness import config
from harness.checkpoint import load
from harness.cli import locate
from harness.errors import DamagedError
from harness.events import say, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT")


def run(given: argparse.Namespace) -> int:
    store, manifest = locate.checkpoint(given.checkpoint)
    key = manifest.data_key
    path = store.where(key)
    try:
        payload = load.outline(store, key)
    except (OSError, *load.UNPARSEABLE) as error:
        raise DamagedError(f"{path} cannot be read", f"found: {load.first_line(error)}", "harness verify says what is damaged.") from None
    say(f"{path}\n")
    facts = [("step", str(manifest.step)), ("epoch", str(manifest.epoch)), ("loss", locate.number(manifest.loss))]
    facts += [(name, locate.number(value)) for name, value in manifest.metrics.items()]
    facts += [("data position", f"epoch {payload['data']['epoch']}, sample {payload['data']['sample']}")]
    facts += [("ranks", str(manifest.world_size)), ("attempt", str(manifest.attempt)), ("run", manifest.run_id)]
    facts += [("lineage", ", ".join(f"attempt {attempt} to step {step}" for attempt, step in manifest.lineage))]
    facts += [("final", "yes" if manifest.final else "no"), ("written", f"{manifest.time} on {manifest.host}")]
    facts += [("size", size(manifest.size_bytes)), ("digest", manifest.data.digest)]
    facts += [(f"class of {name}", kind) for name, kind in manifest.classes.items()]
    say(locate.table(("fact", ""), facts))
    say("\nsettings:\n" + config.to_yaml(payload["config"]))
    rows = [
        (name, str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)) or "scalar") for name, tensor in tensors(payload)
    ]
    say(locate.table(("tensor", "dtype", "shape"), rows))
    return 0


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a checkpoint, with the path that leads to it."""
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from tensors(item, f"{where}[{at}]")
