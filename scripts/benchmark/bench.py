"""What every experiment is given: the settings, and a way to take a sample in a fresh process."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.sampling import MARK

SAMPLE_LIMIT_S = 1800.0


class SampleError(Exception):
    """A sample's process failed; the message is the last thing it said."""


@dataclass
class Bench:
    """The settings of a run of the benchmark, and what could not be measured."""

    size_mb: int
    repeats: int
    scratch: Path  # on the disk to be measured
    row: str = ""  # which is being measured
    missing: dict[str, str] = field(default_factory=dict)  # who or what, and why
    # every sample, in the order in which they were taken
    raw: list[dict[str, Any]] = field(default_factory=list)
    began_at: float = field(default_factory=time.monotonic)

    @property
    def size_bytes(self) -> int:
        return self.size_mb * 1_000_000

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began_at:6.0f} s] {text}", file=sys.stderr, flush=True)

    def folder(self) -> Path:
        """A new empty folder; what earlier samples left is gone, and the disk is at rest."""
        for old in self.scratch.glob("sample-*"):
            shutil.rmtree(old)
        os.sync()
        folder = self.scratch / f"sample-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        return folder

    def sample(
        self,
        module: str,
        function: str,
        ranks: int = 0,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        """What `benchmark.MODULE.FUNCTION(folder, **arguments)` returns in a process of its own,
        or, of so many `ranks`, on the first.

        The folder is fresh. Raises SampleError.
        """
        folder = self.folder()
        result, log = folder / "result.json", folder / "log"
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            if ranks
            else []
        )
        told = json.dumps(arguments | {"folder": str(folder)})
        command = [
            sys.executable,
            *launcher,
            "-m",
            "benchmark.child",
            module,
            function,
            told,
            str(result),
        ]
        with log.open("wb") as output:
            status = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=SAMPLE_LIMIT_S,
                check=False,
                env=os.environ | {MARK: secrets.token_hex(8)} | (environment or {}),
            ).returncode
        if not result.exists():
            raise SampleError(f"{module}.{function} ended with {status}: {_cause(log)}")
        return json.loads(result.read_text())

    def turns(
        self, samples: Mapping[str, Callable[[], Any]], turns: int | None = None
    ) -> dict[str, list[Any]]:
        """All samples once, then all once more, and so on. Who fails is left out from then on, and
        named in `missing`."""
        taken: dict[str, list[Any]] = {name: [] for name in samples}
        for turn in range(turns or self.repeats):
            for name in list(taken):
                began_at = time.monotonic()
                try:
                    taken[name].append(samples[name]())
                    self.raw.append(
                        {"row": self.row, "who": name, "turn": turn + 1, "sample": taken[name][-1]}
                    )
                except (SampleError, subprocess.TimeoutExpired) as error:
                    self.missing[f"{self.row}: {name}"] = why = " ".join(str(error).split())
                    self.say(f"{name}: left out: {why}")
                    del taken[name]
                else:
                    self.say(f"turn {turn + 1}: {name} ({time.monotonic() - began_at:.1f} s)")
        return taken


def _cause(log: Path) -> str:
    """The first error of a sample's output: what comes after it, torchrun's report, only repeats
    it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if re.search(r"\b\w*(Error|Exception|Interrupt)\b: ", line)
        and "ChildFailedError" not in line
    ]
    return (errors or lines[-1:] or ["no output"])[0][:300]
