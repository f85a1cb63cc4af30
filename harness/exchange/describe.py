"""What is in a file, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import config
from harness.checkpoint.format import Manifest
from harness.errors import UsageError, printable
from harness.exchange import files, rebuild, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, OPTIMIZER, SCALER, SCHEDULER
from harness.text import number, size, table

Rows = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Description:
    """What is in a file: facts, the recognised parts, the settings as YAML, and a row for each tensor (name, dtype, shape, size)."""

    where: str
    facts: Rows
    parts: Rows
    settings: str
    tensors: Rows

    def __str__(self) -> str:
        sections = [self.where, table(("fact", ""), self.facts)]
        sections += [table(("part", "in the file", "what"), self.parts)] if self.parts else []
        sections += [f"settings:\n{self.settings}"] if self.settings else []
        sections += [table(("tensor", "dtype", "shape", "size"), self.tensors)] if self.tensors else ["no tensors"]
        return printable("\n\n".join(sections))


def describe(path: str | Path, which: str | int = "newest") -> Description:
    """What is in a run's checkpoint, or in any file that torch.save, safetensors, TorchScript or torch.export wrote, on a disk or in a
    bucket. Nothing in it is executed, and the tensors' data is not read, where the format allows that. Raises UsageError, DamagedError,
    StorageError."""
    loaded = files.outline_any(path, which)
    manifest, value = loaded.manifest, loaded.value
    try:
        parts = recognise.recognise(loaded)
    except UsageError:
        parts = []  # then the tensors speak for themselves
    stored = value.get("config") if isinstance(value, Mapping) else None
    of_file = [("format", loaded.file.kind), ("size", size(loaded.file.size_bytes))]
    facts = _of_run(manifest, value["data"]) if manifest else of_file
    facts += [(name, fact[:200]) for name, fact in loaded.metadata.items()]
    shown = [part for part in parts if part.kind in (MODULE, OPTIMIZER, SCHEDULER, SCALER) or not manifest]
    rows = [
        (name, str(t.dtype).removeprefix("torch."), "x".join(map(str, t.shape)) or "scalar", size(t.numel() * t.element_size()))
        for name, t in files.tensors(value)
    ]
    return Description(
        loaded.file.where,
        facts,
        [(part.name, part.key or "(the whole file)", _summary(part, loaded)) for part in shown],
        config.to_yaml(dict(stored)) if isinstance(stored, Mapping) and (manifest or rebuild.names_task(stored)) else "",
        rows,
    )


def _summary(part: recognise.Part, loaded: Loaded) -> str:
    kind = loaded.manifest.classes.get(part.name) if loaded.manifest else None
    words = recognise.summary(part)
    return f"{kind}: {words.removeprefix(part.note).lstrip('; ')}" if kind else words


def _of_run(manifest: Manifest, data: Mapping[str, object]) -> list[tuple[str, str]]:
    facts = [("step", str(manifest.step)), ("epoch", str(manifest.epoch)), ("loss", number(manifest.loss))]
    facts += [(name, number(value)) for name, value in manifest.metrics.items()]
    facts += [("data position", f"epoch {data['epoch']}, sample {data['sample']}")]
    facts += [("ranks", str(manifest.world_size)), ("attempt", str(manifest.attempt)), ("run", manifest.run_id)]
    facts += [("lineage", ", ".join(f"attempt {attempt} to step {step}" for attempt, step in manifest.lineage))]
    facts += [("final", "yes" if manifest.final else "no"), ("written", f"{manifest.time} on {manifest.host}")]
    facts += [("size", size(manifest.size_bytes)), ("digest", manifest.data.digest)]
    return facts + [(f"class of {name}", kind) for name, kind in manifest.classes.items()]
