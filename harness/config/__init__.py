"""Every setting, with its unit and its default. The only door to omegaconf.

Defaults < YAML file < `key=value`. `load` reports every problem at once: name, value, what is allowed, the nearest known name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.errors import UsageError
from harness.store import check_url, is_url, redacted


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives."""

    dir: str | None = "runs/digits"  # null: no disk worth using, straight to run.remote
    remote: str | None = None  # s3://bucket/prefix, or another URL that fsspec opens
    timeout_s: float = 600.0  # the longest wait for another rank, and the longest step
    step_timeout_s: float | None = None  # the longest step; null: 300 s more than thirty times the longest so far, at most timeout_s
    grace_s: float | None = None  # from SIGTERM to the kill; null: as SLURM says
    margin_s: float = 30.0  # be gone so long before the job's time limit
    scratch: bool = False  # run.dir is lost with the job
    max_failures: int = 3  # in a row, without a new checkpoint between them, before a supervisor gives up
    notices: str | None = None  # ask a cloud whether it takes this machine away: aws, gcp, azure


@dataclass(frozen=True)
class TaskSettings:
    """What is trained: an import path, and the arguments of the callable that it names."""

    name: str = "harness.tasks.digits:build"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """How it is trained."""

    epochs: int = 30
    max_steps: int | None = None
    global_batch_size: int = 48  # samples in one optimizer step, over all ranks; divides among 1, 2, 3, 4, 6, 8, 12, 16, 24 of them
    micro_batch_size: int | None = None  # the most samples in one forward pass on one rank; the rest is accumulated
    seed: int = 1
    precision: str = "fp32"
    compile: bool = False
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    deterministic: bool = False
    nonfinite: str = "skip"  # skip the update; stop at the first; ignore (costs no read of the device)
    nonfinite_limit: int = 10  # updates skipped in a row before the run stops


@dataclass(frozen=True)
class DataSettings:
    """How samples are loaded."""

    num_workers: int = 0
    drop_last: bool = True


@dataclass(frozen=True)
class EvalSettings:
    """How often the model is evaluated; always also after the last step. Null: only then."""

    every_steps: int | None = 100
    batch_size: int = 256


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written, and which are kept. The two newest are always kept."""

    every_steps: int | None = None
    every_s: float | None = 60.0
    keep_last: int = 3
    keep_every_steps: int | None = None
    keep_best: int = 1
    best: str = "val_acc:max"


@dataclass(frozen=True)
class StoreSettings:
    """How the remote store is treated; what is null is as in `checkpoint`."""

    wait_s: float = 300.0  # for how long it may be unreachable: at the start, at the end, and for one request
    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_best: int | None = None


@dataclass(frozen=True)
class LogSettings:
    """How often loss and rate go into the run's events."""

    every_steps: int = 10


@dataclass(frozen=True)
class SlurmSettings:
    """What `harness submit` asks SLURM for; what is null is not mentioned, so that the site's defaults stand."""

    nodes: int = 1
    gpus_per_node: int | None = None
    procs_per_node: int | None = None  # training processes; null: one a GPU, else one a node
    cpus_per_node: int | None = None
    mem: str | None = None
    time: str | None = None  # hours:minutes:seconds, or days-hours
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    job_name: str | None = None  # null: made from run.dir; no two jobs of one name run at once
    extra: list[str] = field(default_factory=list)  # more options of sbatch, as in [--exclusive, --mail-type=END]
    setup: list[str] = field(default_factory=list)  # shell lines before anything else: module load …, export …
    container: str | None = None  # what harness and torchrun are run with: apptainer exec --nv image.sif
    python: str | None = None  # null: the one that runs `harness submit`; in a container: python


