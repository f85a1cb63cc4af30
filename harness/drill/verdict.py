"""Result of a drill: equal, or the first difference with its likely cause."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.drill.faults import KINDS, Fault
from harness.drill.program_runs import Caused, ProgramRun
from harness.drill.traces import COMPARED, Difference, Traces, differences, first_of, read
from harness.exchange.compare import Comparison, compare
from harness.store import LocalStore
from harness.supervision import attempt_history
from harness.text import table

# Likely cause, by the first of COMPARED that differs.
CAUSES = {
    "samples": "other samples: their order follows from something that is in no checkpoint, "
    "such as a sampler's own generator, weights that training changes, "
    "or a dataset that is another one at each start",
    "batch": "the same samples, but with other contents: the dataset, its transforms or collate_fn "
    "hold randomness or state of their own (a generator, a counter, an open file)",
    "loss": "the same samples, but another loss: the step reads something that is in no "
    "checkpoint, such as a generator, a module's attribute or mode, a queue, "
    "a variable of the loop",
    "state": "the same samples and the same loss, but another update: gradients, an optimizer, "
    "a schedule or an average hold something that is in no checkpoint",
    "rng": "the step itself is the same, but the global generators of Python, NumPy or torch "
    "were drawn from more or less often",
}


@dataclass(frozen=True)
class Row:
    """Outcome of one fault."""

    fault: Fault
    step: int | None  # the step that the run was in; None if the fault's point was not reached
    lost: int | None  # number of recomputed steps; None if no attempt started after the fault
    back_s: float | None  # from the fault to the end of the first new step; None if there was none
    # Whether all steps from this fault to the next one were as in the undisturbed run; None if
    # there were no steps.
    equal: bool | None

    @property
    def description(self) -> str:
        """Return the description of the fault's kind."""
        return KINDS[self.fault.kind].description


