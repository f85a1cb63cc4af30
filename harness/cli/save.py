"""Ask a running job to save a checkpoint now, through its store. It does so within seconds, and trains on.

example: harness save runs/a
"""

from __future__ import annotations

import argparse

from harness.cli.stop import ask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")


def run(given: argparse.Namespace) -> int:
    return ask(given.run, "save")
