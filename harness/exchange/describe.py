"""Describe the contents of a file for people to read, and determine where its training stands.

Scripts store different things under the same name ("epoch" may be the last epoch that was made, or
the next one). The counts in a file are therefore checked against each other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.checkpoint.format import Manifest
from harness.config import stored_form
from harness.errors import UsageError, printable
from harness.exchange import files, formats, rebuild, recognise
from harness.exchange.files import Loaded
from harness.exchange.recognise import MODULE, NUMBER, OPTIMIZER, SCALER, SCHEDULER, Part
from harness.text import number, size, table

MOST = 10**9  # limit on epochs and steps; a larger number is not a count
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
        for name, t in formats.tensors(value)
    ]
    return Description(
        loaded.file.where,
        facts,
        [(part.name, _place(part), _of_part(part, loaded)) for part in shown],
        stored_form.to_yaml(dict(stored))
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
        held = dict(formats.tensors(part.value))
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


@dataclass(frozen=True)
class Where:
    """The epoch to resume with, counted from 0, and the number of updates made so far."""

    epoch: int
    step: int


def position(
    parts: list[Part], per_epoch: int | None, epoch: int | None, step: int | None
) -> tuple[Where, str]:
    """Determine where a file's training stands.

    A stored "epoch" may be the last epoch that was made or the one to resume with. The optimizer's
    count of updates, or the scheduler's count of epochs, decides between them.

    Args:
        parts: The recognised parts of the file.
        per_epoch: Number of steps in an epoch; None if the data has no length.
        epoch: Epoch given by the caller; it overrides the file.
        step: Number of updates given by the caller; it overrides the file.

    Returns:
        The position, and a note ("" if there is none) on how the counts were interpreted.

    Raises:
        UsageError: The number of updates cannot be determined, a stored count is no whole number,
            or the position is out of range.
    """
    updates = _whole(parts, "step") if step is None else step
    if updates is None:
        updates = _updates(parts)
    is_given = epoch is not None
    if epoch is None and (written := _whole(parts, "epoch")) is not None:
        epoch, note = _meant(written, updates, per_epoch, _schedule(parts))
    else:
        note = ""
    if epoch is None:
        epoch = updates // per_epoch if updates is not None and per_epoch else 0
    if updates is None and per_epoch is None and epoch:
        raise UsageError(
            "the number of updates made so far cannot be told", remedy="Say it: --step (step=…)."
        )
    where = Where(epoch, epoch * (per_epoch or 0) if updates is None else updates)
    if not (0 <= where.epoch < MOST and 0 <= where.step < MOST):
        raise UsageError(
            "a run cannot resume from there",
            f"found: epoch {where.epoch}, step {where.step}",
            "Say: --epoch, --step.",
        )
    begun = "" if is_given or not per_epoch else _begun(where, per_epoch)
    return where, "; ".join(filter(None, (note, begun)))


def _begun(where: Where, per_epoch: int) -> str:
    """Return a note if the updates are not those of the whole epochs before `where`, or ""."""
    beyond = where.step - where.epoch * per_epoch
    if beyond == 0:
        return ""
    another = "its epochs had another number of steps (another batch size, another dataset)"
    if not 0 < beyond < per_epoch:
        return (
            f"step {where.step} is not after {where.epoch} epoch(s) of {per_epoch} steps: "
            f"{another}, or the epoch is another: --epoch {where.step // per_epoch}"
        )
    return (
        f"step {where.step} is {beyond} of {per_epoch} steps into epoch {where.epoch}: either the "
        f"file was saved in mid-epoch, and the run goes through epoch {where.epoch} from its "
        f"beginning, so that some samples are seen twice (to leave out the rest of it: --epoch "
        f"{where.epoch + 1}), or {another}"
    )


def _meant(
    written: int, updates: int | None, per_epoch: int | None, schedule: int | None
) -> tuple[int, str]:
    made = [
        count
        for count in (updates // per_epoch if updates is not None and per_epoch else None, schedule)
        if count is not None
    ]
    if written in made:
        return written, ""
    if written + 1 in made:
        return (
            written + 1,
            f"epoch {written} is the last one that was made, as the file's other counts tell: "
            f"goes on with {written + 1}",
        )
    return (
        written,
        f"epoch {written} is taken for the one to go on with; "
        f"if it is the last one that was made: --epoch {written + 1}",
    )


def _whole(parts: list[Part], name: str) -> int | None:
    alike = recognise.numbers_of(parts, name)
    if len({part.value for part in alike}) > 1:
        raise UsageError(
            f"which {name} a run is to resume with cannot be told",
            f"found: {', '.join(f'{part.key} {part.value}' for part in alike)}",
            f"Say it: --{name} ({name}=…).",
        )
    value = alike[0].value if alike else None
    if value is None or (value == value and 0 <= value < MOST and value == int(value)):
        return None if value is None else int(value)
    raise UsageError(
        f"a run cannot resume from {name} {value}",
        "found: in the file",
        f"Say it: --{name} ({name}=…).",
    )


def _updates(parts: list[Part]) -> int | None:
    """Return the greatest step count that optimizers such as Adam keep for each parameter."""
    counts = [
        int(kept["step"])
        for part in parts
        if part.kind == OPTIMIZER
        for kept in part.value["state"].values()
        if isinstance(kept, dict) and isinstance(kept.get("step"), int | float | torch.Tensor)
    ]
    return max(counts, default=None)


def _schedule(parts: list[Part]) -> int | None:
    return max(
        (int(part.value["last_epoch"]) for part in parts if part.kind == SCHEDULER), default=None
    )
