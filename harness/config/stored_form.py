"""Write settings as they are stored beside checkpoints: as YAML, and as a digest."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from harness.config.names import RESOLVED

NATIVE = (str, int, float, bool, type(None))


def to_yaml(settings: dict[str, Any]) -> str:
    """Return the settings as YAML text; what YAML has no form for is written as text."""
    # A run that uses only the library has no settings. It does not need to import omegaconf.
    if not settings:
        return "{}\n"
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    own = {name: value for name, value in settings.items() if name != RESOLVED}
    try:
        return OmegaConf.to_yaml(OmegaConf.create(own))
    except OmegaConfBaseException:
        return str(yaml.safe_dump(_spelled(own), sort_keys=False, allow_unicode=True))


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if isinstance(key, NATIVE) else str(key): _spelled(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    return value if isinstance(value, NATIVE) else str(value)


def digest(settings: dict[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the settings."""
    text = json.dumps(_with_text_keys(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_text_keys(value: Any) -> Any:
    """Return the value with keys that can be sorted together."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list | tuple) else value
