"""Define every setting of a run, with its unit, its default and its allowed values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.store import check_url, is_url


@dataclass(frozen=True)
class RunSettings:
    """The stores of a run, its time limits and its supervision."""

    dir: str | None = "runs/digits"  # null: checkpoints go directly to run.remote
    remote: str | None = None  # s3://bucket/prefix, or another URL that fsspec opens
    # Limit of the wait for another rank, and of a step.
    timeout_s: float = 600.0
    # Limit of a step; null: 300 s more than thirty times the longest step so far, at most
    # timeout_s.
    step_timeout_s: float | None = None
    grace_s: float | None = None  # from SIGTERM to SIGKILL; null: SLURM's value
    margin_s: float = 30.0  # the run ends this long before the job's time limit
    scratch: bool = False  # run.dir is lost with the job
    # Failures in a row, without a new checkpoint between them, after which a supervisor gives up.
    max_failures: int = 3
    # Cloud whose metadata service is polled for a preemption notice: aws, gcp or azure.
    notices: str | None = None
    # For `launch` and `submit`: the user's program in place of train.py, and its arguments.
    loop: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskSettings:
    """The task to train: the import path of a callable, and its arguments."""

    name: str = "harness.tasks.digits:build"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """The training loop: duration, batch sizes, precision and updates."""

    epochs: int = 30
    max_steps: int | None = None
    # Samples of one optimizer step over all ranks. 48 is divisible by 1, 2, 3, 4, 6, 8, 12, 16 and
    # 24 ranks.
    global_batch_size: int = 48
    # The most samples in one forward pass on one rank; gradients are accumulated over the passes.
    micro_batch_size: int | None = None
    seed: int = 1
    precision: str = "fp32"
    compile: bool = False
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    deterministic: bool = False
    # On non-finite values: skip the update; stop the run at the first; ignore them, which saves a
    # read from the device.
    nonfinite: str = "skip"
    nonfinite_limit: int = 10  # skipped updates in a row before the run stops


@dataclass(frozen=True)
class DataSettings:
    """The data loading."""

    num_workers: int = 0
    drop_last: bool = True
    # Test before training whether the state of an iterable dataset restores its next samples.
    check_stream: bool = True


@dataclass(frozen=True)
class EvalSettings:
    """The evaluation of the model.

    The model is always evaluated after the last step; if `every_steps` is null, only then.
    """

    every_steps: int | None = 100
    batch_size: int = 256


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which are kept; the two newest are always kept."""

    every_steps: int | None = None
    # Seconds; auto: the interval that is best for the cost of saves and interruptions in this run;
    # null: no saves by the clock.
    every_s: Any = 60.0
    keep_last: int = 3
    keep_every_steps: int | None = None
    keep_best: int = 1
    best: str = "val_acc:max"
    # overlapped: copy during the next forward and backward passes; at_once: training waits for the
    # copy; checked: training waits, and the copy is compared with the state before the next update,
    # to find bugs.
    snapshot: str = "overlapped"
    # wait: for the previous save; skip: leave out a save that is due by the clock, and count it.
    when_busy: str = "wait"
    # Also keep the newest step in the machine's memory, so that a process that dies loses nothing.
    memory: bool = False
    memory_every_steps: int = 1
    # Read the first checkpoint of a new run back, and test whether all of it can be loaded.
    rehearse: bool = True


@dataclass(frozen=True)
class StoreSettings:
    """Settings of the remote store; null takes the value of `checkpoint`."""

    # How long the store may be unreachable: at the start, at the end, and for one request.
    wait_s: float = 300.0
    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_best: int | None = None


@dataclass(frozen=True)
class LogSettings:
    """How often loss and throughput are recorded as events, and which loggers receive them too."""

    every_steps: int = 10
    # tensorboard (in run.dir/tensorboard), wandb (WANDB_PROJECT … set the project)
    to: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NotifySettings:
    """Notifications that the supervisor of a run sends when its state changes."""

    # Receives JSON on its standard input, and the variables HARNESS_EVENT and HARNESS_TEXT.
    command: list[str] = field(default_factory=list)
    # Name of the environment variable with the URL to POST the JSON to; the URL itself is a secret.
    webhook_env: str | None = None
    # Also possible is "crashed": the run failed and is restarted.
    on: list[str] = field(default_factory=lambda: ["resumed", "stopped", "failed", "finished"])
    timeout_s: float = 10.0


