r"""Submit a run to SLURM: once.

The job queues itself again after a preemption, a time limit, a crash or a lost node, until the run
is done. The script, the code and the settings are copied into the run directory, so that each start
of the job runs what was submitted. If run.dir is null or run.scratch is set, they are copied into a
folder of the working directory. Options that are not listed here are settings: slurm.account=…,
slurm.constraint=…, slurm.setup=['module load cuda'], slurm.container='apptainer exec --nv
image.sif', slurm.extra=[--exclusive].

example: harness submit --nodes 2 --gpus-per-node 8 --time 04:00:00 \
             run.dir=runs/a my_loop.py --lr 0.1
example: harness submit --drill '--steps 200 --faults 6' --gpus-per-node 2 --time 01:00:00 \
             run.dir=runs/a my_loop.py --lr 0.1
example: harness submit --config configs/digits.yaml --nodes 2 --gpus-per-node 8 --time 04:00:00 \
             --partition spot run.dir=runs/a
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import config, task
from harness.checkpoint.attempts import first_word
from harness.cli import supervise
from harness.config import Config
from harness.config.user_program import check_loop, check_named
from harness.data.plan import check_batch
from harness.errors import HarnessError, StorageError, UsageError
from harness.store import expanded
from harness.supervision import job_script, launches
from harness.supervision.code_copy import copy_code
from harness.text import now, say

FLAGS = {
    "nodes": "N",
    "gpus-per-node": "N",
    "procs-per-node": "N",
    "time": "HH:MM:SS",
    "partition": "NAME",
    "account": "NAME",
    "qos": "NAME",
}


@dataclass(frozen=True)
class Submission:
    """One submission of a run, or of a drill of its program."""

    settings: Config
    settings_given: list[str]  # key=value
    config_file: str | None
    drill: str | None  # options of `harness drill`, None for a run
    home: Path  # folder for the logs and for all submissions of the run
    folder: Path  # folder of this submission, with the script and the copy of the code

    @property
    def script(self) -> Path:
        """Return the path of the job script."""
        return self.folder / "job.sbatch"

    def log(self, job: str) -> Path:
        """Return the path of a job's log."""
        return self.home / "logs" / f"slurm-{job}.out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness submit`."""
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    for flag, value in FLAGS.items():
        parser.add_argument(
            f"--{flag}", metavar=value, help=f"as slurm.{flag.replace('-', '_')}={value}"
        )
    parser.add_argument(
        "--drill",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="drill the program on one node; with options of harness drill, in quotes",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script; write and submit nothing"
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that override the file's"
    )


def run(given: argparse.Namespace) -> int:
    """Check the run, write the job script, submit it and return 0.

    Raises:
        UsageError: The settings or the code are invalid, or there is no sbatch.
        StorageError: The run directory or a store cannot be written.
        HarnessError: sbatch refused the job.
    """
    if given.drill and not given.drill.startswith("-"):
        # A setting, or the program, that follows --drill is not its value.
        ours = {"settings": [given.drill, *given.settings], "drill": ""}
        given = argparse.Namespace(**vars(given) | ours)
    settings, stored = _load(given)
    code = _checked_code(settings, stored)  # now, not only when the job starts
    _check_place(settings, is_drill=given.drill is not None)
    home = _home(settings)
    folder = _next_folder(home)
    submission = Submission(settings, given.settings, given.config, given.drill, home, folder)
    text = job_script.script(_job(submission))
    if given.dry_run:
        say(text)
        return 0
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch on this machine",
            remedy="Submit from a login node of the cluster; --dry-run prints the script.",
        )
    _write(submission, text, code)
    if submission.drill is None:
        _record(settings)
    job = _sbatch(submission.script)
    if submission.drill is None:
        _say_how_to_watch(job, submission)
    else:
        say(
            f"job {job}: a drill\n  script   {submission.script}\n"
            f"  log      tail -F {submission.log(job)}"
        )
    return 0


