"""Save, restore and seed the generators of this process: Python, NumPy, torch's CPU and GPUs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from harness.data.plan import seed_cpu, seed_of


def rng_state(rank: int = 0) -> dict[str, Any]:
    """Return the state of this process's generators, as plain data.

    The generators of GPUs are included only if CUDA is initialised. The number of this rank's own
    GPU is included only if it does not follow from the rank.
    """
    uses_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    version, internal_state, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {
            "version": version,
            "words": torch.tensor(internal_state, dtype=torch.int64, device="cpu"),
            "gauss": gauss,
        },
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if uses_gpus else [],
    } | (_own_gpu(rank) if uses_gpus else {})


def _own_gpu(rank: int) -> dict[str, int]:
    own = torch.cuda.current_device()
    return {"own_gpu": own} if own != rank % torch.cuda.device_count() else {}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that this process's generators had earlier in this process."""
    _set_cpu(state)
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def restore_rng_state(state: Mapping[str, Any], rank: int) -> str:
    """Restore the state of a rank's generators from a checkpoint, maybe of other GPUs.

    Returns:
        A notice if generators of GPUs cannot be restored, else "".
    """
    _set_cpu(state)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own = torch.cuda.current_device() if count and state["cuda"] else 0
    before = state.get("own_gpu", rank % max(1, len(state["cuda"])))
    chosen, notice = gpu_states(state["cuda"], before, own, count)
    for number, gpu_state in chosen.items():
        torch.cuda.set_rng_state(gpu_state, number)
    return notice


def gpu_states(
    saved: Sequence[Any], before: int, own: int, count: int
) -> tuple[dict[int, Any], str]:
    """Choose the saved state of each GPU's generator, by the number of the GPU now.

    A rank's own GPU takes the state of what was its own GPU. The others keep their numbers.

    Args:
        saved: The state of each GPU that the rank saw then.
        before: The number of the rank's own GPU then.
        own: The number of the rank's own GPU now.
        count: The number of GPUs that the rank sees now.

    Returns:
        The states, and a notice if some of the GPUs get none, else "".
    """
    if not saved:
        return {}, ""
    if len(saved) == count:
        return dict(enumerate(saved)) | {own: saved[before]}, ""
    found = f"{len(saved)} GPU(s) seen by a rank before, {count} now"
    if not count:
        return {}, f"{found}: the generators of GPUs are not restored"
    return (
        {own: saved[before]},
        f"{found}: of the generators of GPUs, that of each rank's own GPU is restored,"
        " and those of others are not",
    )


def _set_cpu(state: Mapping[str, Any]) -> None:
    """Restore the generators of Python, NumPy and torch's CPU."""
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
