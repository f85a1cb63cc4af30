"""Format the timeline of a run as text for a terminal."""

from __future__ import annotations

from statistics import median

from harness.report.timeline import WORDS, AttemptSpan, Timeline
from harness.supervision.restart_messages import replays_in_words
from harness.text import duration, table

BAR = 40  # characters


def headline(time: Timeline) -> str:
    """Return one line with the share of useful training, the interruptions and the lost steps."""
    again = sum(stretch.life.lost for stretch in time.stretches if stretch.how != "running")
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
    found = []
    if (between_s := time.between_interruptions_s) is not None:
        found.append(f"interrupted every {duration(between_s)} on average")
    if saves := time.saves:
        blocked, durable = (
            median(values)
            for values in ([s.blocked_s for s in saves], [s.durable_s for s in saves])
        )
        count = f"{len(saves)} save{'s' * (len(saves) != 1)}"
        found.append(
            f"{count}; one keeps training waiting for {blocked:.3g} s "
            f"and is safe after {durable:.3g} s (medians)"
        )
    return found + time.environment + replays_in_words(time.replays)


def rows(time: Timeline) -> list[tuple[str, str, str, str]]:
    """Return a row per category of time: name, duration, share of wall time, and a bar."""
    found = []
    for what, seconds in time.spent.items():
        share = seconds / time.wall_s if time.wall_s else 0.0
        long = duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
        found.append((WORDS.get(what, what), long, f"{share:.1%}", "█" * round(BAR * share)))
    return found


def interruption(stretch: AttemptSpan) -> tuple[str, ...]:
    """Return the `INTERRUPTION` row of an attempt that ended before the run did."""
    life = stretch.life
    after = duration(stretch.ended - stretch.began)
    return (
        str(life.attempt),
        after,
        f"{life.went_on_from}–{life.reached}",
        str(life.lost),
        stretch.why[:100],
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
            table(INTERRUPTION, [interruption(stretch) for stretch in time.interruptions]),
        ]
    return "\n".join(lines)
