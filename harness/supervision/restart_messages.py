"""What is reported of an end and of recomputed steps, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.errors import (
    printable,
)

# Results of the comparison of recomputed steps with the original ones.
SAME = "equal"
DIFFERENT = "mismatch"
EXPECTED = "expected"
DATA, LOSS = "data", "loss"  # the kinds of the first difference

# Where to look for the cause, by the kind of the difference.
LOOK = {
    DATA: "other samples: an order, a sampler or a dataset that is another one after a restart",
    LOSS: "same samples: what is neither tracked nor one of the global generators (of Python, "
    "NumPy, torch), a logged number that carries something over from step to step, "
    "or sick hardware",
}


def describe_end(end: dict[str, Any]) -> str:
    """Describe an end record for people."""
    why = str(end.get("why", "unreadable end record"))
    if why == "stopped" and "error" in end:  # overtaken; noticed right after the claim
        return f"to be started again: {end['error']}"
    if why == "stopped" and "step" not in end:
        return "stopped before training began"
    if why == "stopped":
        saved = "saved" if end.get("saved") else "NOT saved"
        by = "/".join(end.get("signals", [])) or end.get("by", "request")
        return f"stopped by {by} at step {end.get('step')}, {saved}"
    return f"failed: {end.get('error')}" if why == "failed" else why


def describe_replays(records: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Describe the comparisons of recomputed steps of all attempts for people.

    Each attempt with a difference has an entry of its own, in the order of the numbers. The last
    entry is the total of the other attempts.

    `records` are the results of the comparisons, by attempt.
    """
    lines = [
        describe_replay(record)
        for _, record in sorted(records.items())
        if record.get("verdict") != SAME
    ]
    equal = [record for record in records.values() if record.get("verdict") == SAME]
    if not equal:
        return lines
    counts = ("recomputed", "compared", "of_losses", "of_samples")
    whole = {name: sum(_count(record, name) for record in equal) for name in counts}
    loosest = max(equal, key=lambda record: _tolerance(record) or 0.0)
    return [*lines, _describe_equal(dict(loosest) | whole)]


def describe_replay(record: Mapping[str, Any]) -> str:
    """Describe the comparison of one attempt's recomputed steps for people.

    The result is one line if the steps are equal or the difference was expected, else several.
    """
    fields = {name: printable(str(value))[:200] for name, value in record.items()}
    if record.get("verdict") == SAME:
        return _describe_equal(record)
    subject, name = (
        fields.get("what"),
        f" {fields['name']}" if fields.get("name", LOSS) != LOSS else "",
    )
    which = f"{subject}{name}" + (f" on rank {fields['rank']}" if record.get("rank") else "")
    hosts, devices = (_pair(record, names) for names in ("hosts", "devices"))
    places = [
        printable(f"{host}, {device}")[:200] for host, device in zip(hosts, devices, strict=True)
    ]
    lines = [
        f"was {fields.get('was')} in attempt {fields.get('before')} ({places[0]})",
        f"is {fields.get('now')} in attempt {fields.get('attempt')} ({places[-1]})",
    ]
    step = f"step {fields.get('step')}"
    if record.get("verdict") == EXPECTED:
        return (
            f"{step} is not what it was, and was expected to differ: "
            f"{_listed(record, 'expected')} ({which}: {', '.join(lines)})"
        )
    first = (
        f"MISMATCH: recomputed {step} is not what it was: {which}: "
        f"{'other' if subject == DATA else 'same'} samples"
    )
    suspects = _listed(record, "suspects")
    return "\n".join(
        [
            first,
            *(f"  {line}" for line in lines),
            f"  look at: {f'{suspects}; ' if suspects else ''}{LOOK.get(str(subject), '')}",
        ]
    )


def _describe_equal(record: Mapping[str, Any]) -> str:
    made, compared, of_losses, of_samples = (
        _count(record, name) for name in ("recomputed", "compared", "of_losses", "of_samples")
    )
    steps = f"{made} recomputed step{'s' * (made != 1)}"
    if not compared:
        return (
            f"{steps}, none compared: nothing is left of what they were "
            "(run.log(loss=…) in each step leaves something to compare)"
        )
    tolerance = _tolerance(record)
    equal = (
        f"all within {tolerance:g}, not exactly: {_listed(record, 'why')}"
        if tolerance
        else "all equal"
    )
    some = f", {compared} compared" if compared < made else ""
    if not of_losses:
        return f"{steps}{some}, {equal} (in their samples: there is no loss to compare)"
    if not of_samples:
        return f"{steps}{some}, {equal} (in their losses: the samples' numbers are not known)"
    if of_losses != of_samples:
        return f"{steps}, {equal} (the losses of {of_losses} and the samples of {of_samples} steps)"
    return f"{steps}{some}, {equal}"


def _count(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    return value if isinstance(value, int) else 0


def _tolerance(record: Mapping[str, Any]) -> float | None:
    value = record.get("tolerance")
    return value if isinstance(value, float) else None


def _pair(record: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values recorded for the earlier attempt and for this one; "?" if unknown."""
    values = record.get(name)
    return values if isinstance(values, list) and len(values) == 2 else ["?", "?"]


def _listed(record: Mapping[str, Any], name: str) -> str:
    values = record.get(name)
    return printable(", ".join(map(str, values)))[:1000] if isinstance(values, list) else ""
