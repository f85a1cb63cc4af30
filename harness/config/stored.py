"""Restore the settings that a checkpoint contains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.defaults import defaults
from harness.config.names import nested, stored_under_todays_names
from harness.config.schema import SPELLED, Config
from harness.errors import UsageError


def restored(stored: Mapping[str, Any]) -> Config:
    """Return the settings of a checkpoint, with `${oc.env:NAME}` resolved from the environment.

    Raises:
        UsageError: A setting is unknown, has the wrong type, or cannot be resolved.
    """
    try:
        settings = {
            SPELLED.get(name, name): value
            for name, value in stored_under_todays_names(stored, whole_arguments=True).items()
        }
        merged = defaults()
        for name, value in settings.items():
            if value != {}:
                merged = OmegaConf.merge(  # type: ignore[assignment]
                    merged, OmegaConf.create(nested(name, value))
                )
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UsageError(
            "the checkpoint's settings cannot be read", f"found: {str(error).splitlines()[0]}"
        ) from None