@dataclass(frozen=True)
class SlurmSettings:
    """The SLURM options of `harness submit`.

    An option that is null is not passed, so that the site's default applies.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    # Training processes; null: one per GPU, else one per node.
    procs_per_node: int | None = None
    cpus_per_node: int | None = None
    mem: str | None = None
    time: str | None = None  # hours:minutes:seconds, or days-hours
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Null: derived from run.dir. Two jobs with the same name never run at the same time.
    job_name: str | None = None
    # Further options of sbatch, such as [--exclusive, --mail-type=END].
    extra: list[str] = field(default_factory=list)
    # Shell lines that run before everything else: module load …, export …
    setup: list[str] = field(default_factory=list)
    # Command prefix that runs harness and torchrun, such as: apptainer exec --nv image.sif
    container: str | None = None
    # Null: the interpreter that runs `harness submit`; in a container: python.
    python: str | None = None


@dataclass(frozen=True)
class InitSettings:
    """The initial weights of a new run; a run that has a checkpoint resumes from it instead."""

    # Written `init.from`: a run, one of its checkpoints, or a file that another program wrote.
    from_: str | None = None
    # True: every tensor must exist and fit; false: load only the tensors that fit.
    strict: bool = True
    # Regular expressions for names in the file, with their replacements.
    rename: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResumeSettings:
    """What to accept, and what to check, when a run resumes."""

    accept: list[str] = field(default_factory=list)
    override: list[str] = field(default_factory=list)
    # If a recomputed step differs from its record: warn, or stop the run before the next save.
    on_mismatch: str = "warn"
    # If hardware or software differ from those of the checkpoint: warn, or refuse to start.
    environment: str = "warn"


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
    init: InitSettings = field(default_factory=InitSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    notify: NotifySettings = field(default_factory=NotifySettings)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)


# Settings that may change between two attempts without changing the trained model.
FREE = (
    "run.",
    "data.num_workers",
    "data.check_stream",
    "checkpoint.",
    "store.",
    "log.",
    "resume.",
    "slurm.",
    "notify.",
    "train.epochs",
    "train.max_steps",
    "eval.batch_size",
    "init.",  # read once, before the first checkpoint
)
# Dicts that `flatten` does not split, since their keys contain dots.
WHOLE = ("init.rename",)
# Setting names that are keywords of Python, with the attribute names that are used instead.
SPELLED = {"init.from": "init.from_"}


def _positive(value: Any) -> bool:
    return bool(value > 0)


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


NOTICES = ("resumed", "stopped", "crashed", "failed", "finished")
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "run.dir": (lambda v: v.strip() != "" and not is_url(v), "a local directory, or null"),
    "run.remote": (
        lambda v: check_url(v) is None,
        "a URL like s3://bucket/prefix; credentials come from the environment, not from it",
    ),
    "run.timeout_s": (_positive, "a number of seconds above 0"),
    "run.step_timeout_s": (_positive, "a number of seconds above 0, or null"),
    "run.grace_s": (_positive, "a number of seconds above 0, or null"),
    "run.margin_s": (lambda v: v >= 0, "a number of seconds from 0 on"),
    "run.max_failures": (_positive, "a whole number above 0"),
    "run.loop": (lambda v: not v or v[0].endswith(".py"), "a list: a .py file, and its arguments"),
    "run.notices": (lambda v: v in ("aws", "gcp", "azure"), "aws, gcp or azure, or null"),
    "slurm.nodes": (_positive, "a whole number above 0"),
    "slurm.gpus_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.procs_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.cpus_per_node": (_positive, "a whole number above 0, or null"),
    "slurm.time": (
        lambda v: bool(re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){1,2}", v)),
        "'hours:minutes:seconds', in quotes, or YAML makes a number of it",
    ),
    "slurm.job_name": (
        lambda v: bool(re.fullmatch(r"[\w.+-]+", v)),
        "letters, digits, and . + - _",
    ),
    "slurm.extra": (
        lambda v: all(o.startswith("-") and "\n" not in o for o in v),
        "options of sbatch, such as [--exclusive]",
    ),
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
    "checkpoint.every_s": (
        lambda v: v == "auto" or (type(v) in (int, float) and v > 0),
        "a number of seconds above 0, auto, or null",
    ),
    "checkpoint.keep_last": (_positive, "a whole number above 0"),
    "checkpoint.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "checkpoint.keep_best": (lambda v: v >= 0, "a whole number from 0 on"),
    "checkpoint.best": (
        lambda v: v.rpartition(":")[0] != "" and v.rpartition(":")[2] in ("max", "min"),
        "NAME:max or NAME:min",
    ),
    "checkpoint.snapshot": (
        lambda v: v in ("overlapped", "checked", "at_once"),
        "overlapped, checked or at_once",
    ),
    "checkpoint.when_busy": (lambda v: v in ("wait", "skip"), "wait or skip"),
    "checkpoint.memory_every_steps": (_positive, "a whole number above 0"),
    "store.wait_s": (lambda v: v >= 0, "a number of seconds from 0 on"),
    "store.keep_last": (_positive, "a whole number above 0, or null"),
    "store.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "store.keep_best": (lambda v: v >= 0, "a whole number from 0 on, or null"),
    "log.to": (lambda v: set(v) <= {"tensorboard", "wandb"}, "a list of: tensorboard, wandb"),
    "log.every_steps": (_positive, "a whole number above 0"),
    "notify.webhook_env": (
        lambda v: bool(re.fullmatch(r"[A-Za-z_]\w*", v)),
        "the name of an environment variable, or null",
    ),
    "notify.on": (lambda v: set(v) <= set(NOTICES), f"a list of: {', '.join(NOTICES)}"),
    "notify.timeout_s": (_positive, "a number of seconds above 0"),
    "init.from": (
        lambda v: v.strip() != "" and (not is_url(v) or check_url(v) is None),
        "a path or a URL without credentials, or null",
    ),
    "init.rename": (
        lambda v: all(map(_is_pattern, v)),
        "{'expression': 'replacement'}, with regular expressions that Python's re takes",
    ),
    "resume.on_mismatch": (lambda v: v in ("warn", "stop"), "warn or stop"),
    "resume.environment": (lambda v: v in ("warn", "refuse"), "warn or refuse"),
    "resume.accept": (
        lambda v: set(v) <= {"config", "data", "dtype", "remote"},
        "a list of: config, data, dtype, remote",
    ),
}
