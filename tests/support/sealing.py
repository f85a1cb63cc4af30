"""Rewrite a manifest so that its seal fits."""

from __future__ import annotations

import json

from blake3 import blake3


def seal(fields: dict) -> bytes:
    """A manifest as the format's specification spells it, with the digest that fits."""
    fields = {key: value for key, value in fields.items() if key != "manifest_digest"}
    digest = f"blake3:{blake3(json.dumps(fields, sort_keys=True).encode()).hexdigest()}"
    return (
        json.dumps(fields | {"manifest_digest": digest}, indent=1, sort_keys=True) + "\n"
    ).encode()
