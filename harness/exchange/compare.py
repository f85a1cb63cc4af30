"""Compare two files tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import harness.config.changes as config_changes
import harness.state.lr_schedules as lr_schedules
import harness.state.parameter_names as parameter_names
from harness.config.changes import Change
from harness.data.quantized import scale_of
from harness.errors import HarnessError, printable
from harness.exchange import files, rebuild, recognise
from harness.exchange.files import Loaded
from harness.text import table

_ABSENT = "absent"


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield every leaf that differs between two nested structures.

    Tensors are compared bit for bit; meta tensors only by shape, dtype and layout. Two NaN numbers
    are equal.

    Args:
        a: First structure of mappings, lists, tuples and leaves.
        b: Second structure.
        where: Path that leads to `a` and `b`, such as `data.epoch` or `rng[0]`.

    Yields:
        Path, text for A, text for B, and the greatest difference ("-" where it has no meaning).
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(
                a.get(key, _ABSENT), b.get(key, _ABSENT), f"{where}.{key}" if where else str(key)
            )
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for at, (first, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(first, other, f"{where}[{at}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (
            a.shape != b.shape
            or a.dtype != b.dtype
            or a.layout != b.layout
            or a.is_meta != b.is_meta
        ):
            yield where, _word(a), _word(b), "-"
        elif not a.is_meta and not (torch.equal(_bits(a), _bits(b)) and scale_of(a) == scale_of(b)):
            wide = torch.complex128 if a.is_complex() else torch.float64
            gap = (_dense(a).to(wide) - _dense(b).to(wide)).abs()
            yield (
                where,
                _word(a),
                _word(b),
                f"{gap.max().item():.3g} ({int((gap != 0).sum())} of {gap.numel()})",
            )
    elif type(a) is not type(b) or (a != b and not (a != a and b != b)):
        yield (
            where,
            _word(a),
            _word(b),
            f"{abs(a - b):.3g}" if isinstance(a, float) and isinstance(b, float) else "-",
        )


def check_equal(path: Path, wanted: Any, actual: Any) -> None:
    """Check that a file reads back as it was written.

    Raises:
        HarnessError: The two structures differ.
    """
    if wrong := list(differences(wanted, actual)):
        raise HarnessError(
            f"{path} does not read back as it was written",
            f"found: {wrong[0][0]} differs",
            "Is the disk sound?",
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that NaN equals itself and 0.0 does not equal -0.0."""
    plain = (
        tensor.int_repr() if tensor.is_quantized else _dense(tensor).resolve_conj().resolve_neg()
    )
    return plain.detach().contiguous().reshape(-1).view(torch.uint8)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _word(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{'x'.join(map(str, value.shape))}]"
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


@dataclass(frozen=True)
class Comparison:
    """The differences of two files: settings, and rows (path, A, B, greatest difference)."""

    settings: list[Change]
    rows: list[tuple[str, str, str, str]]
    empty: tuple[str, ...] = ()  # objects whose state_dict() was empty in both files

    @property
    def count(self) -> int:
        """Return the number of differences that count.

        A setting that cannot change the model does not count. Neither does the stored position of
        a data iterator, because equal positions can be stored in different forms.
        """
        return sum(not _is_spelling(row) for row in self.rows) + sum(
            not change.is_free for change in self.settings
        )

    def __str__(self) -> str:
        lines = [
            f"setting  {change}" + ("  (does not count)" if change.is_free else "")
            for change in self.settings
        ]
        shown = [
            (*row[:3], f"{row[3]} (does not count)" if _is_spelling(row) else row[3])
            for row in self.rows
        ]
        lines += [table(("where", "A", "B", "greatest difference"), shown)] if shown else []
        lines += [
            f"nothing is known of {name}: its state_dict() was empty, in both"
            for name in self.empty
        ]
        return printable(
            "\n".join(
                [*lines, f"{self.count} difference(s)" if self.count else "equal, bit for bit"]
            )
        )


def _is_spelling(row: tuple[str, str, str, str]) -> bool:
    return row[0].startswith("data.iterators")