@dataclass(frozen=True)
class Verdict:
    """Result of a drill."""

    rows: list[Row]  # one per fault
    steps: int  # number of the undisturbed run's last step
    whole_s: float  # wall time of the undisturbed run
    hurt_s: float  # wall time of the run with faults
    is_equal: bool
    first: Difference | None  # the first step that differs
    # Differences of the last checkpoints: (path, undisturbed, with faults, greatest difference).
    tensors: list[tuple[str, str, str, str]]
    files: list[str]  # names of the program's kept files that differ
    # Whether two undisturbed runs are equal in what differs here first; None if not tested.
    is_deterministic: bool | None
    suspects: list[str]  # paths of objects that the run has reported as untracked
    # The first step in which two undisturbed runs differ so, if it is a step.
    undisturbed_differ_at: int | None = None

    @property
    def injected(self) -> int:
        """Return the number of faults that were injected."""
        return sum(row.step is not None for row in self.rows)

    @property
    def cause(self) -> str:
        """Return the likely cause in words; "" if nothing differs."""
        if self.is_equal:
            return ""
        if self.is_deterministic is False:
            step = self.undisturbed_differ_at
            return "not deterministic: two undisturbed runs differ as well" + (
                f", first in step {step}" if step is not None else ""
            )
        if self.first is None:
            return "all steps were the same, but not what was kept at the end"
        return CAUSES[self.first.what]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as data that JSON can hold."""
        rows = [
            asdict(row.fault)
            | {"step": row.step, "lost": row.lost, "back_s": row.back_s, "equal": row.equal}
            for row in self.rows
        ]
        return {
            "equal": self.is_equal,
            "steps": self.steps,
            "faults": rows,
            "whole_s": self.whole_s,
            "hurt_s": self.hurt_s,
            "first": asdict(self.first) if self.first else None,
            "tensors": self.tensors,
            "files": self.files,
            "deterministic": self.is_deterministic,
            "undisturbed_differ_at": self.undisturbed_differ_at,
            "cause": self.cause or None,
            "suspects": self.suspects,
        }


@dataclass(frozen=True)
class _Compared:
    """All differences of two runs: of their traces, last checkpoints, and kept files."""

    expected: Traces
    actual: Traces
    steps: list[Difference]
    last: Comparison
    files: list[str]

    @property
    def is_equal(self) -> bool:
        """Return whether the runs have as many steps, and nothing differs."""
        return (
            self.expected.last_step == self.actual.last_step
            and not self.steps
            and not self.last.count
            and not self.files
        )


def _compared(whole: ProgramRun, other: ProgramRun) -> _Compared:
    """Compare all steps, the last checkpoints and the kept files of two runs bit for bit."""
    expected, actual = read(whole.folder), read(other.folder)
    return _Compared(
        expected,
        actual,
        differences(expected, actual),
        compare(whole.run, other.run),
        _other_files(whole.run / "files", other.run / "files"),
    )


def verdict(whole: ProgramRun, hurt: ProgramRun, faults: Sequence[Fault]) -> Verdict:
    """Compare a run with faults with an undisturbed run.

    The traces of all steps, the last checkpoints, and the files that the program keeps are compared
    bit for bit.

    Args:
        whole: The undisturbed run.
        hurt: The run with faults.
        faults: All planned faults; `hurt.caused` has the injected ones.

    Returns:
        The verdict, with at most 100 differences of the checkpoints; determinism is not tested.
    """
    compared = _compared(whole, hurt)
    return Verdict(
        _rows(hurt.caused, faults, compared.actual, compared.steps),
        compared.expected.last_step,
        whole.seconds,
        hurt.seconds,
        compared.is_equal,
        first_of(compared.steps),
        compared.last.rows[:100],
        compared.files,
        None,
        [] if compared.is_equal else _suspects(hurt.run),
    )


def judged(verdict: Verdict, whole: ProgramRun, again: ProgramRun) -> Verdict:
    """Return the verdict on runs that differ, with whether the program is deterministic at all.

    Two undisturbed runs are compared in what differs first in the verdict: the steps, else their
    number, else the last checkpoints, else the kept files. A difference of later effects explains
    none in what comes before them: other losses do not make other samples.

    Args:
        verdict: Result of the run with faults.
        whole: The undisturbed run.
        again: A second undisturbed run.
    """
    compared = _compared(whole, again)
    if verdict.first is not None:
        kinds = COMPARED[: COMPARED.index(verdict.first.what) + 1]
        first = first_of([step for step in compared.steps if step.what in kinds])
        return replace(
            verdict, is_deterministic=not first, undisturbed_differ_at=first.step if first else None
        )
    if verdict.tensors:
        is_alike = not compared.last.count
    elif verdict.files:
        is_alike = not compared.files
    else:
        is_alike = compared.expected.last_step == compared.actual.last_step
    return replace(verdict, is_deterministic=is_alike)


def _rows(
    caused: Sequence[Caused],
    faults: Sequence[Fault],
    traces: Traces,
    differing: Sequence[Difference],
) -> list[Row]:
    """Return the outcome of each fault; faults that were not injected come last."""
    own = [step for step in traces.steps if step.is_writers]
    rows, before = [], 0.0
    for number, injected in enumerate(caused):
        until = caused[number + 1].at if number + 1 < len(caused) else float("inf")
        attempts = [attempt for at, attempt, _ in traces.starts if at <= injected.at]
        reached = max(
            (step.step for step in own if step.attempt <= max(attempts, default=0)), default=0
        )
        origin = next((step for at, _, step in traces.starts if at > injected.at), None)
        has_trained = any(before < at <= injected.at for at, _, _ in traces.starts)
        lost = None if origin is None else max(0, reached - origin) if has_trained else 0
        back = next(
            (
                step.time - injected.at
                for step in own
                if step.time > injected.at and step.step > reached
            ),
            None,
        )
        made = [step for step in traces.steps if injected.at < step.time <= until]
        equal = (
            None
            if not made
            else not any(injected.at < difference.time <= until for difference in differing)
        )
        rows.append(Row(injected.fault, injected.step, lost, back, equal))
        before = injected.at
    injected_numbers = {injected.fault.number for injected in caused}
    return rows + [
        Row(fault, None, None, None, None)
        for fault in faults
        if fault.number not in injected_numbers
    ]


def _other_files(whole: Path, hurt: Path) -> list[str]:
    """Return the names of the files that differ or exist in only one of two folders."""

    def digests(folder: Path) -> dict[str, str]:
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return {
            str(file.relative_to(folder)): hashlib.blake2b(file.read_bytes()).hexdigest()
            for file in files
        }

    expected, actual = digests(whole), digests(hurt)
    return sorted(
        name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name)
    )


def _suspects(run: Path) -> list[str]:
    """Return the paths of live objects that the run has reported as untracked."""
    store, paths = LocalStore(run), dict[str, None]()
    for file in sorted((run / "events").glob("[0-9]*.jsonl")):
        for event in attempt_history.events([store], int(file.stem.partition("-")[0])):
            if event.get("event") == "untracked":
                paths |= dict.fromkeys(str(path) for path in event.get("names", []))
    return list(paths)


HEADER = ("step", "fault", "steps lost", "s to the next new step", "steps since")


def table_of(verdict: Verdict) -> list[tuple[str, ...]]:
    """Return a row per fault, with the columns of `HEADER`."""
    return [
        (
            "-" if row.step is None else str(row.step),
            row.description,
            "-" if row.lost is None else str(row.lost),
            "-" if row.back_s is None else f"{row.back_s:.1f}",
            "not reached"
            if row.step is None
            else {None: "-", True: "equal", False: "DIFFERS"}[row.equal],
        )
        for row in verdict.rows
    ]


def text(verdict: Verdict) -> str:
    """Format the verdict for people."""
    lines = [table(HEADER, table_of(verdict))] if verdict.rows else []
    return "\n".join([*lines, *headline(verdict)])


def headline(verdict: Verdict) -> list[str]:
    """Return lines with the overall result and, if the runs differ, where and why."""
    if verdict.is_equal and not verdict.injected:
        return [
            "nothing is proven: no fault was injected, because the run did not reach the point of "
            "any; take more --steps, more --faults, or another --seed"
        ]
    if verdict.is_equal:
        return [f"equal, bit for bit: {verdict.steps} steps, {verdict.injected} faults"]
    lines = ["NOT EQUAL to the undisturbed run"]
    if (first := verdict.first) is not None:
        lines.append(
            f"  first: step {first.step}, rank {first.rank}, attempt {first.attempt}: {first.what}"
        )
        lines += (
            [f"  first tensor: {first.tensors[0]}, {len(first.tensors)} in all"]
            if first.tensors
            else []
        )
    lines += [
        f"  in the last checkpoint: {where}: {mine}, {theirs}, by {gap}"
        for where, mine, theirs, gap in verdict.tensors[:5]
    ]
    lines += [f"  a file that the program keeps: {name}" for name in verdict.files[:5]]
    lines.append(f"  likely cause: {verdict.cause}")
    return lines + [f"  alive and not tracked: {path}" for path in verdict.suspects]


def save(verdict: Verdict, folder: Path) -> None:
    """Write the verdict to `drill.json` in the folder of the drill."""
    (folder / "drill.json").write_text(json.dumps(verdict.to_json(), indent=1) + "\n")
