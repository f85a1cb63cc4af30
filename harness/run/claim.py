"""How an attempt begins: claimed in every store, with what earlier ones left behind taken away."""

from __future__ import annotations

from collections.abc import Callable

import harness.run.identity as identity
from harness import config
from harness.checkpoint import attempts, load, requests
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.run.settings import Settings
from harness.store import Store, probe


def claim(stores: tuple[Store, ...], choice: load.Choice, world_size: int, settings: Settings, say: Callable[[str], object]) -> Attempt:
    """Claim the next attempt; for the writer. Raises SupersededError, StorageError, UsageError."""
    assert choice.survey is not None, "the writer has listed the stores"
    for store in stores:
        store.prepare(fmt.FOLDERS)
        if not store.is_local:
            probe.check(store)
    attempt = attempts.claim(choice.survey, choice.manifest, world_size, more=identity.of_program(settings))
    for place, key in choice.damaged:
        load.set_aside(stores[place], key)
        say(f"harness: set aside: {key}" + (f" in {stores[place]}" if len(stores) > 1 else ""))
    for store in stores:
        store.sweep(fmt.FOLDERS, attempt.number)
        requests.sweep([store], attempt.number)
        store.write("config.yaml", config.to_yaml(settings.config).encode(), attempt.number)
    return attempt
