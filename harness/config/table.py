"""List all settings, for the help text and for `configs/README.md`, made by `scripts/settings`."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from harness.config.rules import Rule, default_of
from harness.config.schema import SPELLED, Config

NAMES = {attribute: name for name, attribute in SPELLED.items()}


class Setting(NamedTuple):
    """One setting, as `schema.py` defines it."""

    name: str  # as users write it: "checkpoint.every_s"
    default: Any
    may_be_null: bool
    meaning: str
    rule: Rule | None
    argument: str  # of `harness.init`, `Run.batches` or `Run.steps`; "" if it is none

    @property
    def allowed(self) -> str:
        """The allowed values in words, "" if all of the type are."""
        allowed = self.rule.allowed if self.rule else ""
        return f"{allowed}, or null" if allowed and self.may_be_null else allowed


def _class_of(section: dataclasses.Field[Any]) -> Any:
    """Return the dataclass of a section of `Config`."""
    return section.default_factory


@cache
def settings() -> tuple[Setting, ...]:
    """Return all settings, in the order of the schema."""
    return tuple(_settings())


def _settings() -> Iterator[Setting]:
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(_class_of(section)):
            name, rule = f"{section.name}.{field.name}", field.metadata["rule"]
            yield Setting(
                NAMES.get(name, name),
                default_of(field),
                "None" in str(field.type) or bool(rule and rule.may_be_null),
                field.metadata["meaning"],
                rule,
                field.metadata["argument"],
            )


def arguments(config: Config, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the settings that a function takes, by the names of its arguments."""
    names = inspect.signature(function).parameters
    return {
        of.argument: getattr(getattr(config, section), field)
        for of in settings()
        if of.argument in names
        for section, _, field in [of.name.partition(".")]
    }


def written(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def help_text() -> str:
    """Return the name, the default and the meaning of each setting, for `--help`."""
    lines = ["settings, with their defaults:"]
    for of in settings():
        lines.append(f"  {of.name}={written(of.default)}")
        lines += textwrap.wrap(of.meaning, 90, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def markdown() -> str:
    """Return `configs/README.md`."""
    sections = {field.name: _class_of(field) for field in dataclasses.fields(Config)}
    lines = [HEAD]
    section = ""
    for of in settings():
        if (begins := of.name.partition(".")[0]) != section:
            section = begins
            about = (sections[section].__doc__ or "").partition("\n")[0]
            lines += [
                f"\n## `{section}`\n",
                about,
                "",
                "| setting | in Python | default | meaning | allowed |",
            ]
            lines.append("|---|---|---|---|---|")
        argument = f"`{of.argument}=`" if of.argument else ""
        default = f"`{written(of.default)}`"
        cells = (f"`{of.name}`", argument, default, of.meaning, of.allowed)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


HEAD = """\
# Settings

The YAML files of this folder are whole configurations: `digits.yaml` (the default task),
`bytes.yaml` (a small GPT) and `gan.yaml` (two networks, two optimizers). A `key=value` on the
command line overrides the file, which overrides the defaults:

```sh
harness launch --nproc-per-node 2 --config configs/digits.yaml run.dir=runs/a train.epochs=10
```

Every problem is named at once, with what is allowed and the nearest known name, before anything
starts (exit code 78). A setting that would change the model is refused when it differs from that of
the checkpoint; `resume.accept=[config]` insists. Names that end in `_s` are seconds. A value
`${oc.env:NAME}` is taken from the environment, and stored unresolved. "In Python" is the argument
of `harness.init`, `run.batches` or `run.steps` that means the same.

This page is made from `harness/config/schema.py` by `scripts/settings`."""
