"""Show which tensors and settings of two checkpoints differ, and by how much.

A and B are runs (the newest checkpoint of each), checkpoints, or files that another program wrote.
Settings that cannot change the model (where the run is stored, how often it saves) are shown, but
do not count.

Exit code: 0 equal bit for bit · 1 different.

example: harness diff runs/a runs/b
example: harness diff runs/a model.safetensors --weights
"""

from __future__ import annotations

import argparse

from harness.errors import EXIT_FAILED
from harness.exchange.compare import compare
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness diff`."""
    parser.add_argument("a", metavar="A", help="run, checkpoint or file")
    parser.add_argument("b", metavar="B", help="run, checkpoint or file")
    parser.add_argument("--weights", action="store_true", help="compare the modules only")


def run(given: argparse.Namespace) -> int:
    """Print the differences; return 0 if there are none that count, else 1."""
    comparison = compare(given.a, given.b, weights_only=given.weights)
    say(str(comparison))
    return EXIT_FAILED if comparison.count else 0
