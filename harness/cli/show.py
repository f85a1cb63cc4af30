"""Show what is in a file: progress, settings, recognised parts, and the table of tensors.

The data of the tensors is not read where the format allows that. FILE is a run (its newest
checkpoint), a checkpoint, or a file that another program wrote with torch.save (also before 1.6),
safetensors, TorchScript or torch.export. Nothing in it is executed.

example: harness show runs/a
example: harness show s3://bucket/theirs/model.safetensors
"""

from __future__ import annotations

import argparse

from harness.exchange.describe import describe
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness show`."""
    parser.add_argument("file", metavar="FILE")


def run(given: argparse.Namespace) -> int:
    """Print the description of the file and return 0.

    Raises UsageError, DamagedError, StorageError.
    """
    say(str(describe(given.file)))
    return 0