def _load(given: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """Return the merged settings, and the same as plain dicts. Raises UsageError."""
    flags = {flag.replace("-", "_"): getattr(given, flag.replace("-", "_")) for flag in FLAGS}
    own = [f"slurm.{name}={_as_yaml(value)}" for name, value in flags.items() if value is not None]
    settings, stored = config.load(given.config, [*given.settings, *own])
    if settings.run.loop:
        check_named(config.given(given.config, given.settings))
    return settings, stored


def _checked_code(settings: Config, stored: dict[str, Any]) -> Path | None:
    """Check that the job can run the user's code; return the path of its file.

    Returns None if the task's module has no file. Raises UsageError.
    """
    if settings.run.loop:
        return check_loop(settings.run.loop)
    build = task.find(settings.task.name, settings.task.args, stored["task"]["args"])
    ranks = settings.slurm.nodes * job_script.procs_per_node(settings.slurm)
    check_batch(settings.train.global_batch_size, ranks, settings.train.micro_batch_size)
    file = sys.modules[build.__module__].__file__
    return Path(file).resolve() if file else None


def _check_place(settings: Config, is_drill: bool) -> None:
    """Raise UsageError if the run would be lost with the job, or a drill has several nodes."""
    if settings.run.scratch and settings.run.remote is None:
        raise UsageError(
            "run.scratch says that run.dir is lost with the job",
            "found: no run.remote",
            "Give the run a run.remote.",
        )
    if is_drill and settings.slurm.nodes != 1:
        raise UsageError(
            "a drill is for one node",
            f"found: slurm.nodes={settings.slurm.nodes}",
            "Leave the nodes out.",
        )


def _name(settings: Config) -> str:
    """Return the name of the job, one for each run.

    Of all jobs with the same name, SLURM runs only one at a time.
    """
    place = str(expanded(settings.run.dir)) if settings.run.dir else settings.run.remote or ""
    name = re.sub(r"[^\w.+-]", "_", Path(place).name, flags=re.ASCII)
    return (
        settings.slurm.job_name
        or f"harness-{name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"
    )


def _as_yaml(word: str) -> str:
    """Quote a word so that YAML reads it as the same text.

    For example, 12:00:00 must not become a number, and "a #1" must not lose its end as a comment. A
    count stays a number.
    """
    if not word.isprintable():
        return json.dumps(word)  # in single quotes, YAML would turn a newline into a space
    return (
        word if word.isdigit() and not word.startswith("0") else "'" + word.replace("'", "''") + "'"
    )


def _home(settings: Config) -> Path:
    """Return the folder for script, code and logs, which the nodes must share."""
    is_shared = settings.run.dir is not None and not settings.run.scratch
    return expanded(settings.run.dir if is_shared and settings.run.dir else _name(settings))


def _next_folder(home: Path) -> Path:
    """Return the folder of the next submission, which does not exist yet."""
    names = [path.name for path in home.glob("submitted/[0-9]*")]
    number = 1 + max((int(name) for name in names if name.isdigit()), default=0)
    return home / "submitted" / f"{number:04d}"


def _job(submission: Submission) -> job_script.Job:
    """Return the values from which the job script is made."""
    settings, code = submission.settings, submission.folder / "code"
    return job_script.Job(
        settings.slurm,
        _name(settings),
        # SLURM would replace patterns such as %x in the path.
        str(submission.home / "logs").replace("%", "%%") + "/slurm-%j.out",
        _arguments(submission),
        directory=shlex.quote(os.getcwd()),
        code=shlex.quote(str(code)),
        python=shlex.quote(
            settings.slurm.python or ("python" if settings.slurm.container else sys.executable)
        ),
        most_failures=settings.run.max_failures,
        is_submitted=True,
        drill=None if submission.drill is None else tuple(shlex.split(submission.drill)),
    )


def _arguments(submission: Submission) -> list[str]:
    """Return the configuration file and the settings, as they are given to the job."""
    run, folder = submission.settings.run, submission.folder
    arguments = ["--config", str(folder / "config.yaml")] if submission.config_file else []
    arguments += submission.settings_given
    # The path is made absolute, because the job may start in another working directory.
    if run.dir is not None and not run.scratch:
        arguments = [argument for argument in arguments if not argument.startswith("run.dir=")] + [
            f"run.dir={_as_yaml(str(submission.home))}"
        ]
    # The job runs the copy of the program if the program lies below the working directory.
    if run.loop:
        file = check_loop(run.loop)
        copied = (
            folder / "code" / file.relative_to(Path.cwd()) if Path.cwd() in file.parents else file
        )
        loop = json.dumps([str(copied), *run.loop[1:]], ensure_ascii=False)
        arguments = [argument for argument in arguments if not argument.startswith("run.loop=")] + [
            f"run.loop={loop}"
        ]
    return arguments


def _write(submission: Submission, text: str, code: Path | None) -> None:
    """Write the job script `text`, and copy the configuration and the code.

    `code` is the file of the user's code, or None.

    Raises:
        UsageError: There are too many files to copy.
        StorageError: The folder cannot be written.
    """
    folder = submission.folder
    try:
        copy_code(folder / "code", Path.cwd(), code)
        if submission.config_file:
            shutil.copyfile(submission.config_file, folder / "config.yaml")
        submission.script.write_text(text)
        (submission.home / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}",
            f"found: {error}",
            "Choose another run.dir, or free some space.",
        ) from error


def _record(settings: Config) -> None:
    """Record in the run's stores that the run was submitted.

    Raises StorageError, because the job would fail for the same reason.
    """
    stores = supervise.places(settings)
    # A scratch directory on this machine is not that of the job.
    for store in stores[-1:] if settings.run.scratch else stores:
        store.prepare((launches.LAUNCHES,))
        first_word(store, launches.SUBMITTED, {"submitted": now()})


def _sbatch(script: Path) -> str:
    """Submit a script and return the job's number. Raises HarnessError if sbatch refuses it."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)],
        env=job_script.submitting(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HarnessError(
            "sbatch refused the job", f"found: {done.stderr.strip()}", f"The script is {script}."
        )
    return done.stdout.strip().partition(";")[0]


def _say_how_to_watch(job: str, submission: Submission) -> None:
    """Print the job's number, and the commands that show its progress and stop it."""
    run, slurm = submission.settings.run, submission.settings.slurm
    place = run.dir if not run.scratch and run.dir else run.remote
    say(f"job {job}: {slurm.nodes} node(s), {job_script.procs_per_node(slurm)} process(es) on each")
    say(f"  script   {submission.script}")
    say(f"  log      tail -F {submission.log(job)}")
    say(f"  status   harness status {place}")
    say(
        f"  stop     harness stop {place}        "
        f"(saves, and is not started again; scancel {job} does not wait for a save)"
    )
