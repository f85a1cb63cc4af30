"""Compare the settings of two attempts, and refuse changes that would alter the training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.names import RESOLVED, stored_under_todays_names
from harness.errors import UsageError

# Settings that may change between two attempts without changing the trained model.
FREE = (
    "run.",
    "data.num_workers",
    "data.check_stream",
    "checkpoint.",
    "store.",
    "log.",
    "resume.",
    "slurm.",
    "notify.",
    "train.epochs",
    "train.max_steps",
    "train.shard",
    "train.shard_size",
    "eval.batch_size",
    "init.",  # read once, before the first checkpoint
)


@dataclass(frozen=True)
class Change:
    """One setting that differs between two attempts."""

    name: str
    old: Any
    new: Any
    is_free: bool  # whether it may change without changing the trained model

    def __str__(self) -> str:
        if _is_equal(self.old, self.new):
            return f"{self.name}: {self.new!r} has another value than before"
        return f"{self.name}: {self.old!r} -> {self.new!r}"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return every setting that differs, sorted by name; `task.args` itself is left out."""
    was, now = stored_under_todays_names(old), stored_under_todays_names(new)
    names = sorted((was.keys() | now.keys()) - {"task.args"})
    digests, is_of_train = (old.get(RESOLVED), new.get(RESOLVED)), _is_of_train(new)
    return [
        Change(name, was.get(name), now.get(name), is_of_train and _may_change(name))
        for name in names
        if not _is_equal(was.get(name), now.get(name)) or _has_other_value(name, *digests)
    ]


def _has_other_value(name: str, old: Any, new: Any) -> bool:
    """Return whether an interpolation has another value than before, where both are known."""
    both = isinstance(old, dict) and isinstance(new, dict) and name in old and name in new
    return bool(both and old[name] != new[name])


def _is_equal(old: Any, new: Any) -> bool:
    """Return whether two values are equal; NaN is equal to NaN."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_is_equal(old[key], new[key]) for key in old)
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_is_equal, old, new))
    if hasattr(old, "shape") and hasattr(new, "shape"):  # tensors
        return bool(old.shape == new.shape and (old == new).all())
    return bool(old == new or (old != old and new != new))


def _is_of_train(settings: dict[str, Any]) -> bool:
    """Return whether these are settings as `train.py` stores them, not a program's own config."""
    return settings.keys() >= {"run", "task", "train", "data", "checkpoint"}


def _may_change(name: str) -> bool:
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in FREE)


def check_changes(
    old: dict[str, Any], new: dict[str, Any], accept: Sequence[str], override: Sequence[str]
) -> list[Change]:
    """Return the changes of the settings, if all of them are allowed.

    Settings of `resume` and `init` are not compared, since they concern only this start. In the
    config of a program with a loop of its own every name is its own: each change is refused.

    Args:
        old: Settings of the previous attempt.
        new: Settings of this attempt.
        accept: Value of `resume.accept`; "config" allows every change.
        override: Value of `resume.override`: names of settings that may change.

    Raises:
        UsageError: With every change that would alter the training trajectory and is not allowed.
    """
    of_this_start = ("resume.", "init.") if _is_of_train(new) else ()
    changed = [change for change in changes(old, new) if not change.name.startswith(of_this_start)]
    refused = (
        []
        if "config" in accept
        else [change for change in changed if not change.is_free and change.name not in override]
    )
    if refused:
        raise UsageError(
            "the configuration is not the one that this run was trained with so far:",
            "\n".join(f"  {change}" for change in refused),
            "Put the old values back, or take another run.dir. "
            "To insist: resume.accept=[config]; to apply a changed optimizer setting "
            "to the restored optimizer: "
            f"resume.override=[{','.join(change.name for change in refused)}].",
        )
    return changed
