"""Every setting of a run, with its unit, its default, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.store import check_url, is_url


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
    loop: list[str] = field(default_factory=list)  # launch and submit: a program of one's own in place of train.py, and its arguments


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
    check_stream: bool = True  # try before training whether an iterable dataset's state brings back what it would have read next


@dataclass(frozen=True)
class EvalSettings:
    """How often the model is evaluated; always also after the last step. Null: only then."""

    every_steps: int | None = 100
    batch_size: int = 256


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written, and which are kept. The two newest are always kept."""

    every_steps: int | None = None
    every_s: Any = 60.0  # auto: as often as is worth it, by what saves and interruptions cost this run; null: not by the clock
    keep_last: int = 3
    keep_every_steps: int | None = None
    keep_best: int = 1
    best: str = "val_acc:max"
    snapshot: str = "overlapped"  # copied during the next forward and backward; at_once: training waits; checked: compared, to find bugs
    when_busy: str = "wait"  # for the save before; skip: a save that the clock asks for is left out, and counted
    memory: bool = False  # keep the newest step in the machine's memory, too: a process that dies loses nothing
    memory_every_steps: int = 1
    rehearse: bool = True  # read the first checkpoint of a new run back, and try whether all of it loads again


@dataclass(frozen=True)
class StoreSettings:
    """How the remote store is treated; what is null is as in `checkpoint`."""

    wait_s: float = 300.0  # for how long it may be unreachable: at the start, at the end, and for one request
    keep_last: int | None = None
    keep_every_steps: int | None = None
    keep_best: int | None = None


@dataclass(frozen=True)
class LogSettings:
    """How often loss and rate go into the run's events, and who else is told."""

    every_steps: int = 10
    to: list[str] = field(default_factory=list)  # tensorboard (in run.dir/tensorboard), wandb (WANDB_PROJECT … say which project)


@dataclass(frozen=True)
class NotifySettings:
    """Who is told, by whoever supervises the run, when something happens to it."""

    command: list[str] = field(default_factory=list)  # gets JSON on its standard input, and HARNESS_EVENT, HARNESS_TEXT
    webhook_env: str | None = None  # the environment variable that holds a URL to POST the JSON to; the URL itself is a secret
    on: list[str] = field(default_factory=lambda: ["resumed", "stopped", "failed", "finished"])  # and crashed: it is started again
    timeout_s: float = 10.0


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
class InitSettings:
    """What the weights of a new run begin with; a run that has a checkpoint goes on from that."""

    from_: str | None = None  # written `init.from`: a run, one of its checkpoints, or a file that somebody else's script wrote
    strict: bool = True  # every tensor must be there and fit; false: what fits is taken
    rename: dict[str, str] = field(default_factory=dict)  # regular expressions for names in the file, and what to put in their place


@dataclass(frozen=True)
class ResumeSettings:
    """What to insist on when a run goes on."""

    accept: list[str] = field(default_factory=list)
    override: list[str] = field(default_factory=list)
    on_mismatch: str = "warn"  # a step that is made again is not what it was; stop: end before the next save
    environment: str = "warn"  # where machine or software are not those that the checkpoint was made on; refuse: do not start


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


# What may change between two attempts without changing the model that comes out.
FREE = (
    "run.", "data.num_workers", "data.check_stream", "checkpoint.", "store.", "log.", "resume.", "slurm.", "notify.", "train.epochs",
    "train.max_steps", "eval.batch_size", "init.",  # read once, before the first checkpoint
)  # fmt: skip
WHOLE = ("init.rename",)  # their names hold dots
SPELLED = {"init.from": "init.from_"}  # a word of Python's, so no attribute can be called that


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
    "run.remote": (lambda v: check_url(v) is None, "a URL like s3://bucket/prefix; credentials come from the environment, not from it"),
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
    "checkpoint.every_s": (lambda v: v == "auto" or (type(v) in (int, float) and v > 0), "a number of seconds above 0, auto, or null"),
    "checkpoint.keep_last": (_positive, "a whole number above 0"),
    "checkpoint.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "checkpoint.keep_best": (lambda v: v >= 0, "a whole number from 0 on"),
    "checkpoint.best": (lambda v: v.rpartition(":")[0] != "" and v.rpartition(":")[2] in ("max", "min"), "NAME:max or NAME:min"),
    "checkpoint.snapshot": (lambda v: v in ("overlapped", "checked", "at_once"), "overlapped, checked or at_once"),
    "checkpoint.when_busy": (lambda v: v in ("wait", "skip"), "wait or skip"),
    "checkpoint.memory_every_steps": (_positive, "a whole number above 0"),
    "store.wait_s": (lambda v: v >= 0, "a number of seconds from 0 on"),
    "store.keep_last": (_positive, "a whole number above 0, or null"),
    "store.keep_every_steps": (_positive, "a whole number above 0, or null"),
    "store.keep_best": (lambda v: v >= 0, "a whole number from 0 on, or null"),
    "log.to": (lambda v: set(v) <= {"tensorboard", "wandb"}, "a list of: tensorboard, wandb"),
    "log.every_steps": (_positive, "a whole number above 0"),
    "notify.webhook_env": (lambda v: bool(re.fullmatch(r"[A-Za-z_]\w*", v)), "the name of an environment variable, or null"),
    "notify.on": (lambda v: set(v) <= set(NOTICES), f"a list of: {', '.join(NOTICES)}"),
    "notify.timeout_s": (_positive, "a number of seconds above 0"),
    "init.from": (lambda v: v.strip() != "" and (not is_url(v) or check_url(v) is None), "a path or a URL without credentials, or null"),
    "init.rename": (lambda v: all(map(_is_pattern, v)), "{'expression': 'replacement'}, with regular expressions that Python's re takes"),
    "resume.on_mismatch": (lambda v: v in ("warn", "stop"), "warn or stop"),
    "resume.environment": (lambda v: v in ("warn", "refuse"), "warn or refuse"),
    "resume.accept": (lambda v: set(v) <= {"config", "data", "dtype", "remote"}, "a list of: config, data, dtype, remote"),
}
