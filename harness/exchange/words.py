"""How what is in files is shown: tables, and quiet libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

from harness.errors import printable


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns, aligned to the left, without lines."""
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def number(value: float | None) -> str:
    """Five digits, or - for what was not measured."""
    return "-" if value is None else f"{value:.5g}"


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """While the block runs, what libraries log and warn of is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
