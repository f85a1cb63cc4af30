"""Settings out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.defaults import defaults
from harness.config.names import flatten, nested
from harness.config.schema import SPELLED, Config
from harness.errors import UsageError


def restored(stored: Mapping[str, Any]) -> Config:
    """The settings that a checkpoint holds, with what they take from the environment put in. Raises UsageError."""
    try:
        settings = {SPELLED.get(name, name): value for name, value in flatten(dict(stored)).items()}
        merged = defaults()
        for name, value in settings.items():
            if value != {}:
                merged = OmegaConf.merge(merged, OmegaConf.create(nested(name, value)))  # type: ignore[assignment]
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UsageError("the checkpoint's settings cannot be read", f"found: {str(error).splitlines()[0]}") from None
