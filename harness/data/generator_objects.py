"""Random generator objects of torch, NumPy and Python, and their state as plain data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from harness.errors import UsageError

GLOBAL_GENERATORS = (random._inst, np.random.mtrand._rand, torch.default_generator)
KINDS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
NUMPYS: dict[str, Any] = {
    f"numpy.random.{kind.__name__}": kind
    for kind in (np.random.Generator, np.random.RandomState, np.random.BitGenerator)
}


def is_generator(obj: object) -> bool:
    """Return whether an object is a generator whose state can be saved.

    `random.SystemRandom` draws from the operating system and has no state.
    """
    return issubclass(type(obj), KINDS) and not issubclass(type(obj), random.SystemRandom)


def drawn_from(generator: Any) -> str:
    """Return a fingerprint of a generator's state, which changes with each draw or spawn."""
    if isinstance(generator, torch.Generator):
        return str(hash(generator.get_state().numpy().tobytes()))
    if isinstance(generator, random.Random):
        return str(hash(generator.getstate()))
    if isinstance(generator, np.random.RandomState):
        return str(_hashed(generator.get_state(legacy=False)))
    bits = generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
    return str((_hashed(bits.state), _spawned(bits)))


def _hashed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hashed(item) for key, item in value.items()}
    return hash(value.tobytes()) if isinstance(value, np.ndarray) else value


def generator_state(generator: Any) -> dict[str, Any]:
    """Return the kind of a generator and its state, as plain data."""
    if isinstance(generator, torch.Generator):
        return {
            "kind": f"torch.Generator ({generator.device.type})",
            "state": generator.get_state(),
        }
    if isinstance(generator, random.Random):
        version, internal_state, gauss = generator.getstate()
        return {
            "kind": "random.Random",
            "version": version,
            "words": torch.tensor(internal_state, dtype=torch.int64, device="cpu"),
            "gauss": gauss,
        }
    if isinstance(generator, np.random.RandomState):
        state: Any = generator.get_state(legacy=False)
        return {
            "kind": f"numpy.random.RandomState ({state['bit_generator']})",
            "state": _plain(state),
        }
    bits = generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
    return {
        "kind": f"numpy.random.{'BitGenerator' if bits is generator else 'Generator'}"
        f" ({type(bits).__name__})",
        "state": _plain(bits.state),
        "spawned": _spawned(bits),
    }


def generator_of(state: Any) -> Any:
    """Return a new generator of the kind that a saved state is of; its own state is not set yet.

    Returns None if it is not the state of a generator, or of one on a device that is not there.
    """
    kind = str(state.get("kind")) if isinstance(state, Mapping) else ""
    word, _, inner = kind.removesuffix(")").partition(" (")
    if kind == "random.Random":
        return random.Random()
    if word == "torch.Generator" and inner in _devices():
        return torch.Generator(inner)
    if inner not in BIT_GENERATORS or word not in NUMPYS:
        return None
    bits = getattr(np.random, inner)()
    return bits if NUMPYS[word] is np.random.BitGenerator else NUMPYS[word](bits)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def set_generator_state(name: str, generator: Any, state: Mapping[str, Any]) -> None:
    """Restore a generator's state from what `generator_state` returned.

    Raises:
        UsageError: The generator is of another kind than the saved one. The message contains
            `name`.
    """
    kind = generator_state(generator)["kind"]
    saved = state.get("kind") if isinstance(state, Mapping) else type(state).__name__
    if kind != saved:
        raise UsageError(
            f"the generator {name} is not what the checkpoint was saved from",
            f"found: {kind}, expected: {saved}",
            "Make it as before, or take a new run directory.",
        )
    if isinstance(generator, torch.Generator):
        generator.set_state(state["state"])
    elif isinstance(generator, random.Random):
        generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy(state["state"]))
    else:
        bits = (
            generator if isinstance(generator, np.random.BitGenerator) else generator.bit_generator
        )
        bits.state = _numpy(state["state"])
        if (missing := state["spawned"] - _spawned(bits)) > 0:
            # There is no other way to set the number of children.
            bits.seed_seq.spawn(missing)  # type: ignore[union-attr]


def _spawned(bits: Any) -> int:
    """Return how many generators were spawned from this one; the next ones depend on it."""
    return int(getattr(getattr(bits, "seed_seq", None), "n_children_spawned", 0))


def _plain(value: Any) -> Any:
    """Return a NumPy state as plain data.

    Its arrays are unsigned, which not every release of torch can save, so they become int64
    tensors.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {
            "dtype": str(value.dtype),
            "words": torch.from_numpy(value.astype(np.uint64).view(np.int64).copy()),
        }
    return value.item() if isinstance(value, np.generic) else value


def _numpy(value: Any) -> Any:
    """Return the NumPy state from which `_plain` made `value`."""
    if isinstance(value, Mapping):
        if set(value) == {"dtype", "words"}:
            return value["words"].numpy().view(np.uint64).astype(value["dtype"])
        return {key: _numpy(item) for key, item in value.items()}
    return value