def compare(a: str | Path, b: str | Path, *, weights_only: bool = False) -> Comparison:
    """Compare two runs, checkpoints or files of any kind.

    Two checkpoints of this harness are compared completely. For other files, only the recognised
    parts are compared, under the names that this harness gives them.

    Args:
        a: Path or URL of the first run, checkpoint or file.
        b: Path or URL of the second one.
        weights_only: Compare only the state of the modules.

    Returns:
        The comparison; its `count` is 0 if the two are equal bit for bit.

    Raises:
        UsageError: A path leads to no file, or a file cannot be used.
        DamagedError: A file is damaged or cut short.
        StorageError: A store cannot be read.
    """
    both = [files.read_any(path) for path in (a, b)]
    if all(loaded.manifest for loaded in both) and not weights_only:
        settings = config_changes.changes(both[0].value.pop("config"), both[1].value.pop("config"))
        return Comparison(
            settings, list(differences(*_by_name(both[0].value, both[1].value))), _empty(*both)
        )
    first, other = (_named(loaded, weights_only) for loaded in both)
    return Comparison([], list(differences(first, other)))


def _empty(a: Loaded, b: Loaded) -> tuple[str, ...]:
    keys = [
        key
        for key in a.value
        if str(key).endswith("_state_dict") and a.value[key] == {} == b.value.get(key)
    ]
    names = [key.removesuffix("_state_dict") for key in keys]
    classes = a.manifest.classes if a.manifest else {}
    # A disabled GradScaler has an empty state.
    return tuple(name for name in names if classes.get(name) != "GradScaler")


def _by_name(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Key optimizer state by parameter name where two checkpoints number parameters differently.

    Only optimizers whose parameter names are known in both checkpoints are converted.
    """
    recorded = [value.get("names", {}) for value in (a, b)]
    called = {
        name
        for names in recorded
        for groups in names.values()
        for group in groups
        for name in group
        if name
    }
    modules = {name.partition(".")[0] for name in called}
    full_names = [
        parameter_names.derived(value, modules, called) | names
        for value, names in zip((a, b), recorded, strict=True)
    ]
    made = [
        {key: item for key, item in value.items() if key not in ("names", "format_version")}
        for value in (a, b)
    ]
    for name in {**recorded[0], **recorded[1]}:
        mine, theirs = (names.get(name) for names in full_names)
        if mine != theirs and parameter_names.are_known(mine) and parameter_names.are_known(theirs):
            for value, names in zip(made, (mine, theirs), strict=True):
                value[f"{name}_state_dict"] = _renumbered(value[f"{name}_state_dict"], names)
                if len(parameter_names.numbered(value)) == 1:  # the schedulers are its own
                    order = sorted(range(len(names)), key=lambda at: sorted(names[at]))
                    value |= {
                        key: lr_schedules.regrouped(state, order)
                        for key, state in value.items()
                        if key != f"{name}_state_dict"
                        and key.endswith("_state_dict")
                        and isinstance(state, Mapping)
                        and "_last_lr" in state
                    }
    return made[0], made[1]


def _renumbered(state: Mapping[str, Any], names: Any) -> dict[str, Any]:
    groups = state["param_groups"]
    called = {
        n: name
        for group, own in zip(groups, names, strict=True)
        for n, name in zip(group["params"], own, strict=True)
    }
    renamed = [
        {**group, "params": sorted(called[number] for number in group["params"])}
        for group in groups
    ]
    bare = [{key: item for key, item in group.items() if key != "param_names"} for group in renamed]
    # A wrapper of an optimizer may keep several of them: "fast_state" and "slow_state", say.
    entries = {
        key: {called.get(number, number): entry for number, entry in value.items()}
        for key, value in state.items()
        if isinstance(value, Mapping)
    }
    return {
        **state,
        **entries,
        "param_groups": sorted(bare, key=lambda group: list(group["params"])),
    }


def _named(loaded: Loaded, weights_only: bool) -> dict[str, Any]:
    parts = list(rebuild.states(loaded).values()) if weights_only else recognise.recognise(loaded)
    if loaded.manifest:  # do not report entries that only a run has as missing elsewhere
        parts = [
            part
            for part in parts
            if part.kind not in (recognise.OTHER, recognise.NUMBER)
            or part.name in ("epoch", "step", "loss")
        ]
    modules = [part.name for part in parts if part.kind == recognise.MODULE]
    lone = modules[0] if len(modules) == 1 else None
    return {"model" if part.name == lone else part.name: part.value for part in parts}
