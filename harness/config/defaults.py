"""Create an omegaconf object with the defaults, into which settings can be merged."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from harness.config.schema import Config


def defaults() -> DictConfig:
    """Return all settings with their types and defaults.

    Hydra needs omegaconf before 2.4. That version makes each section of a frozen dataclass
    read-only, so the flag is removed from every section.
    """
    settings: DictConfig = OmegaConf.structured(Config)
    for node in (settings, *(settings[name] for name in settings)):
        OmegaConf.set_readonly(node, False)
    return settings