@dataclass(frozen=True)
class ResumeSettings:
    """What to insist on when a run goes on."""

    accept: list[str] = field(default_factory=list)
    override: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunSettings = field(default_factory=RunSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    log: LogSettings = field(default_factory=LogSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


# What may change between two attempts without changing the model that comes out.
FREE = (
    "run.", "data.num_workers", "checkpoint.", "store.", "log.", "resume.", "slurm.", "train.epochs", "train.max_steps", "eval.batch_size"
)  # fmt: skip


def _positive(value: Any) -> bool:
    return bool(value > 0)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "run.dir": (lambda v: v.strip() != "" and not is_url(v), "a local directory, or null"),
    "run.remote": (lambda v: check_url(v) is None, "a URL like s3://bucket/prefix; credentials come from the environment, not from it"),
    "run.timeout_s": (_positive, "a number of seconds above 0"),
    "run.step_timeout_s": (_positive, "a number of seconds above 0, or null"),
    "run.grace_s": (_positive, "a number of seconds above 0, or null"),
    "run.margin_s": (lambda v: v >= 0, "a number of seconds from 0 on"),
    "run.max_failures": (_positive, "a whole number above 0"),
    "run.notices": (lambda v: v in ("aws", "gcp", "azure"), "aws, gcp or azure, or null"),
    "slurm.nodes": (_positive, "a whole number above 0"),
    "slurm.gpus_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.procs_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.cpus_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.time": (
        lambda v: bool(re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}", v)),
        "'hours:minutes:seconds', in quotes, or YAML makes a number of it",
    ),
    "slurm.job_name": (lambda v: bool(re.fullmatch(r"[\w.+-]+", v)), "letters, digits, and . + - _"),
    "slurm.extra": (lambda v: all(o.startswith("-") and "\n" not in o for o in v), "options of sbatch, such as [--exclusive]"),
    "task.name": (lambda v: v.count(":") == 1 and all(v.split(":")), "package.module:callable"),
    "train.epochs": (_positive, "a whole number above 0"),
    "train.max_steps": (_positive, "a whole number above 0, or null"),
    "train.global_batch_size": (_positive, "a whole number above 0"),
    "train.micro_batch_size": (_positive, "a whole number above 0, or null"),
    "train.seed": (lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1"),
    "train.precision": (lambda v: v in ("fp32", "bf16", "fp16"), "fp32, bf16 or fp16"),
    "train.clip_norm": (_positive, "a number above 0, or null"),
    "train.ema_decay": (lambda v: 0 < v < 1, "a number between 0 and 1, or null"),
    "train.nonfinite": (lambda v: v in ("skip", "stop", "ignore"), "skip, stop or ignore"),
    "train.nonfinite_limit": (_positive, "a whole number above 0"),
    "data.num_workers": (lambda v: v >= 0, "a whole number from 0 on"),
    "eval.every_steps": (_positive, "a whole number above 0, or null"),
    "eval.batch_size": (_positive, "a whole number above 0"),
    "checkpoint.every_steps": (_positive, "a whole number above 0, or null"),
    "checkpoint.every_s": (_positive, "a number of seconds above 0, or null"),
    "checkpoint.keep_last": (_positive, "a whole number above 0"),
    "checkpoint.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "checkpoint.keep_best": (lambda v: v >= 0, "a whole number from 0 on"),
    "checkpoint.best": (lambda v: v.rpartition(":")[0] != "" and v.rpartition(":")[2] in ("max", "min"), "NAME:max or NAME:min"),
    "store.wait_s": (lambda v: v >= 0, "a number of seconds from 0 on"),
    "store.keep_last": (_positive, "a whole number above 0, or null"),
    "store.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "store.keep_best": (lambda v: v >= 0, "a whole number from 0 on, or null"),
    "log.every_steps": (_positive, "a whole number above 0"),
    "resume.accept": (lambda v: set(v) <= {"config", "data", "remote"}, "a list of: config, data, remote"),
}


def load(file: str | None, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Merge the defaults, a YAML file and `key=value` settings.

    Returns the settings, and the same as plain dicts for files: there `${oc.env:NAME}` stays as it was written, so that
    nothing secret is kept. Raises UsageError with one line for each thing that is wrong.
    """
    problems: list[str] = []
    settings = _file_settings(file, problems) + _line_settings(overrides, problems)
    known = flatten(OmegaConf.to_container(OmegaConf.structured(Config)))  # type: ignore[arg-type]
    merged: DictConfig = OmegaConf.structured(Config)
    for name, value, origin in settings:
        if value is None and any(other.startswith(f"{name}.") for other in known):
            continue  # a section with nothing in it
        if name not in known and not name.startswith("task.args."):
            problems.append(f"{name}: unknown setting ({origin}){_nearest(name, list(known))}")
            continue
        try:
            trial = OmegaConf.merge(merged, OmegaConf.create(_nested(name, value)))
            OmegaConf.to_container(trial, resolve=True)
            merged = trial  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            why = "what it stands for is missing or of the wrong type" if "${" in str(value) else str(error).splitlines()[0]
            problems.append(f"{name}={value!r} ({origin}): {why}")  # as it was written: what it stands for may be secret
    problems += _broken_rules(merged)
    if merged.run.dir is None and merged.run.remote is None:
        problems.append("run.dir=None: a run needs a place; give run.dir, run.remote, or both")
    if problems:
        raise UsageError(
            f"the configuration has {len(problems)} problem(s):", "\n".join(f"  {line}" for line in problems), "Nothing was started."
        )
    return OmegaConf.to_object(merged), OmegaConf.to_container(merged, resolve=False)  # type: ignore[return-value]


def _file_settings(file: str | None, problems: list[str]) -> list[tuple[str, Any, str]]:
    if file is None:
        return []
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except FileNotFoundError:
        problems.append(f"--config {file}: no such file (relative to {Path.cwd()})")
        return []
    except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        problems.append(f"--config {file}: cannot be read as YAML: {' '.join(str(error).split())}")
        return []
    if not isinstance(content, dict):
        problems.append(f"--config {file}: expected names and values, found a {type(content).__name__}")
        return []
    return [(name, value, str(file)) for name, value in flatten(content).items()]


def _line_settings(overrides: list[str], problems: list[str]) -> list[tuple[str, Any, str]]:
    found = []
    for text in overrides:
        name, equals, _ = text.partition("=")
        if not equals or not name:
            problems.append(f"{text!r}: expected key=value")
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problems.append(f"{text!r}: cannot be read: {' '.join(str(error).split())}")
            continue
        found += [(key, value, "command line") for key, value in flatten(parsed).items()]  # type: ignore[arg-type]
    return found


def _broken_rules(merged: DictConfig) -> list[str]:
    values, written = (flatten(OmegaConf.to_container(merged, resolve=resolve)) for resolve in (True, False))  # type: ignore[arg-type]
    return [
        f"{name}={redacted(repr(written[name]))}: allowed is {allowed}"
        for name, (holds, allowed) in RULES.items()
        if values.get(name) is not None and not holds(values[name])
    ]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    by_leaf = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    guess = by_leaf[:1] or close
    return f". Did you mean {guess[0]}?" if guess else ""


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}; lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def from_yaml(text: bytes) -> dict[str, Any]:
    """Settings from YAML text; {} if it is none."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def to_yaml(settings: dict[str, Any]) -> str:
    """The settings as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def digest(settings: dict[str, Any]) -> str:
    """A short name for a set of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """One setting that differs between two attempts."""

    name: str
    old: Any
    new: Any

    @property
    def is_free(self) -> bool:
        return self.name.startswith(FREE)

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Every setting that differs, by name."""
    was, now = flatten(old), flatten(new)
    names = sorted((was.keys() | now.keys()) - {"task.args"})
    return [Change(name, was.get(name), now.get(name)) for name in names if was.get(name) != now.get(name)]


def check_changes(old: dict[str, Any], new: dict[str, Any], accept: Sequence[str], override: Sequence[str]) -> list[Change]:
    """What differs and is all right. Raises UsageError naming every change that would alter the trajectory and is not insisted on."""
    found = [change for change in changes(old, new) if not change.name.startswith("resume.")]
    refused = [] if "config" in accept else [change for change in found if not change.is_free and change.name not in override]
    if refused:
        raise UsageError(
            "the configuration is not the one that this run was trained with so far:",
            "\n".join(f"  {change}" for change in refused),
            "Put the old values back, or take another run.dir. To insist: resume.accept=[config]; to apply a changed optimizer setting "
            f"to the restored optimizer: resume.override=[{','.join(change.name for change in refused)}].",
        )
    return found
