"""The configuration: its keys, their checks, the recipes and files that come with the package."""

from ait_jax.config.validate import (
    ConfigError,
    default_config,
    parse_words,
    steps_per_dispatch,
    validate_config,
)

__all__ = [
    "ConfigError",
    "default_config",
    "parse_words",
    "steps_per_dispatch",
    "validate_config",
]
