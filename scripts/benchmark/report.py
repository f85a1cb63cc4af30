"""The tables: what is required and what was measured, who saves how, all other quantities, and
where somebody else is ahead."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark import saves
from benchmark.findings import HARNESS, Finding, figure, shown, wins

Table = list[list[str]]
SAVE_COLUMNS = {
    "training blocked by a save": "blocked, copies",
    "durable throughput": "durable, MiB/s",
    "durable throughput over the disk's": "of the disk's",
    "CPU time of a save": "CPU, s",
    "extra memory of a save": "extra memory, x state",
}


def required(findings: Sequence[Finding]) -> Table:
    rows = [["what", "required", "measured", "all samples", "holds"]]
    for found in findings:
        if found.holds is not None:
            limit = (
                f"<= {figure(found.most)}"
                if found.most is not None
                else f">= {figure(found.least or 0)}"
            )
            what = (
                found.what
                + (f" ({found.note})" if found.note else "")
                + (f": {found.who}" if found.who != HARNESS else "")
            )
            spread = (
                f"{figure(min(found.samples))} to {figure(max(found.samples))}, "
                f"n={len(found.samples)}"
            )
            rows.append([what, limit, shown(found), spread, "yes" if found.holds else "NO"])
    return rows


def savers(findings: Sequence[Finding]) -> Table:
    """Who saves how, one line each; the harness's blocked time is that of the training that goes
    on."""
    by = {
        (found.who, found.what): found for found in findings if found.row in (saves.ROW, "blocked")
    }
    names = dict.fromkeys(found.who for found in findings if found.row == saves.ROW)
    rows = [["who", *SAVE_COLUMNS.values()]]
    for who in names:
        cells = [by.get((who, what)) for what in SAVE_COLUMNS]
        rows.append([who, *(figure(cell.median) if cell else "" for cell in cells)])
    return rows


def others(findings: Sequence[Finding]) -> Table:
    rows = [["row", "what", "who", "median", "all samples"]]
    for found in findings:
        if found.row != saves.ROW and found.holds is None:
            note = f" ({found.note})" if found.note else ""
            spread = (
                f"{figure(min(found.samples))} to {figure(max(found.samples))}, "
                f"n={len(found.samples)}"
            )
            rows.append([found.row, found.what, found.who, shown(found) + note, spread])
    return rows


def text(rows: Table, markdown: bool) -> str:
    """A table for a terminal or for a page; nothing, if there is only its heading."""
    if len(rows) == 1:
        return ""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def whole(
    findings: Sequence[Finding],
    machine: dict[str, str],
    missing: dict[str, str],
    settings: dict[str, int],
    markdown: bool,
) -> str:
    """The report on one run of the benchmark."""
    ran_with = settings | machine
    sections = {
        "Required, and measured (medians)": text(required(findings), markdown),
        "Who saves how (medians)": text(savers(findings), markdown),
        "Everything else": text(others(findings), markdown),
        "Where somebody is ahead of the harness": _listed(wins(findings)) or "- nowhere",
        "Not measured": _listed([f"{who}: {why}" for who, why in missing.items()])
        or "- nothing is missing",
        "Measured with": _listed([f"{name}: {value}" for name, value in ran_with.items()]),
    }
    mark = "## " if markdown else ""
    return (
        "\n\n\n".join(f"{mark}{title}\n\n{body}" for title, body in sections.items() if body) + "\n"
    )


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
