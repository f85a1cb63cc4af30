"""The picture: every requirement as a share of what is allowed, and how the savers compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark import saves
from benchmark.findings import HARNESS, Finding, figure, shown
from benchmark.report import SAVE_COLUMNS

OURS, OVER, OTHER, LINE = "#1f77b4", "#d95f02", "#b0b0b0", "#333333"
WIDEST = 3.0  # times the limit; what is more is cut off, and its bar says so


def draw(
    findings: Sequence[Finding], machine: dict[str, str], settings: dict[str, int], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [found for found in findings if found.holds is not None]
    names = list(dict.fromkeys(found.who for found in findings if found.row == saves.ROW))
    heights = [0.36 * len(held) + 1.0, 0.3 * len(names) + 1.0 if names else 0.01]
    figure_ = pyplot.figure(figsize=(14, sum(heights) + 1.4), layout="constrained")
    parts: Any = figure_.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    _limits(upper.subplots(), held)
    if names:
        _savers(lower.subplots(1, len(SAVE_COLUMNS), sharey=True), findings, names)
    turns, size_mb = settings["repeats"], settings["size_mb"]
    figure_.suptitle(
        f"{size_mb} MB of state, medians of at least {turns} samples; "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['file system'].split()[0]}, torch {machine['torch']}, {machine['date']}",
        fontsize=10,
    )
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def _limits(axes: Any, held: Sequence[Finding]) -> None:
    for at, found in enumerate(reversed(held)):
        share = found.share_of_limit
        axes.barh(at, min(share, WIDEST), color=OURS if found.holds else OVER, height=0.7)
        limit = (
            f"at most {figure(found.most)}"
            if found.most is not None
            else f"at least {figure(found.least or 0)}"
        )
        text = f"{shown(found)}  ({limit}){'  … cut off' if share > WIDEST else ''}"
        if share > 0.8 * WIDEST:
            axes.text(
                min(share, WIDEST) - 0.02,
                at,
                text,
                va="center",
                ha="right",
                fontsize=8,
                color="white",
            )
        else:
            axes.text(share + 0.02, at, text, va="center", fontsize=8)
    axes.set_yticks(range(len(held)), [_label(found) for found in reversed(held)], fontsize=8)
    axes.axvline(1.0, color=LINE, linewidth=1.2)
    axes.set_xlim(0, WIDEST)
    axes.set_xlabel(
        "measured, as a share of what is allowed; left of the line it holds, blue", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)


def _label(found: Finding) -> str:
    return found.what + (f": {found.who}" if found.who != HARNESS else "")


def _savers(axes: Any, findings: Sequence[Finding], names: Sequence[str]) -> None:
    by = {
        (found.who, found.what): found for found in findings if found.row in (saves.ROW, "blocked")
    }
    for axis, (what, title) in zip(axes, SAVE_COLUMNS.items(), strict=True):
        for at, who in enumerate(reversed(names)):
            found = by.get((who, what))
            if found is not None:
                axis.barh(at, found.median, color=OURS if who == HARNESS else OTHER, height=0.7)
                axis.text(found.median, at, f" {figure(found.median)}", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.set_title(
            f"{title} ({'more' if what.startswith('durable') else 'less'} is better)", fontsize=8
        )
        axis.margins(x=0.18)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
