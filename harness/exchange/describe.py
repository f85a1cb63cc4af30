"""Describe the contents of a file for people to read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import config
from harness.checkpoint.format import Manifest
from harness.errors import UsageError, printable
from harness.exchange import files, rebuild, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, NUMBER, OPTIMIZER, SCALER, SCHEDULER, Part
from harness.text import number, size, table

Rows = Sequence[tuple[str, ...]]

# The buffers of BatchNorm. In a state dict, other buffers cannot be told from parameters.
BUFFER = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)\Z")


@dataclass(frozen=True)
class Description:
    """The contents of a file, as text for people.

    It holds facts, the recognised parts, the settings as YAML, and a row for each tensor (name,
    dtype, shape, size).
    """

    where: str
    facts: Rows
    parts: Rows
    settings: str
    tensors: Rows

    def __str__(self) -> str:
        sections = [self.where, table(("fact", ""), self.facts)]
        sections += [table(("part", "in the file", "what"), self.parts)] if self.parts else []
        sections += [f"settings:\n{self.settings}"] if self.settings else []
        sections += (
            [table(("tensor", "dtype", "shape", "size"), self.tensors)]
            if self.tensors
            else ["no tensors"]
        )
        return printable("\n\n".join(sections))


def describe(path: str | Path, which: str | int = "newest") -> Description:
    """Describe a run's checkpoint or any other model file, on a disk or in a bucket.

    The file may have been written by torch.save, safetensors, TorchScript or torch.export. Nothing
    in it is executed. The tensors' data is not read where the format allows that.

    Args:
        path: Path or URL of a run, a checkpoint or a file.
        which: Checkpoint of a run: "newest", "best" or a step.

    Raises:
        UsageError: The path leads to no file, or to a file that holds no model.
        DamagedError: The file is damaged or cut short.
        StorageError: The store cannot be read.
    """
    loaded = files.outline_any(path, which)
    manifest, value = loaded.manifest, loaded.value
    try:
        parts = recognise.recognise(loaded)
    except UsageError:
        parts = []  # the table of tensors still describes the file
    stored = value.get("config") if isinstance(value, Mapping) else None
    of_file = [("format", loaded.file.kind), ("size", size(loaded.file.size_bytes))]
    facts = _of_run(manifest, value["data"]) if manifest else of_file
    facts += [(name, fact[:200]) for name, fact in loaded.metadata.items()]
    shown = [
        part
        for part in parts
        if part.kind in (MODULE, OPTIMIZER, SCHEDULER, SCALER) or not manifest
    ]
    rows = [
        (
            name,
            str(t.dtype).removeprefix("torch."),
            "x".join(map(str, t.shape)) or "scalar",
            size(t.numel() * t.element_size()),
        )
        for name, t in files.tensors(value)
    ]
    return Description(
        loaded.file.where,
        facts,
        [(part.name, _place(part), _of_part(part, loaded)) for part in shown],
        config.to_yaml(dict(stored))
        if isinstance(stored, Mapping) and (manifest or rebuild.names_task(stored))
        else "",
        rows,
    )


def assignment_table(
    parts: Sequence[Part], taken: Mapping[str, Part], numbers: Collection[str]
) -> str:
    """Return a table of a file's parts and of what they become in an import.

    Args:
        parts: The recognised parts of the file.
        taken: The part that each object of the task has taken, by the object's name.
        numbers: Names of the numbers that are taken from the file.
    """
    goes = {id(part): name for name, part in taken.items()}
    rows = [
        (
            part.name,
            _place(part),
            summary(part),
            goes.get(id(part), part.name if part.name in numbers else "-"),
        )
        for part in parts
    ]
    return table(("part", "in the file", "what", "becomes"), rows)


def _place(part: Part) -> str:
    return part.key or "(the whole file)"


def summary(part: Part) -> str:
    """Describe a part in a few words."""
    if part.kind == NUMBER:
        return f"{part.value:.6g}" if isinstance(part.value, float) else str(part.value)
    if part.kind == MODULE:
        held = dict(files.tensors(part.value))
        learned = sum(
            t.numel()
            for name, t in held.items()
            if not BUFFER.search(name) and (t.is_floating_point() or t.is_complex())
        )
        total = size(sum(t.numel() * t.element_size() for t in held.values()))
        return ", ".join(
            filter(None, (f"{len(held)} tensors, {learned:,} parameters, {total}", part.note))
        )
    if part.kind == OPTIMIZER:
        groups = part.value["param_groups"]
        rates = ", ".join(
            f"{group['lr']:.4g}" for group in groups if isinstance(group.get("lr"), float)
        )
        return (
            f"{part.note}; {sum(len(group['params']) for group in groups)} parameters, "
            f"learning rate {rates or 'unknown'}"
        )
    if part.kind == SCHEDULER:
        return f"after {part.value['last_epoch']} steps"
    return part.note or part.kind


def _of_part(part: Part, loaded: Loaded) -> str:
    kind = loaded.manifest.classes.get(part.name) if loaded.manifest else None
    text = summary(part)
    return f"{kind}: {text.removeprefix(part.note).lstrip('; ')}" if kind else text


def _of_run(manifest: Manifest, data: Mapping[str, object]) -> list[tuple[str, str]]:
    facts = [
        ("step", str(manifest.step)),
        ("epoch", str(manifest.epoch)),
        ("loss", number(manifest.loss)),
    ]
    facts += [(name, number(value)) for name, value in manifest.metrics.items()]
    facts += [("data position", f"epoch {data['epoch']}, sample {data['sample']}")]
    facts += [
        ("ranks", str(manifest.world_size)),
        ("attempt", str(manifest.attempt)),
        ("run", manifest.run_id),
    ]
    facts += [
        (
            "lineage",
            ", ".join(f"attempt {attempt} to step {step}" for attempt, step in manifest.lineage),
        )
    ]
    facts += [
        ("final", "yes" if manifest.final else "no"),
        ("written", f"{manifest.time} on {manifest.host}"),
    ]
    facts += [("size", size(manifest.size_bytes)), ("digest", manifest.data.digest)]
    return facts + [(f"class of {name}", kind) for name, kind in manifest.classes.items()]
