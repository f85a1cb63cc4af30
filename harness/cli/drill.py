"""Train your program undisturbed, then with faults, and compare the two bit for bit.

The program, or the task of --config, runs to its end, or for --steps steps; its checkpoints and
records go to a temporary folder. Then it runs again with --faults faults, drawn from --seed: it is
killed in a step, while it starts, while it saves, at an epoch's end, in an evaluation, or told to
stop; with run.remote its disk is lost. Each step's samples, batch, loss, generators and state are
compared, and so are the last checkpoints and the files that the program keeps. If they differ, the
program runs undisturbed once more, to find out whether it is deterministic at all.

The program needs no change. What the harness writes for it goes to the temporary folder (--keep
keeps it). What the program writes by itself is not redirected, so you must look after it: files
below the working directory that were changed are listed. HARNESS_DRILL=1 is in the program's
environment. A drill runs on one machine. Options that are not listed here go to torchrun.

Exit code: 0 equal · 1 different, or no fault was injected, or the program failed ·
78 configuration or usage.

example: harness drill --nproc-per-node 2 --steps 200 --faults 6 my_loop.py --lr 0.1
example: harness drill --nproc-per-node 2 --config my.yaml --kinds kill,save
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import config, preemption, task
from harness.cli import locate
from harness.config.user_program import check_loop
from harness.drill import verdict as verdicts
from harness.drill.faults import KINDS, planned
from harness.drill.program_runs import Program, ProgramRun, run_program
from harness.drill.traces import Traces, read
from harness.errors import EXIT_FAILED, EXIT_FINISHED, StorageError, UsageError
from harness.text import duration, say

# Checkpoints in --steps steps, if the program sets no interval in steps. Without --steps, the
# interval is 20 steps.
SAVES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness drill`."""
    parser.add_argument("--config", help="YAML file, relative to the working directory")
    parser.add_argument(
        "--nproc-per-node", default="1", metavar="N", help="processes (torchrun's own option)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="end the run with this step, as run.finish() does; else at its own end",
    )
    parser.add_argument("--faults", type=int, default=6, metavar="N", help="how many (6)")
    parser.add_argument(
        "--kinds", metavar="A,B", help=f"of which kinds: {', '.join(KINDS)} (all that the run has)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order and places (0)")
    parser.add_argument(
        "--limit-s",
        type=float,
        default=3600.0,
        metavar="S",
        help="for all of it, in seconds (3600)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep both runs here")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="draw the run that was hurt, and the table"
    )
    parser.set_defaults(passes_on=True)


def run(given: argparse.Namespace, rest: list[str]) -> int:
    """Run the drill and print the verdict; return 0 if both runs are equal, else 1.

    Args:
        given: The arguments that the parser knows.
        rest: The others: settings, the program, and options for torchrun.

    Raises:
        UsageError: The arguments or the settings are invalid, or the program makes no step.
        HarnessError: The program failed by itself, or the drill was interrupted.
        StorageError: The file of --html cannot be written.
    """
    chosen = _kinds(given)
    program = _program(given, rest)
    if given.keep is not None and given.keep.exists():
        raise UsageError(
            f"{given.keep} is there already",
            remedy="Name a folder that is not: both runs are kept in it.",
        )
    preemption.install()
    before, until = _files(), time.monotonic() + given.limit_s
    with _folder(given.keep) as folder:
        _say(
            given,
            "what the program writes by itself is not redirected; "
            "HARNESS_DRILL=1 tells it that this is a drill",
        )
        hurt, verdict = _compared(given, chosen, program, folder, until)
        say(json.dumps(verdict.to_json(), indent=1) if given.json else verdicts.text(verdict))
        verdicts.save(verdict, folder)
        if given.html is not None:
            _draw(given, hurt, verdict)
    for changed in _changed(before):
        _say(given, f"changed below this folder meanwhile: {changed}")
    return EXIT_FINISHED if verdict.is_equal and verdict.injected else EXIT_FAILED


