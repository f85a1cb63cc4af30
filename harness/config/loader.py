"""Merge the settings: `key=value` overrides the YAML file, which overrides the defaults.

The module is imported on first use, so that a run that uses only the library does not wait for its
imports.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.defaults import defaults
from harness.config.names import ARGUMENTS, RESOLVED, TODAY, flatten, nested, renamed
from harness.config.schema import SPELLED, Config
from harness.config.table import settings as all_settings
from harness.errors import UsageError
from harness.store.urls import redacted
from harness.text import say


def read(file: str | None, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Read and check the settings; see `harness.config.load`."""
    problems: list[str] = []
    settings = _renamed(_file_settings(file, problems) + _line_settings(overrides, problems))
    merged = defaults()
    known = flatten(_plain(merged, resolve=False))
    for name, value, origin in settings:
        if _lacks(value):
            problems.append(f"{name} ({origin}): '???' stands for a value that is missing")
            continue
        if value is None and any(other.startswith(f"{name}.") for other in known):
            continue  # an empty section
        if name not in known and not name.startswith(ARGUMENTS):
            problems.append(f"{name}: unknown setting ({origin}){_nearest(name, list(known))}")
            continue
        try:
            trial = OmegaConf.merge(
                merged, OmegaConf.create(nested(SPELLED.get(name, name), value))
            )
            OmegaConf.to_container(trial, resolve=True)
            merged = trial  # type: ignore[assignment]
        # TypeError: a list is given in place of a section.
        except (OmegaConfBaseException, TypeError) as error:
            why = (
                "what it stands for is missing or of the wrong type"
                if "${" in str(value)
                else str(error).splitlines()[0]
            )
            # Print the unresolved value, since the resolved one may be secret.
            problems.append(f"{name}={value!r} ({origin}): {why}")
    written, values = (flatten(_plain(merged, resolve=resolve)) for resolve in (False, True))
    problems += _broken_rules(values, written)
    if merged.run.dir is None and merged.run.remote is None:
        problems.append("run.dir=None: a run needs a place; give run.dir, run.remote, or both")
    if problems:
        raise UsageError(
            f"the configuration has {len(problems)} problem(s):",
            "\n".join(f"  {line}" for line in problems),
            "Nothing was started.",
        )
    stored = _plain(merged, resolve=False)
    if digests := _of_interpolations(written, values):
        stored[RESOLVED] = digests
    return OmegaConf.to_object(merged), stored  # type: ignore[return-value]


def _of_interpolations(written: dict[str, Any], resolved: dict[str, Any]) -> dict[str, str]:
    """Return a digest of the value of each setting that is written as an interpolation."""
    return {
        name: hashlib.sha256(f"{name}={resolved.get(name)!r}".encode()).hexdigest()[:16]
        for name, value in written.items()
        if "${" in str(value)
    }


def names(file: str | None, overrides: list[str]) -> set[str]:
    """Return the names of the settings that have a value; see `harness.config.given`."""
    settings = _file_settings(file, []) + _line_settings(overrides, [])
    return {name for name, value, _ in settings if value is not None}


def _plain(settings: Any, *, resolve: bool) -> dict[str, Any]:
    """Return the settings as nested dicts, with `init.from` as users write it."""
    nested: Any = OmegaConf.to_container(settings, resolve=resolve)
    nested["init"]["from"] = nested["init"].pop("from_")
    return nested  # type: ignore[no-any-return]


def _file_settings(file: str | None, problems: list[str]) -> list[tuple[str, Any, str]]:
    """Return name, value and origin of each setting in the file; append errors to `problems`."""
    if file is None:
        return []
    try:
        text = Path(file).read_text(encoding="utf-8")  # once: it may be a pipe
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except FileNotFoundError:
        problems.append(f"--config {file}: no such file (relative to {Path.cwd()})")
        return []
    except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        problems.append(f"--config {file}: cannot be read as YAML: {' '.join(str(error).split())}")
        return []
    if not isinstance(content, dict):
        problems.append(
            f"--config {file}: expected names and values, found a {type(content).__name__}"
        )
        return []
    return _named(content, _unread(text), str(file))


def _line_settings(overrides: list[str], problems: list[str]) -> list[tuple[str, Any, str]]:
    """Return name, value and origin of each `key=value`; append errors to `problems`."""
    settings = []
    for text in overrides:
        name, equals, _ = text.partition("=")
        if not equals or not name:
            problems.append(f"{text!r}: expected key=value")
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            problems.append(f"{text!r}: cannot be read: {' '.join(str(error).split())}")
            continue
        settings += _named(parsed, nested(name, _unread(text.partition("=")[2])), "command line")
    return settings


def _named(parsed: Any, written: Any, origin: str) -> list[tuple[str, Any, str]]:
    """Return name, value and origin of each setting; of those that are text, as it is written.

    YAML reads `2024_10_01`, `0123` and `off` as numbers and as False. `written` has the same
    settings as `parsed` with every value as text.
    """
    texts = {of.name for of in all_settings() if of.kind in ("str", "str | None")}
    lists = {of.name for of in all_settings() if of.kind == "list[str]"}
    raw = flatten(written, whole_arguments=True) if isinstance(written, dict) else {}
    settings = []
    for name, value in flatten(parsed, whole_arguments=True).items():
        if name in texts:
            value = _text(value, raw.get(name))
        elif name in lists and isinstance(value, list) and isinstance(raw.get(name), list):
            value = [_text(item, text) for item, text in zip(value, raw[name], strict=True)]
        settings.append((name, value, origin))
    return settings


def _text(value: Any, written: Any) -> Any:
    return written if isinstance(value, int | float) and isinstance(written, str) else value


def _unread(text: str) -> Any:
    """Return what a YAML text holds with every value as text; None if it is not YAML."""
    with contextlib.suppress(yaml.YAMLError):
        return yaml.load(text, Loader=yaml.BaseLoader)


def _renamed(settings: list[tuple[str, Any, str]]) -> list[tuple[str, Any, str]]:
    """Return the settings under today's names, and print each earlier name once."""
    current = list(renamed((name, value) for name, value, _ in settings))
    for earlier in sorted({earlier for _, _, earlier in current if earlier}):
        say(f"harness: warning: {earlier} is an old name: see {TODAY[earlier]}", sys.stderr)
    return [
        (name, value, origin)
        for (name, value, _), (_, _, origin) in zip(current, settings, strict=True)
    ]


def _broken_rules(values: dict[str, Any], written: dict[str, Any]) -> list[str]:
    """Return a message for each setting that violates its rule; null violates none."""
    return [
        f"{of.name}={redacted(repr(written[of.name]))}: allowed is {of.allowed}"
        for of in all_settings()
        if of.rule and values.get(of.name) is not None and not of.rule.holds(values[of.name])
    ]


def _nearest(name: str, known: list[str]) -> str:
    """Return a suggestion for an unknown name: one with the same last part, else a similar one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    by_leaf = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    guess = by_leaf[:1] or close
    return f". Did you mean {guess[0]}?" if guess else ""


def _lacks(value: Any) -> bool:
    """Return whether a value is omegaconf's mark for a missing one, or holds it."""
    items = value.values() if isinstance(value, dict) else value
    return any(map(_lacks, items)) if isinstance(value, dict | list) else value == MISSING
