"""Define each setting of a run once: its default, its meaning, and its allowed values.

Those of SLURM, logs and notices are in `schema_services`.

From these definitions come the defaults of `harness.init`, the checks of its arguments and of the
settings, the help text, and `configs/README.md` (`scripts/settings`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.config.rules import (
    COUNT,
    COUNT_OR_ZERO,
    DIRECTORY,
    FRACTION,
    IMPORT_PATH,
    INTERVAL,
    KEPT,
    METRIC,
    PATH_OR_URL,
    POSITIVE,
    PROGRAM,
    REMOTE,
    RENAMES,
    SECONDS,
    SECONDS_OR_AUTO,
    SECONDS_OR_ZERO,
    SEED,
    one_of,
    setting,
    some_of,
)
from harness.config.schema_services import LogSettings, NotifySettings, SlurmSettings
from harness.store.urls import DEFAULT_WAIT_S


@dataclass(frozen=True)
class RunSettings:
    """The stores of a run, its time limits and its supervision."""

    dir: str | None = setting(
        "runs/digits",
        "Where the run lives: a local directory, on several nodes one that all of them see. "
        "null: only in `run.remote`.",
        DIRECTORY,
    )
    remote: str | None = setting(
        None,
        "URL that each checkpoint is uploaded to: `s3://bucket/prefix`, or another that fsspec "
        "opens.",
        REMOTE,
    )
    timeout_s: float = setting(
        600.0,
        "Longest wait for another rank, and longest step.",
        SECONDS,
        "timeout_s",
    )
    step_timeout_s: float | None = setting(
        None,
        "Longest step. null: 300 s more than thirty times the longest step so far, at most "
        "`run.timeout_s`.",
        SECONDS,
        "step_timeout_s",
    )
    grace_s: float | None = setting(
        None, "Time from SIGTERM to SIGKILL. null: as configured in SLURM.", SECONDS, "grace_s"
    )
    margin_s: float = setting(
        30.0,
        "The run ends this long before the job's time limit.",
        SECONDS_OR_ZERO,
        "margin_s",
    )
    scratch: bool = setting(
        False,
        "`run.dir` is lost with the job: a stop waits for its upload. Each node may have its own.",
        argument="is_scratch",
    )
    max_failures: int = setting(
        3,
        "Failures in a row, without a new checkpoint between them, after which `launch` and the "
        "job give up.",
        COUNT,
    )
    notices: str | None = setting(
        None,
        "Cloud whose metadata service is asked whether the machine is about to be taken.",
        one_of("aws", "gcp", "azure"),
        "notices",
    )
    loop: list[str] = setting(
        [], "For `launch` and `submit`: a program in place of train.py, and its arguments.", PROGRAM
    )


@dataclass(frozen=True)
class TaskSettings:
    """The task to train: the import path of a callable, and its arguments."""

    name: str = setting(
        "harness.tasks.digits:build", "Import path of the task's `build`.", IMPORT_PATH
    )
    args: dict[str, Any] = setting({}, "Its arguments: `task.args.width=128`.")


@dataclass(frozen=True)
class TrainSettings:
    """The training loop: duration, batch sizes, precision and updates."""

    epochs: int = setting(30, "Epochs of the whole run; more of them extend it.", COUNT, "epochs")
    max_steps: int | None = setting(
        None, "Steps of the whole run, if it has that many.", COUNT, "max_steps"
    )
    # 48 is divisible by 1, 2, 3, 4, 6, 8, 12, 16 and 24 ranks.
    global_batch_size: int = setting(
        48, "Samples of one optimizer step over all ranks.", COUNT, "global_batch_size"
    )
    micro_batch_size: int | None = setting(
        None,
        "Most samples in one forward pass on one rank; gradients of the passes are accumulated. "
        "null: all of a rank's share.",
        COUNT,
    )
    seed: int = setting(1, "Seed of all generators and of the order of samples.", SEED, "seed")
    precision: str = setting(
        "fp32",
        "Precision of the forward pass: autocast, or FSDP2's mixed precision with `train.shard`; "
        "fp16 with a gradient scaler.",
        one_of("fp32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "Run the modules through `torch.compile`.")
    shard: str = setting(
        "none",
        "Shard modules over the ranks with FSDP2: over all of them, or (hsdp) over those of a "
        "replica.",
        one_of("none", "fsdp", "hsdp"),
    )
    shard_size: int | None = setting(
        None, "Ranks of one replica with hsdp. null: those of a node.", COUNT
    )
    checkpoint_activations: bool = setting(
        False, "Compute the activations of the blocks again in the backward pass: less memory."
    )
    clip_norm: float | None = setting(1.0, "Largest norm of the gradients.", POSITIVE)
    ema_decay: float | None = setting(None, "Decay of averaged weights. null: none.", FRACTION)
    deterministic: bool = setting(
        False,
        "Use deterministic algorithms of torch, cuDNN, cuBLAS and NCCL.",
        argument="deterministic",
    )
    nonfinite: str = setting(
        "skip",
        "On NaN or Inf in an update: skip the update, stop the run, or ignore it (which saves a "
        "read from the device).",
        one_of("skip", "stop", "ignore"),
    )
    nonfinite_limit: int = setting(10, "Skipped updates in a row before the run stops.", COUNT)


@dataclass(frozen=True)
class DataSettings:
    """The data loading."""

    num_workers: int = setting(
        0, "Loader processes; may change at any restart.", COUNT_OR_ZERO, "num_workers"
    )
    drop_last: bool = setting(
        True, "Leave out the incomplete last batch of an epoch.", argument="drop_last"
    )
    check_stream: bool = setting(
        True,
        "Try before training whether an iterable dataset can be continued exactly.",
        argument="check_stream",
    )


@dataclass(frozen=True)
class EvalSettings:
    """When the model is evaluated: every `every_steps` steps, and always after the last one."""

    every_steps: int | None = setting(
        100, "Steps between two evaluations. null: only after the last step.", COUNT
    )
    batch_size: int = setting(256, "Samples of one batch of one rank.", COUNT)


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which are kept; the two newest are always kept."""

    every_steps: int | None = setting(
        None, "Also save in every step that is a multiple of this.", COUNT, "save_every_steps"
    )
    every_s: Any = setting(
        60.0,
        "Time between two saves. auto: what is best for the measured costs of saves and "
        "interruptions. null: no saves by the clock.",
        SECONDS_OR_AUTO,
        "save_every_s",
    )
    keep_last: int = setting(3, "Newest checkpoints to keep.", COUNT, "keep_last")
    keep_every_steps: int | None = setting(
        None,
        "Also keep every checkpoint whose step is a multiple of this.",
        COUNT,
        "keep_every_steps",
    )
    keep_best: int = setting(
        1, "Best checkpoints to keep, by `checkpoint.best`.", COUNT_OR_ZERO, "keep_best"
    )
    best: str = setting(
        "val_acc:max", "Metric that ranks checkpoints; `init`: val_loss:min.", METRIC, "best"
    )
    snapshot: str = setting(
        "overlapped",
        "How the state is copied. overlapped: during the next forward and backward passes. "
        "at_once: training waits. checked: training waits, and each copy is compared with the "
        "state before the next update.",
        one_of("overlapped", "checked", "at_once"),
        "snapshot",
    )
    when_busy: str = setting(
        "wait",
        "A save is due and the previous one is in flight. wait: for it. skip: leave out the one "
        "that the clock asks for.",
        one_of("wait", "skip"),
        "when_busy",
    )
    memory: Any = setting(
        False,
        "Also keep the newest step in the machine's memory (/dev/shm): true: every step; a number: "
        "every so many steps.",
        INTERVAL,
        "memory",
    )
    rehearse: bool = setting(
        True,
        "Read the first checkpoint of a new run back, and load it into copies.",
        argument="rehearse",
    )


