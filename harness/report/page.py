"""Format the timeline of a run as one self-contained HTML file; it loads nothing from outside."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from harness.report import chart, phrases
from harness.report.chart import Bar, Mark, Row, escaped
from harness.report.timeline import LABELS, LOST, WAITING, AttemptSpan, Timeline
from harness.text import duration

MOST_ROWS, MOST_TICKS = 40, 200
SIGNS = {
    "finished": "■",
    "stopped": "◆",
    "failed": "✖",
    "killed": "✖",
    "superseded": "✖",
    "running": "▶",
}
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    """content="default-src 'none'; style-src 'unsafe-inline'">"""
)
# A backslash at the end of a line joins it with the next one.
STYLE = """
:root { --ink: #1b1f24; --soft: #667079; --line: #dfe3e8; --paper: #ffffff;
  --training: #2f6fb4; --redone: #e08214; --lost: #c0392b; --waiting: #d5dae0; \
--startup: #9aa5b1; --restore: #7f6bb3;
  --data: #d9b310; --evaluation: #2a9d8f; --save: #4c9f50; \
--overhead: #b7a6c9; --other: #8a8f98; }
@media (prefers-color-scheme: dark) { \
:root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #333a42; --paper: #15181c; --waiting: #3a4149; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); \
max-width: 1060px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.3em; margin: 0; word-break: break-all; } \
h2 { font-size: 1.05em; margin: 2.2em 0 .6em; }
.big { font-size: 2.6em; font-weight: 650; letter-spacing: -.02em; margin: .3em 0 0; } \
.soft { color: var(--soft); margin: .2em 0; }
svg { width: 100%; height: auto; display: block; } \
text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.tick, .note { fill: var(--soft); } .inside { fill: #fff; font-weight: 600; }
.in-waiting { fill: var(--ink); } .grid { stroke: var(--line); } .sign { font-size: 15px; }
.saved { stroke: #fff; stroke-width: 1.5; } .finished { fill: var(--save); } \
.stopped { fill: var(--redone); }
.failed, .killed, .superseded { fill: var(--lost); } .running { fill: var(--training); }
.curve { fill: none; stroke: var(--training); stroke-width: 1.6; }
.resume { stroke: var(--redone); stroke-dasharray: 4 3; stroke-width: 1.3; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25em .8em .25em 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
""" + "\n".join(
    f"rect.{category} {{ fill: var(--{category}); }} "
    f".key.{category} {{ background: var(--{category}); }}"
    for category in LABELS
)


@dataclass(frozen=True)
class Table:
    """An additional section of the page: a title, lines of text, and a table."""

    title: str
    lines: Sequence[str]
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def page(name: str, time: Timeline, more: Table | None = None) -> str:
    """Return the whole HTML file as text.

    Args:
        name: Name of the run, for the title.
        time: Timeline of the run.
        more: An additional section, after the headline and the facts.
    """
    facts = "".join(f'<p class="soft">{escaped(fact)}</p>' for fact in phrases.facts(time))
    began = datetime.datetime.fromtimestamp(time.began, datetime.timezone.utc)
    stands = f"{time.stands.state} ({' '.join(time.stands.why.split())})"
    sections = [
        f"<h1>{escaped(name)}</h1>",
        f'<p class="soft">{escaped(stands)}; began {began:%Y-%m-%d %H:%M} UTC</p>',
        f'<p class="big">{time.useful:.1%} useful</p>'
        f'<p class="soft">{escaped(phrases.headline(time))}</p>{facts}',
        _section(
            more.title,
            "".join(f'<p class="soft">{escaped(line)}</p>' for line in more.lines)
            + _table(more.header, more.rows),
        )
        if more
        else "",
        _section("What the time went to", _shares(time)),
        _section("Attempts", _attempts(time)),
        _section("Loss", _loss(time)),
        _section(
            "Interruptions",
            _table(
                phrases.INTERRUPTION,
                [phrases.interruption(span) for span in time.interruptions],
            ),
        ),
    ]
    head = f'<meta charset="utf-8">{POLICY}<meta name="viewport" content="width=device-width">'
    head += f"<title>{escaped(name)}</title><style>{STYLE}</style>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        f"{chr(10).join(filter(None, sections))}\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}" if body else ""


def _shares(time: Timeline) -> str:
    parts = [
        (category, seconds, f"{LABELS.get(category, category)}: {duration(seconds)}")
        for category, seconds in time.spent.items()
    ]
    keys = list(time.spent)
    rows = [
        (f'<span class="key {escaped(category)}"></span>{escaped(label)}', long, share)
        for category, (label, long, share, _) in zip(keys, phrases.rows(time), strict=True)
    ]
    cells = "".join(
        f"<tr><td>{label}</td><td>{long}</td><td>{share}</td></tr>" for label, long, share in rows
    )
    return f'{chart.shares(parts)}<table style="margin-top:1em;max-width:30em">{cells}</table>'


def _attempts(time: Timeline) -> str:
    shown = time.stretches[-MOST_ROWS:]
    note = (
        f'<p class="soft">the last {MOST_ROWS} of {len(time.stretches)}</p>'
        if len(shown) < len(time.stretches)
        else ""
    )
    legend = (
        "white ticks: saves · ■ finished · ◆ stopped, saved · ✖ killed, failed or superseded"
        " · ▶ running"
    )
    return (
        f"{note}{chart.timeline([_row(span, time) for span in shown], time.wall_s)}"
        f'<p class="soft">{legend}</p>'
        if shown
        else ""
    )


def _row(span: AttemptSpan, time: Timeline) -> Row:
    """Return the row of an attempt in the timeline.

    The bars are drawn in the order of start-up, restoring, recomputed steps, training, and the time
    cut off by a kill. The training bar includes all other categories; its tooltip lists them.
    """
    began, ended = span.began - time.began, span.ended - time.began
    bars, at = [], began
    for category in ("startup", "restore", "redone"):
        if seconds := span.spent.get(category, 0.0):
            bars.append(Bar(at, at + seconds, category, f"{LABELS[category]}: {duration(seconds)}"))
            at += seconds
    cut = span.spent.get(LOST, 0.0)
    rest = ", ".join(
        f"{LABELS.get(category, category)} {duration(seconds)}"
        for category, seconds in span.spent.items()
        if category not in ("startup", "restore", "redone", LOST, WAITING)
    )
    bars.append(Bar(at, ended - cut, "training", rest))
    if cut:
        bars.append(Bar(ended - cut, ended, LOST, f"{LABELS[LOST]}: {duration(cut)}"))
    saves = span.saves[:: -(-len(span.saves) // MOST_TICKS) or 1]
    marks = [
        Mark(save.at - time.began, "saved", "", f"step {save.step} saved in {save.durable_s:.2g} s")
        for save in saves
    ]
    marks.append(Mark(ended, span.how, SIGNS.get(span.how, "✖"), span.why))
    lost = f", {span.life.lost} lost" if span.is_interrupted and span.life.lost else ""
    return Row(
        f"#{span.life.attempt}",
        bars,
        marks,
        f"steps {span.life.went_on_from}–{span.life.reached}{lost}",
    )


def _loss(time: Timeline) -> str:
    """Draw the loss curve, with a mark at each step that a later attempt resumes from.

    A step that was recomputed has the loss of the last attempt that made it.
    """
    last: dict[int, float] = {}
    for span in time.stretches:
        last |= dict(span.losses)
    marks = [
        (
            float(span.life.went_on_from),
            f"attempt {span.life.attempt} resumes from step {span.life.went_on_from}",
        )
        for span in time.stretches[1:]
    ]
    drawn = chart.curve(
        [(float(step), loss) for step, loss in sorted(last.items())], marks, "loss", "steps"
    )
    return drawn and f'{drawn}<p class="soft">dashed: where an attempt went on</p>'


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escaped(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