def _compared(
    given: argparse.Namespace, chosen: list[str], program: Program, folder: Path, until: float
) -> tuple[ProgramRun, verdicts.Verdict]:
    """Run the program undisturbed, then with faults; return the latter run and the verdict.

    Args:
        given: The arguments of the drill.
        chosen: The requested kinds of faults, [] for all that the run has.
        program: The program to drill.
        folder: The folder for the runs.
        until: When the drill must be over, by `time.monotonic`.

    Raises UsageError if the program cannot have a requested kind, or makes no step.
    """
    plan = {
        "steps": given.steps,
        "save_every_steps": max(1, (given.steps or 20 * SAVES) // SAVES),
    }
    whole = run_program(program, folder / "whole", plan, [], until, lambda text: None)
    expected = read(whole.folder)
    _check_traces(expected, whole)
    _say(given, f"undisturbed: {expected.last_step} steps in {duration(whole.seconds)}")
    program = dataclasses.replace(program, has_remote=whole.has_remote)
    possible = [kind for kind in KINDS if _has(expected, whole, kind)]
    if impossible := [kind for kind in chosen if kind not in possible]:
        raise UsageError(
            "the program lacks what these faults need",
            "found: no " + ", no ".join(f"{KINDS[kind].needs} for {kind}" for kind in impossible),
            f"It can have: {', '.join(possible)}.",
        )
    kinds = chosen or possible
    faults = planned(given.faults, kinds, expected.last_step, given.seed)
    hurt = run_program(
        program, folder / "hurt", plan, faults, until, lambda text: _say(given, text)
    )
    verdict = verdicts.verdict(whole, hurt, faults)
    if not verdict.is_equal:
        _say(
            given, "they differ: undisturbed once more, to see whether the program is deterministic"
        )
        again = run_program(program, folder / "again", plan, [], until, lambda text: None)
        verdict = verdicts.judged(verdict, whole, again)
    return hurt, verdict


def _kinds(given: argparse.Namespace) -> list[str]:
    """Return the requested kinds of faults, [] for all. Raises UsageError for invalid arguments."""
    chosen = [kind for kind in (given.kinds or "").split(",") if kind]
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise UsageError(
            "there is no such kind of fault",
            f"found: {', '.join(unknown)}",
            f"There are: {', '.join(KINDS)}.",
        )
    if given.faults < 1 or (given.steps is not None and given.steps < 1) or not given.limit_s > 0:
        raise UsageError("--faults, --steps and --limit-s are numbers above 0")
    return chosen


def _program(given: argparse.Namespace, rest: list[str]) -> Program:
    """Return the program to drill, after a check of its settings and of the task or file.

    Raises UsageError, before any process is started.
    """
    settings_given = [
        argument for argument in rest if "=" in argument and not argument.startswith("-")
    ]
    settings, stored = config.load(given.config, settings_given)
    if settings.run.loop:
        check_loop(settings.run.loop)
    else:
        task.find(settings.task.name, settings.task.args, stored["task"]["args"])
    arguments = [
        f"--nproc-per-node={given.nproc_per_node}",
        *(["--config", given.config] if given.config else []),
        *rest,
    ]
    return Program(
        tuple(arguments),
        settings.run.remote is not None,
        Path(__file__).resolve().parent.parent / "__main__.py",
    )


def _has(traces: Traces, whole: ProgramRun, kind: str) -> bool:
    """Return whether a run has what this kind of fault needs."""
    needs = KINDS[kind].needs
    return (
        needs == ""
        or needs in traces.has
        or (needs == "remote" and whole.has_remote)
        or (needs == "epochs" and traces.last_epoch > 0)
    )


def _check_traces(traces: Traces, whole: ProgramRun) -> None:
    """Raise UsageError if the undisturbed run has traced no step."""
    if not traces.steps:
        raise UsageError(
            "the program made no step in a loop of the harness",
            f"found: no trace in {whole.folder}",
            "Its loop has to be one over run.batches, run.by_epoch or run.steps.",
        )


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder for both runs; delete it afterwards unless it is the one of --keep."""
    folder = Path(tempfile.mkdtemp(prefix="harness-drill-")) if keep is None else keep.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _draw(given: argparse.Namespace, hurt: ProgramRun, verdict: verdicts.Verdict) -> None:
    """Write the page of --html: the run with faults, and the table of faults."""
    from harness.report import page
    from harness.report.timeline import timeline

    store, catalog = locate.everywhere(str(hurt.run))
    drill = page.Table(
        "Drill", verdicts.headline(verdict), verdicts.HEADER, verdicts.table_of(verdict)
    )
    try:
        given.html.write_text(page.page(str(store), timeline(catalog), drill))
    except OSError as error:
        raise StorageError(
            f"cannot write {given.html}", f"found: {error}", "Name another file."
        ) from error
    _say(given, f"drawn: {given.html}")


def _say(given: argparse.Namespace, text: str) -> None:
    """Print progress; with --json it goes to standard error."""
    say(f"harness drill: {text}", sys.stderr if given.json else sys.stdout)


def _files() -> dict[str, tuple[int, int]]:
    """Return the size and modification time of the files below the working directory, by path.

    Hidden folders and `__pycache__` are left out. The search ends after the folder in which the
    number of files exceeds 20,000.
    """
    files: dict[str, tuple[int, int]] = {}
    for folder, folders, names in os.walk("."):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(folder, name))
                files[os.path.join(folder, name)] = status.st_size, status.st_mtime_ns
        if len(files) > 20_000:
            break
    return files


def _changed(before: dict[str, tuple[int, int]]) -> list[str]:
    """Return the first 10 files, by name, that are new or changed since the listing `before`."""
    after = _files()
    return sorted(name for name in after if after[name] != before.get(name))[:10]
