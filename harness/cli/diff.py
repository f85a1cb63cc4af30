"""Say which tensors and settings of two checkpoints differ, and by how much; exit 0 only if they are equal bit for bit.

Settings that cannot change the model (where the run lies, how often it saves) are shown, but do not count.

example: harness diff runs/a runs/b          (the newest of each)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from harness import config
from harness.checkpoint import load
from harness.checkpoint.format import Manifest
from harness.cli import locate
from harness.errors import EXIT_FAILED
from harness.events import Bar, say
from harness.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="checkpoint or run")
    parser.add_argument("b", metavar="B", help="checkpoint or run")


def run(given: argparse.Namespace) -> int:
    a, b = (_load(*locate.checkpoint(path)) for path in (given.a, given.b))
    settings = config.changes(a.pop("config"), b.pop("config"))
    for change in settings:
        say(f"setting  {change}" + ("  (does not count)" if change.is_free else ""))
    rows = list(differences(a, b))
    if rows:
        say(locate.table(("where", "A", "B", "greatest difference"), rows))
    counted = len(rows) + sum(not change.is_free for change in settings)
    say(f"{counted} difference(s)" if counted else "equal, bit for bit")
    return EXIT_FAILED if counted else 0


def _load(store: Store, manifest: Manifest) -> dict[str, Any]:
    bar = Bar(f"reading {manifest.name} from {store}", manifest.size_bytes)
    try:
        return load.load(store, manifest, bar)
    finally:
        bar.end()


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every leaf that differs between two nested structures: where, both sides, and by how much at most."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{where}.{key}" if where else str(key))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for at, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{where}[{at}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            yield where, _word(a), _word(b), "-"
        elif not torch.equal(_bits(a), _bits(b)):
            gap = (a.to(torch.float64) - b.to(torch.float64)).abs()
            yield where, _word(a), _word(b), f"{gap.max().item():.3g} ({int((gap != 0).sum())} of {gap.numel()})"
    elif type(a) is not type(b) or (a != b and not (a != a and b != b)):
        yield where, _word(a), _word(b), f"{abs(a - b):.3g}" if isinstance(a, float) and isinstance(b, float) else "-"


_ABSENT = "absent"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals itself and 0.0 does not equal -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _word(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{'x'.join(map(str, value.shape))}]"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
