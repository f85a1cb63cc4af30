"""Submit a run to SLURM: once. The job queues itself again after a preemption, a time limit, a crash or a lost node, until it is done.

The script, the code and the settings are copied into the run directory (beside the working directory if run.dir is null or
run.scratch), so that each life of the job runs what was submitted. Options not listed here are settings: slurm.account=…,
slurm.constraint=…, slurm.setup=['module load cuda'], slurm.container='apptainer exec --nv image.sif', slurm.extra=[--exclusive].

example: harness submit --nodes 2 --gpus-per-node 8 --time 04:00:00 run.dir=runs/a my_loop.py --lr 0.1
example: harness submit --drill '--steps 200 --faults 6' --gpus-per-node 2 --time 01:00:00 run.dir=runs/a my_loop.py --lr 0.1
example: harness submit --config configs/digits.yaml --nodes 2 --gpus-per-node 8 --time 04:00:00 --partition spot run.dir=runs/a
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
from pathlib import Path
from typing import Any

from harness import config, task
from harness.checkpoint.attempts import first_word, now
from harness.cli import supervise
from harness.cli.launch import check_loop, check_named
from harness.config import Config
from harness.data.plan import check_batch
from harness.errors import HarnessError, StorageError, UsageError
from harness.supervision import job_script, launches
from harness.text import say

FLAGS = {
    "nodes": "N", "gpus-per-node": "N", "procs-per-node": "N", "time": "HH:MM:SS", "partition": "NAME", "account": "NAME", "qos": "NAME"
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    for flag, value in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar=value, help=f"as slurm.{flag.replace('-', '_')}={value}")
    parser.add_argument(
        "--drill", nargs="?", const="", metavar="OPTIONS", help="drill the program on one node; with options of harness drill, in quotes"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("settings", nargs="*", metavar="key=value")


def run(given: argparse.Namespace) -> int:
    flags = {flag.replace("-", "_"): getattr(given, flag.replace("-", "_")) for flag in FLAGS}
    own = [f"slurm.{name}={_as_yaml(value)}" for name, value in flags.items() if value is not None]
    settings, stored = config.load(given.config, [*given.settings, *own])
    if settings.run.loop:
        check_named(settings, given.settings)
    code = _checked_code(settings, stored)  # not in an hour, when the job starts
    if settings.run.scratch and settings.run.remote is None:
        raise UsageError("run.scratch says that run.dir is lost with the job", "found: no run.remote", "Give the run a run.remote.")
    if given.drill is not None and settings.slurm.nodes != 1:
        raise UsageError("a drill is for one node", f"found: slurm.nodes={settings.slurm.nodes}", "Leave the nodes out.")
    home = _home(settings)
    number = 1 + max((int(path.name) for path in home.glob("submitted/[0-9]*") if path.name.isdigit()), default=0)
    folder = home / "submitted" / f"{number:04d}"
    text = job_script.script(_job(settings, given, home, folder))
    if given.dry_run:
        say(text)
        return 0
    if shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch on this machine", remedy="Submit from a login node of the cluster; --dry-run prints the script."
        )
    try:
        job_script.copy_code(folder / "code", Path.cwd(), code)
        if given.config:
            shutil.copyfile(given.config, folder / "config.yaml")
        (folder / "job.sbatch").write_text(text)
        (home / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}", f"found: {error}", "Choose another run.dir, or free some space.") from error
    if given.drill is None:
        _record(settings)
    job = _sbatch(folder / "job.sbatch")
    if given.drill is not None:
        say(f"job {job}: a drill\n  script   {folder / 'job.sbatch'}\n  log      tail -F {home / 'logs' / f'slurm-{job}.out'}")
    else:
        _say_how_to_watch(job, settings, home, folder)
    return 0


def _checked_code(settings: Config, stored: dict[str, Any]) -> Path | None:
    """The file of the user's that the job will run, once it is sure that it can. Raises UsageError."""
    if settings.run.loop:
        return check_loop(settings.run.loop)
    build = task.find(settings.task.name, settings.task.args, stored["task"]["args"])
    ranks = settings.slurm.nodes * job_script.procs_per_node(settings.slurm)
    check_batch(settings.train.global_batch_size, ranks, settings.train.micro_batch_size)
    file = sys.modules[build.__module__].__file__
    return Path(file).resolve() if file else None


