"""Check that a run goes on with the data that it had before, on all ranks.

Each error message names the setting that accepts the difference, if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.data.fingerprint import lasting
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.selfcheck.environment import string_hashing
from harness.supervision.machine_record import RANDOM

SETS = (
    "Sets of strings have another order at each start, because PYTHONHASHSEED is not set: sort a"
    " set before its items are numbered (`sorted(set(text))`). "
)
# A fingerprint is a digest of the bytes of samples, unless the dataset names itself.
LAST_BITS = (
    " If only the machine is another one: a type of CPU or a version of a library may compute the "
    "last bits of floats otherwise (a resize, a spectrum), and then the samples are others to that "
    "degree. For machines of several kinds, let the dataset have a text `fingerprint` that names "
    "its content: it is compared instead."
)
HOW_DEALT = ("global_batch_size", "shuffle", "drop_last", "seed")


def check_data(now: Mapping[str, Any], before: Mapping[str, Any], accept: tuple[str, ...]) -> None:
    """Check that the data, and how it is sharded, are the same as in the checkpoint.

    Raises:
        UsageError: The data differs and `accept` lacks "data", or the sharding differs and `accept`
            lacks "config".
    """
    before = dict(before) | ({"kinds": lasting(before["kinds"])} if "kinds" in before else {})
    differing = [name for name in now if now[name] != before.get(name)]
    for names, insist in (
        ([n for n in differing if n in HOW_DEALT], "config"),
        ([n for n in differing if n not in HOW_DEALT], "data"),
    ):
        if names and insist not in accept:
            raise UsageError(
                "the data is not what this run was trained on so far"
                if insist == "data"
                else "the data would be dealt out differently from how this run began",
                "\n".join(
                    f"  {name}: found {now[name]!r}, expected {before.get(name)!r}"
                    for name in names
                ),
                f"{SETS if insist == 'data' and string_hashing() == RANDOM else ''}"
                "Put it back as it was, or take another run directory. To insist: "
                f"resume.accept=[{insist}]." + LAST_BITS * (names == ["fingerprint"]),
            )


def check_same_data(world: World, data: Mapping[str, Any], accept: tuple[str, ...]) -> None:
    """Check that every rank was given the same datasets, because each rank takes its share of them.

    Streams are left out: each rank reads its own. Collective: every rank must call it.

    Raises:
        UsageError: The datasets have unlike sizes, or unlike samples and `accept` lacks "data".
    """
    parts = {"the dataset": data} | {
        f"beside[{name!r}]": part for name, part in data.get("beside", {}).items()
    }
    of_ranks = world.gather(
        {
            name: (part["size"], part["fingerprint"])
            for name, part in parts.items()
            if part["size"] is not None
        }
    )
    names = list(dict.fromkeys(name for of_rank in of_ranks for name in of_rank))
    kinds = {name: {of_rank.get(name) for of_rank in of_ranks} for name in names}
    other_sizes = [name for name in names if len({kind and kind[0] for kind in kinds[name]}) > 1]
    others = [name for name in names if len(kinds[name]) > 1]
    if not (other_sizes or (others and "data" not in accept)):
        return
    raise UsageError(
        "the ranks were not given the same data",
        "\n".join(
            f"  {name}: found {_of_each_rank([of_rank.get(name) for of_rank in of_ranks])}"
            for name in others
        ),
        "Give every rank the whole dataset: batches() gives each rank its share of it."
        + ("" if other_sizes else f" To insist: resume.accept=[data].{LAST_BITS}"),
    )


def _of_each_rank(found: Sequence[tuple[int, str] | None]) -> str:
    """Return the data of the first rank, and of the first one that differs, in words."""
    other = next(rank for rank, data in enumerate(found) if data != found[0])
    return ", ".join(
        f"{'none' if (data := found[rank]) is None else f'{data[0]} samples ({data[1]})'}"
        f" on rank {rank}"
        for rank in (0, other)
    )
