"""Recognise the parts of a file that somebody else's script wrote, and look them up.

The parts are the state dicts of modules, optimizers, schedulers and gradient scalers, and numbers
such as the epoch.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from harness import state
from harness.errors import UsageError
from harness.exchange.files import Loaded
from harness.exchange.safe_unpickle import NotLoaded
from harness.tracking.payload import changed_in, spelled_out

MODULE = "module"
OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"
NUMBER = "number"
OTHER = "other"
# Keys that other people's scripts use for each name, in lower case.
NAMES = {
    "model": "state_dict model model_state model_state_dict model_dict model_weights net network "
    "weights params module",
    "optimizer": "optimizer optim opt optimizer_state optimizer_state_dict optimizer_states "
    "optim_state optim_dict "
    "optim_state_dict opt_state opt_state_dict",
    "scheduler": "scheduler lr_scheduler lr_schedulers scheduler_state scheduler_state_dict "
    "lr_scheduler_state_dict sched",
    "scaler": "scaler scaler_state scaler_state_dict grad_scaler amp_scaler",
    "ema": "ema ema_state ema_state_dict model_ema ema_model state_dict_ema ema_weights "
    "averaged_model",
    "epoch": "epoch epochs start_epoch current_epoch epoch_num epoch_idx",
    "step": "step steps global_step global_steps num_steps step_num iteration iterations iter "
    "iter_num iter_count n_iter num_updates",
    "loss": "loss train_loss val_loss best_loss",
}
CALLED = {word: name for name, spellings in NAMES.items() for word in spellings.split()}
COMPILED = re.compile(r"(^|\.)_orig_mod\.")
# The kind of optimizer that has a setting of a given name in its parameter groups; first match.
KINDS = (
    ("betas", "Adam, AdamW or one of their kind"),
    ("dampening", "SGD"),
    ("lambd", "ASGD"),
    ("alpha", "RMSprop"),
    ("lr_decay", "Adagrad"),
    ("rho", "Adadelta"),
    ("etas", "Rprop"),
    ("history_size", "LBFGS"),
    ("beta2_decay", "Adafactor"),
    ("ns_steps", "Muon"),
)


@dataclass(frozen=True)
class Part:
    """One entry of a file: its kind, its key in the file, its name in this harness, its value.

    `note` holds further facts: the kind of optimizer, the prefixes that were removed, what training
    changed of a module that is not in its state dict.
    """

    kind: str
    key: str
    name: str
    value: Any
    note: str = ""


def recognise(loaded: Loaded) -> list[Part]:
    """Return the parts of a file, in the order of the file.

    Raises:
        UsageError: The file is not a mapping, or it holds no module's state dict.
    """
    value, where = loaded.value, loaded.file.where
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{where} holds no state dict",
            f"found: {_strange(value)}",
            "Save model.state_dict(), or a dict that holds it.",
        )
    nested = any(
        is_state(item) or is_optimizer(item) or isinstance(item, nn.Module)
        for item in value.values()
    )
    if is_state(value) and not nested:
        return [Part(MODULE, "", "model", *_bare(value))]
    # A checkpoint of this harness. Its names hold no wrapper prefixes, except those of compiled
    # parts in older files.
    ours = value if is_ours(value) else None
    parts = []
    for key, item in value.items():
        several = key in ("optimizer_states", "lr_schedulers") and isinstance(item, list)
        for at, entry in enumerate(item) if several else [(0, item)]:
            part = _part(f"{key}[{at}]" if several else str(key), str(key), entry, ours)
            parts.append(
                part
                if at == 0
                else Part(part.kind, part.key, f"{part.name}{at}", part.value, part.note)
            )
    if not any(part.kind == MODULE for part in parts):
        present = ", ".join(f"{part.key} ({part.note or part.kind})" for part in parts[:8])
        raise UsageError(
            f"{where} holds no module's state dict",
            f"found: {present or 'nothing'}",
            "Save model.state_dict() with it.",
        )
    return _apart(parts)


def _apart(parts: list[Part]) -> list[Part]:
    """Call parts of one kind that would have the same name by their keys, so that none is taken.

    The part whose key is that name keeps it, and has a note on the others.
    """
    keys: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        keys.setdefault((part.kind, part.name), []).append(part.key)
    made = []
    for part in parts:
        alike = keys[part.kind, part.name]
        if part.kind in (MODULE, OPTIMIZER, SCHEDULER, SCALER) and len(alike) > 1:
            others = [key for key in alike if key != part.key]
            note = part.note
            if part.kind == MODULE and part.key == part.name:
                chosen = f"taken by its key {part.key!r}, and not {', '.join(others)}"
                note = "; ".join(filter(None, (note, chosen)))
            part = dataclasses.replace(part, name=part.key, note=note)
        made.append(part)
    return made


def _part(key: str, word: str, value: Any, ours: Mapping[str, Any] | None) -> Part:
    """Recognise one entry of a file; `ours` is the whole file if it is a checkpoint of a run."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if is_optimizer(value):
        return Part(OPTIMIZER, key, _called(word, "optimizer"), value, optimizer_kind(value))
    # A checkpoint of this harness also holds other dicts of tensors, such as gradients.
    if is_state(value) and (word.endswith("_state_dict") or ours is None):
        if ours is None:
            return Part(MODULE, key, _called(word, "model"), *_bare(value))
        name = word.removesuffix("_state_dict")
        bare = state.without_shells(None, value)
        return Part(MODULE, key, name, bare, spelled_out(changed_in(ours, name)))
    if isinstance(value, Mapping) and "last_epoch" in value:
        return Part(SCHEDULER, key, _called(word, "scheduler"), value)
    if isinstance(value, Mapping) and {"scale", "growth_factor"} <= set(value):
        return Part(SCALER, key, _called(word, "scaler"), value)
    if (
        isinstance(value, torch.Tensor)
        and value.numel() == 1
        and not value.is_meta
        and not isinstance(value, FakeTensor)
    ):
        value = value.item()
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Part(NUMBER, key, CALLED.get(word.lower(), word), value)
    return Part(OTHER, key, word, value, _strange(value))


