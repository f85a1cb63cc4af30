"""Format the timeline of a run as text for a terminal."""

from __future__ import annotations

from statistics import median

from harness.report.timeline import LABELS, AttemptSpan, Timeline
from harness.supervision.restart_messages import describe_replays
from harness.text import duration, table

BAR = 40  # characters


def headline(time: Timeline) -> str:
    """Return one line with the share of useful training, the interruptions and the lost steps."""
    again = sum(span.life.lost for span in time.stretches if span.how != "running")
    count = len(time.interruptions)
    parts = [f"{time.useful:.1%} of {duration(time.wall_s)} was useful training"]
    parts.append({0: "never interrupted", 1: "1 interruption"}.get(count, f"{count} interruptions"))
    if count:
        parts.append(
            {0: "no step recomputed", 1: "1 step recomputed"}.get(
                again, f"{again} steps recomputed"
            )
        )
    return ", ".join(parts)


def facts(time: Timeline) -> list[str]:
    """Return lines with further facts about the run, as far as they are known.

    They are the mean time between interruptions, the cost of a save, the attempts on other hardware
    or software, and whether recomputed steps gave the same result as before.
    """
    lines = []
    if (between_s := time.between_interruptions_s) is not None:
        lines.append(f"interrupted every {duration(between_s)} on average")
    if saves := time.saves:
        blocked, durable = (
            median(values)
            for values in ([s.blocked_s for s in saves], [s.durable_s for s in saves])
        )
        count = f"{len(saves)} save{'s' * (len(saves) != 1)}"
        lines.append(
            f"{count}; one keeps training waiting for {blocked:.3g} s "
            f"and is safe after {durable:.3g} s (medians)"
        )
    return lines + time.environment + describe_replays(time.replays)


def rows(time: Timeline) -> list[tuple[str, str, str, str]]:
    """Return a row per category of time: name, duration, share of wall time, and a bar."""
    cells = []
    for category, seconds in time.spent.items():
        share = seconds / time.wall_s if time.wall_s else 0.0
        long = duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
        cells.append(
            (LABELS.get(category, category), long, f"{share:.1%}", "█" * round(BAR * share))
        )
    return cells


def interruption(span: AttemptSpan) -> tuple[str, ...]:
    """Return the `INTERRUPTION` row of an attempt that ended before the run did."""
    attempt = span.life
    after = duration(span.ended - span.began)
    return (
        str(attempt.attempt),
        after,
        f"{attempt.went_on_from}–{attempt.reached}",
        str(attempt.lost),
        span.why[:100],
    )


INTERRUPTION = ("attempt", "ran for", "steps", "lost", "how it ended")


def text(name: str, time: Timeline) -> str:
    """Return the whole report as text."""
    lines = [
        f"{name}: {time.stands.state} ({' '.join(time.stands.why.split())})",
        headline(time),
        *facts(time),
        "",
    ]
    lines.append(table(("spent on", "", "share", ""), rows(time)))
    if time.interruptions:
        lines += [
            "",
            table(INTERRUPTION, [interruption(span) for span in time.interruptions]),
        ]
    return "\n".join(lines)
