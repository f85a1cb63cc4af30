"""Ports for servers that are started later, in another process."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Return a port that nobody has, and that the kernel gives to no client meanwhile.

    One that `bind` chooses may become the local end of somebody's connection before it is used.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among 200")