def is_ours(value: Any) -> bool:
    """Return whether the content of a file is a checkpoint of a run of this harness."""
    return isinstance(value, Mapping) and "format_version" in value


def _called(word: str, kind: str) -> str:
    """Return the harness's name for a key of a file.

    `model_state_dict` becomes "model", `modelA_state_dict` becomes "modelA", `netG` stays "netG".
    """
    return (
        CALLED.get(word.lower())
        or re.sub(r"_(state_dict|state|dict|weights|params)$", "", word)
        or kind
    )


def is_state(value: Any) -> bool:
    """Return whether a value looks like a module's state dict: a mapping of names to tensors.

    Only entries whose name ends in `_extra_state` may hold something other than a tensor.
    """
    if not isinstance(value, Mapping) or not value:
        return False
    plain = [item for key, item in value.items() if not str(key).endswith("_extra_state")]
    return (
        bool(plain)
        and all(isinstance(item, torch.Tensor) for item in plain)
        and all(isinstance(key, str) for key in value)
    )


def is_optimizer(value: Any) -> bool:
    """Return whether a value looks like an optimizer's state dict."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("param_groups"), list)
        and isinstance(value.get("state"), Mapping)
    )


def optimizer_kind(state: Mapping[str, Any]) -> str:
    """Return the kind of optimizer of a state dict, inferred from the names of its settings."""
    settings = {name for group in state["param_groups"] for name in group}
    return next((kind for name, kind in KINDS if name in settings), "an optimizer")


def _bare(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return a state dict without the name prefixes of wrappers, and a note on what was removed.

    The wrappers are DataParallel, DDP, torch.compile and AveragedModel. A state dict without such
    prefixes, or with names that would then collide, is returned unchanged with an empty note.
    """
    bare = {name: name for name in state if name != "n_averaged"}
    stripped = []
    while True:
        if bare and all(name.startswith("module.") for name in bare.values()):
            stripped.append("module.")
        elif any(COMPILED.search(name) for name in bare.values()):
            stripped.append("_orig_mod.")
        else:
            break
        bare = {name: _without(stripped[-1], new) for name, new in bare.items()}
    if not stripped or len(set(bare.values())) < len(bare):
        return state, ""
    made = OrderedDict((new, state[name]) for name, new in bare.items())
    if hasattr(state, "_metadata"):  # the versions of the submodules
        versions = state._metadata
        for prefix in stripped:
            versions = OrderedDict(
                (_without(prefix, f"{name}.").removesuffix("."), version)
                for name, version in versions.items()
            )
        made._metadata = versions  # type: ignore[attr-defined]
    return made, f"without {' and '.join(map(repr, dict.fromkeys(stripped)))} before its names"


def without_prefixes(named: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return values by the names of tensors, without the prefixes that wrappers put before them."""
    return _bare(named)[0]


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix) if prefix == "module." else COMPILED.sub(r"\1", name)


def _strange(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return (
            f"a tensor of shape {'x'.join(map(str, value.shape))}"
            if value.dim()
            else "a tensor with one number"
        )
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(item, torch.Tensor) for item in value)
    ):
        return f"{len(value)} tensors without names, as of list(model.parameters())"
    if isinstance(value, NotLoaded):
        return str(value)
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return f"a {type(value).__name__}" + (
        f" of {len(value)}" if isinstance(value, list | tuple | Mapping) else ""
    )


def number_of(parts: list[Part], name: str) -> float | None:
    """Return the number with that key, else the first one of that name, or None."""
    return next((part.value for part in numbers_of(parts, name)), None)


def numbers_of(parts: list[Part], name: str) -> list[Part]:
    """Return the numbers of that name; only the one with exactly that key, if there is one."""
    alike = [part for part in parts if part.kind == NUMBER and part.name == name]
    return [part for part in alike if part.key == name] or alike


def called(parts: list[Part], kind: str, wanted: str) -> Part:
    """Return the part of a kind whose key or name is `wanted`.

    Raises:
        UsageError: The file has no part of this kind and name.
    """
    of_kind = [part for part in parts if part.kind == kind]
    matching = next((part for part in of_kind if wanted in (part.key, part.name)), None)
    if matching is None:
        raise UsageError(
            f"the file has no {kind} {wanted!r}",
            f"found: {', '.join(part.key for part in of_kind) or 'none'}",
        )
    return matching


def meant_for(parts: list[Part], kind: str, name: str, *, is_lone: bool) -> Part | None:
    """Return the part of a kind for an object of the task, or None if the file has no such part.

    Args:
        parts: The recognised parts of the file.
        kind: Kind of the object.
        name: Name of the object; the part of that name is meant for it.
        is_lone: The task has no other object of this kind, so it may take the file's only part.

    Raises:
        UsageError: The assignment is ambiguous.
    """
    of_kind = [part for part in parts if part.kind == kind]
    matching = [part for part in of_kind if part.name == name] or (
        of_kind if len(of_kind) == 1 and is_lone else []
    )
    if not matching and of_kind:
        raise UsageError(
            f"which {kind} of the file is {name!r} cannot be told",
            f"found: {', '.join(part.key for part in of_kind)}",
            f"Name it: --as {name}={of_kind[0].key}, or leave it out: --without {name}.",
        )
    return matching[0] if matching else None
