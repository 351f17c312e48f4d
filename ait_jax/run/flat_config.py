"""A config as a run keeps it: values by their dotted keys."""

from typing import Any

__all__ = ["flat_config"]


def flat_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested dict by their dotted keys; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