@dataclass(frozen=True)
class StoreSettings:
    """The remote store: how long it may be unreachable, and what it keeps."""

    wait_s: float = setting(
        DEFAULT_WAIT_S,
        "How long it may be unreachable: at the start, at the end, and for one request.",
        SECONDS_OR_ZERO,
        "wait_s",
    )
    keep: dict[str, Any] = setting(
        {},
        "What the remote store keeps, where it differs from `checkpoint.keep_*`: "
        "{last: 2, every_steps: 1000, best: 1}.",
        KEPT,
        "remote_keep",
    )


@dataclass(frozen=True)
class InitSettings:
    """The initial weights of a new run; a run that has a checkpoint resumes from it instead."""

    from_: str | None = setting(
        None,
        "A run, one of its checkpoints, or a file that another program wrote.",
        PATH_OR_URL,
    )
    strict: bool = setting(True, "Every tensor must exist and fit; else only those that fit.")
    rename: dict[str, str] = setting(
        {}, "Regular expressions for names in the file, with their replacements.", RENAMES
    )


@dataclass(frozen=True)
class ResumeSettings:
    """What to accept, and what to check, when a run resumes."""

    accept: list[str] = setting(
        [],
        "Differences to accept: other settings or another dealing of the data (config), another "
        "dataset, parameters of another dtype, another remote store.",
        some_of("config", "data", "dtype", "remote"),
        "accept",
    )
    override: list[str] = setting(
        [], "Changed settings to apply to restored optimizers: [task.args.lr].", argument="override"
    )
    on_mismatch: str = setting(
        "warn",
        "A recomputed step differs from its record: warn, or stop before the next save.",
        one_of("warn", "stop"),
        "on_mismatch",
    )
    environment: str = setting(
        "warn",
        "Hardware or software differ from those of the checkpoint: warn, or refuse to start.",
        one_of("warn", "refuse"),
        "environment",
    )


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


# Dicts that `flatten` does not split: values of one setting.
WHOLE = ("init.rename", "store.keep")
# Setting names that are keywords of Python, with the attribute names that are used instead.
SPELLED = {"init.from": "init.from_"}
