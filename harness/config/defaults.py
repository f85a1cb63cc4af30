"""The defaults, as something that settings can be merged into."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from harness.config.schema import Config


def defaults() -> DictConfig:
    """All settings with their types and defaults. omegaconf before 2.4, which Hydra needs, takes what is made of a frozen dataclass for
    settings that nobody may change, section by section."""
    settings: DictConfig = OmegaConf.structured(Config)
    for node in (settings, *(settings[name] for name in settings)):
        OmegaConf.set_readonly(node, False)
    return settings
