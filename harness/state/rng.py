"""Save, restore and seed the generators of this process: Python, NumPy, torch's CPU and GPUs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from harness.data.plan import seed_cpu, seed_of


def rng_state() -> dict[str, Any]:
    """Return the state of this process's generators, as plain data.

    The generators of GPUs are included only if CUDA is initialised.
    """
    version, internal_state, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {
            "version": version,
            "words": torch.tensor(internal_state, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state of this process's generators.

    The generators of GPUs are restored only if this process sees as many GPUs as the state holds.
    """
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": numpy_state["key"].numpy().astype(np.uint32),
                "pos": numpy_state["pos"],
            },
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if (
        state["cuda"]
        and torch.cuda.is_available()
        and len(state["cuda"]) == torch.cuda.device_count()
    ):
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restore this process's generators, including those of its GPUs, when the block ends."""
    generators = rng_state()
    try:
        yield
    finally:
        set_rng_state(generators)


def seed_rank(*parts: int | str) -> None:
    """Seed all generators of this process, including those of all GPUs, from the parts.

    Include the rank in the parts to give each rank its own seed.
    """
    seed = seed_of(*parts)
    seed_cpu(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