def _name(settings: Config) -> str:
    """One name a run: jobs of one name wait for each other."""
    place = str(Path(settings.run.dir).expanduser().absolute()) if settings.run.dir else settings.run.remote or ""
    name = re.sub(r"[^\w.+-]", "_", Path(place).name, flags=re.ASCII)
    return settings.slurm.job_name or f"harness-{name}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


def _as_yaml(word: str) -> str:
    """A word that is read as YAML, and stays what it is: 12:00:00 is no number, "a #1" no comment. A count stays a number."""
    if not word.isprintable():
        return json.dumps(word)  # between single quotes a line's end would become a space
    return word if word.isdigit() and not word.startswith("0") else "'" + word.replace("'", "''") + "'"


def _home(settings: Config) -> Path:
    """Where script, code and logs lie: a place that the nodes share."""
    is_shared = settings.run.dir is not None and not settings.run.scratch
    return Path(settings.run.dir if is_shared and settings.run.dir else _name(settings)).expanduser().absolute()


def _job(settings: Config, given: argparse.Namespace, home: Path, folder: Path) -> job_script.Job:
    words = (["--config", str(folder / "config.yaml")] if given.config else []) + given.settings
    if settings.run.dir is not None and not settings.run.scratch:  # the job may start elsewhere
        words = [word for word in words if not word.startswith("run.dir=")] + [f"run.dir={_as_yaml(str(home))}"]
    if settings.run.loop:  # the copy of it, if it is one of those that are copied
        file = check_loop(settings.run.loop)
        copied = folder / "code" / file.relative_to(Path.cwd()) if Path.cwd() in file.parents else file
        loop = json.dumps([str(copied), *settings.run.loop[1:]], ensure_ascii=False)
        words = [word for word in words if not word.startswith("run.loop=")] + [f"run.loop={loop}"]
    return job_script.Job(
        settings.slurm,
        _name(settings),
        str(home / "logs").replace("%", "%%") + "/slurm-%j.out",  # SLURM puts something in the place of %x
        words,
        directory=shlex.quote(os.getcwd()),
        code=shlex.quote(str(folder / "code")),
        python=shlex.quote(settings.slurm.python or ("python" if settings.slurm.container else sys.executable)),
        most_failures=settings.run.max_failures,
        is_submitted=True,
        drill=None if given.drill is None else tuple(shlex.split(given.drill)),
    )


def _record(settings: Config) -> None:
    """Leave in each of the run's stores that it was submitted; raises StorageError, and a job would fail likewise."""
    stores = supervise.places(settings)
    for store in stores[-1:] if settings.run.scratch else stores:  # a scratch directory is another machine's
        store.prepare((launches.LAUNCHES,))
        first_word(store, launches.SUBMITTED, {"submitted": now()})


def _sbatch(script: Path) -> str:
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HarnessError("sbatch refused the job", f"found: {done.stderr.strip()}", f"The script is {script}.")
    return done.stdout.strip().partition(";")[0]


def _say_how_to_watch(job: str, settings: Config, home: Path, folder: Path) -> None:
    run = settings.run.dir if not settings.run.scratch and settings.run.dir else settings.run.remote
    say(f"job {job}: {settings.slurm.nodes} node(s), {job_script.procs_per_node(settings.slurm)} process(es) on each")
    say(f"  script   {folder / 'job.sbatch'}")
    say(f"  log      tail -F {home / 'logs' / f'slurm-{job}.out'}")
    say(f"  status   harness status {run}")
    say(f"  stop     harness stop {run}        (saves, and is not started again; scancel {job} does not wait for a save)")
