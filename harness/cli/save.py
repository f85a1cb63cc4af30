"""Ask a running job to save a checkpoint now, through its store.

It saves within seconds and continues to train.

example: harness save runs/a
"""

from __future__ import annotations

import argparse

from harness.cli.stop import ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness save`."""
    parser.add_argument("run", metavar="RUN")


def run(given: argparse.Namespace) -> int:
    """Leave the request and return 0. Raises UsageError, StorageError."""
    return ask(given.run, "save")
