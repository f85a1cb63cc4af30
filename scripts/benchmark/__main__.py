"""The command line of the benchmark; see `scripts/bench --help`."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

from benchmark import machine, report
from benchmark.bench import Bench, SampleError
from benchmark.draw import draw
from benchmark.findings import HARNESS, Finding

ROWS = {
    "saves": (
        "what a save costs beside everybody else: durable throughput, CPU time, memory, "
        "how long others block training"
    ),
    "blocked": "how long a save blocks training that goes on",
    "total": "time that a save adds to training, on two ranks",
    "p99": "short steps while a save is running",
    "s3": "time until a checkpoint is whole in S3, beside raw clients",
    "load": "loading, verified, beside torch.load, which is not; cold, warm, memory",
    "overhead": "what the loop costs a step, beside DDP by hand, Fabric and Trainer",
    "gpu": (
        "what saves cost a model on a GPU that are due after every step; "
        "left out where there is no GPU"
    ),
    "sharded": "saves of a model that FSDP2 shards over two ranks, beside DCP's ways",
    "restart": "from kill -9 of a rank to a new step, beside torchrun and torch.load",
}


def arguments() -> argparse.Namespace:
    rows = "\n".join(f"  {name:9} {what}" for name, what in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Measures the harness beside everybody else, and says what holds of what is required."
        ),
        epilog=(
            f"rows:\n{rows}\n\n"
            "example: scripts/bench --size-mb 64 --repeats 1   "
            "# does it run? a few minutes; no numbers to quote"
        ),
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which to measure (all)")
    parser.add_argument(
        "--size-mb",
        type=int,
        default=1480,
        help="megabytes of state (1480: 124 M parameters and both moments)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns (7)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="where to put .json, .md and .png (runs/bench)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("runs/bench-scratch"),
        help="a folder on the disk to measure",
    )
    told = parser.parse_args()
    if unknown := set(told.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if told.size_mb < 16 or told.repeats < 1:
        parser.error("--size-mb is 16 at least, --repeats 1")
    return told


def main() -> int:
    told = arguments()
    told.scratch.mkdir(parents=True, exist_ok=True)
    told.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(told.size_mb, told.repeats, told.scratch.absolute())
    ran_on, settings = (
        machine.describe(bench.scratch),
        {"size_mb": told.size_mb, "repeats": told.repeats},
    )
    found: list[Finding] = []
    for name in [row for row in ROWS if row in told.rows] or list(ROWS):
        bench.row = name
        bench.say(f"{name}: {ROWS[name]}")
        try:
            found += importlib.import_module(f"benchmark.{name}").measure(bench)
        except (SampleError, KeyError) as error:
            bench.missing[name] = f"{type(error).__name__}: {error}"
            bench.say(f"{name}: failed: {error}")
        _keep(told.out, found, ran_on, bench, settings)
    shutil.rmtree(bench.scratch)
    print(report.whole(found, ran_on, bench.missing, settings, markdown=False))
    print(
        f"all samples: {told.out}.json; the same as a page: {told.out}.md; drawn: {told.out}.png",
        file=sys.stderr,
    )
    return int(any(name in ROWS or name.endswith(f": {HARNESS}") for name in bench.missing))


def _keep(
    out: Path, found: list[Finding], ran_on: dict[str, str], bench: Bench, settings: dict[str, int]
) -> None:
    """Write the files anew after each row, so that an end by force loses one row only."""
    values = {
        "settings": settings,
        "machine": ran_on,
        "missing": bench.missing,
        "findings": [finding.as_json() for finding in found],
    }
    Path(f"{out}.json").write_text(json.dumps(values | {"samples": bench.raw}, indent=1) + "\n")
    Path(f"{out}.md").write_text(
        report.whole(found, ran_on, bench.missing, settings, markdown=True)
    )
    draw(found, ran_on, settings, Path(f"{out}.png"))


if __name__ == "__main__":
    sys.exit(main())
