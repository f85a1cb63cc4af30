"""Show what is in a file: progress, settings, what was recognised, and the table of tensors, whose data is not read.

FILE is a run (its newest checkpoint), a checkpoint, or a file that somebody else's script wrote: of torch.save, also before 1.6,
safetensors, TorchScript, torch.export. Nothing in it is executed.

example: harness show runs/a
example: harness show s3://bucket/theirs/model.safetensors
"""

from __future__ import annotations

import argparse

from harness.exchange.describe import describe
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")


def run(given: argparse.Namespace) -> int:
    say(str(describe(given.file)))
    return 0
