"""What differs between two files, tensor for tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import config
from harness.config import Change
from harness.errors import printable
from harness.exchange import content, files, rebuild
from harness.exchange.files import Loaded
from harness.exchange.words import table

_ABSENT = "absent"


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every leaf that differs between two nested structures: where, both sides, and by how much at most."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{where}.{key}" if where else str(key))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for at, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{where}[{at}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout or a.is_meta != b.is_meta:
            yield where, _word(a), _word(b), "-"
        elif not a.is_meta and not torch.equal(_bits(a), _bits(b)):
            gap = (_dense(a).to(torch.float64) - _dense(b).to(torch.float64)).abs()
            yield where, _word(a), _word(b), f"{gap.max().item():.3g} ({int((gap != 0).sum())} of {gap.numel()})"
    elif type(a) is not type(b) or (a != b and not (a != a and b != b)):
        yield where, _word(a), _word(b), f"{abs(a - b):.3g}" if isinstance(a, float) and isinstance(b, float) else "-"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that NaN equals itself and 0.0 does not equal -0.0."""
    plain = tensor.int_repr() if tensor.is_quantized else _dense(tensor)
    return plain.detach().contiguous().reshape(-1).view(torch.uint8)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _word(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{'x'.join(map(str, value.shape))}]"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


@dataclass(frozen=True)
class Comparison:
    """What differs: settings, and rows (where, A, B, greatest difference)."""

    settings: list[Change]
    rows: list[tuple[str, str, str, str]]

    @property
    def count(self) -> int:
        """How many differences count: a setting that cannot change the model does not."""
        return len(self.rows) + sum(not change.is_free for change in self.settings)

    def __str__(self) -> str:
        lines = [f"setting  {change}" + ("  (does not count)" if change.is_free else "") for change in self.settings]
        lines += [table(("where", "A", "B", "greatest difference"), self.rows)] if self.rows else []
        return printable("\n".join([*lines, f"{self.count} difference(s)" if self.count else "equal, bit for bit"]))


def compare(a: str | Path, b: str | Path, *, weights_only: bool = False) -> Comparison:
    """What differs between two runs, checkpoints or files of any kind; its `count` is 0 if they are equal bit for bit.

    Of two checkpoints of this harness everything is compared; of others what was recognised, by what it is called here. With
    `weights_only` only the modules count. Raises UsageError, DamagedError, StorageError.
    """
    both = [files.read_any(path) for path in (a, b)]
    if all(loaded.manifest for loaded in both) and not weights_only:
        settings = config.changes(both[0].value.pop("config"), both[1].value.pop("config"))
        return Comparison(settings, list(differences(both[0].value, both[1].value)))
    one, other = (_named(loaded, weights_only) for loaded in both)
    return Comparison([], list(differences(one, other)))


def _named(loaded: Loaded, weights_only: bool) -> dict[str, Any]:
    parts = list(rebuild.states(loaded).values()) if weights_only else content.recognise(loaded)
    if loaded.manifest:  # what only a run has is not missing in other people's files
        parts = [part for part in parts if part.kind not in (content.OTHER, content.NUMBER) or part.name in ("epoch", "step", "loss")]
    modules = [part.name for part in parts if part.kind == content.MODULE]
    lone = modules[0] if len(modules) == 1 else None
    return {"model" if part.name == lone else part.name: part.value for part in parts}
