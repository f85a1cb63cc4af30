"""Say which tensors and settings of two checkpoints differ, and by how much; exit 0 only if they are equal bit for bit.

A and B are runs (the newest of each), checkpoints, or files that somebody else's script wrote. Settings that cannot change the model
(where the run lies, how often it saves) are shown, but do not count.

example: harness diff runs/a runs/b
example: harness diff runs/a model.safetensors --weights
"""

from __future__ import annotations

import argparse

from harness.errors import EXIT_FAILED
from harness.exchange.compare import compare
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="run, checkpoint or file")
    parser.add_argument("b", metavar="B", help="run, checkpoint or file")
    parser.add_argument("--weights", action="store_true", help="compare the modules only")


def run(given: argparse.Namespace) -> int:
    found = compare(given.a, given.b, weights_only=given.weights)
    say(str(found))
    return EXIT_FAILED if found.count else 0
