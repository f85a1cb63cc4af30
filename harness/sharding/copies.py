"""Compare the copies of parts that several ranks hold, as a checkpoint has only one of them.

Replicas of HSDP, and what tensor parallelism leaves whole, are the same by construction, unless a
program keeps their gradients from being summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harness.distributed.layout import Layout
from harness.distributed.parts import Part
from harness.state.raw_bytes import digest_of_samples


def samples_of_copies(parts: Mapping[str, Part], rank: int) -> dict[str, str]:
    """Return a digest of samples of the parts that other ranks hold too, by these ranks.

    Args:
        parts: the parts of this rank, by path.
        rank: this rank.
    """
    holders = dict[Layout, str]()
    held = defaultdict[str, list[torch.Tensor]](list)
    for part in parts.values():
        if part.layout not in holders:
            holders[part.layout] = ", ".join(map(str, part.layout.holders(rank)))
        held[holders[part.layout]].append(part.tensor)
    return {
        ranks: digest_of_samples(tensors).hex() for ranks, tensors in held.items() if "," in ranks
    }


def unlike_copies(replies: Sequence[Mapping[str, Any]]) -> str:
    """Return a warning if ranks that hold the same parts do not hold the same numbers, or ""."""
    found = defaultdict[str, set[str]](set)
    for reply in replies:
        for ranks, digest in reply.get("copies", {}).items():
            found[ranks].add(digest)
    unlike = [ranks for ranks, digests in found.items() if len(digests) > 1]
    return (
        f"warning: the copies of sharded state on ranks {unlike[0]} are no longer the same: only "
        "that of the first of them is saved, and all go on with it after a restart. These ranks "
        "must draw the same random numbers, see the same samples where they compute a step "
        "together, and sum their gradients before each update"
        if unlike
        else ""
    )
