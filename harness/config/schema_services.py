"""Define the settings of what a run reports to, and of what SLURM is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.rules import (
    COUNT,
    SBATCH_OPTIONS,
    SECONDS,
    SLURM_TIME,
    matching,
    setting,
    some_of,
)

NOTICES = ("resumed", "stopped", "crashed", "failed", "finished")


@dataclass(frozen=True)
class LogSettings:
    """How often loss and throughput are recorded, and which trackers receive them too."""

    every_steps: int = setting(
        10, "Steps between two records of the logged values.", COUNT, "log_every_steps"
    )
    to: list[str] = setting(
        [],
        "tensorboard (in `run.dir/tensorboard`), wandb (project and key from W&B's environment).",
        some_of("tensorboard", "wandb"),
        "log_to",
    )


@dataclass(frozen=True)
class NotifySettings:
    """Notifications that the supervisor of a run sends when its state changes."""

    command: list[str] = setting(
        [],
        "Program that gets the news as JSON on its standard input, and as HARNESS_EVENT and "
        "HARNESS_TEXT.",
    )
    webhook_env: str | None = setting(
        None,
        "Name of the environment variable that holds the URL to post the JSON to; the URL itself "
        "is a secret.",
        matching(r"[A-Za-z_]\w*", "the name of an environment variable"),
    )
    on: list[str] = setting(
        ["resumed", "stopped", "failed", "finished"],
        "Which news; crashed: it failed and is started again.",
        some_of(*NOTICES),
    )
    timeout_s: float = setting(10.0, "How long one notification may take.", SECONDS)


@dataclass(frozen=True)
class SlurmSettings:
    """The SLURM options of `harness submit`; a null leaves the site's default."""

    nodes: int = setting(1, "Nodes of the job.", COUNT)
    gpus_per_node: int | None = setting(None, "GPUs of each node.", COUNT)
    procs_per_node: int | None = setting(
        None, "Training processes of each node. null: one per GPU, else one.", COUNT
    )
    cpus_per_node: int | None = setting(None, "CPUs of each node.", COUNT)
    mem: str | None = setting(None, "Memory of each node, as sbatch takes it: 64G.")
    time: str | None = setting(None, "Time limit: '04:00:00', '2-12'.", SLURM_TIME)
    partition: str | None = setting(None, "Partition.")
    account: str | None = setting(None, "Account.")
    qos: str | None = setting(None, "Quality of service.")
    constraint: str | None = setting(None, "Features that the nodes must have.")
    job_name: str | None = setting(
        None,
        "Name of the job; jobs of one name never run at the same time. null: from `run.dir`.",
        matching(r"[\w.+-]+", "letters, digits, and . + - _"),
    )
    extra: list[str] = setting(
        [], "Further options of sbatch: [--exclusive, --mail-type=END].", SBATCH_OPTIONS
    )
    setup: list[str] = setting([], "Shell lines that run first: ['module load cuda', 'export …'].")
    container: str | None = setting(None, "Prefix of the command: apptainer exec --nv image.sif.")
    python: str | None = setting(
        None, "Interpreter. null: that of `submit`; in a container: python."
    )
