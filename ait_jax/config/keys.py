"""Keys of a config by their dotted names, and values as users give them."""

from typing import Any

import ml_collections

from ait_jax.errors import did_you_mean
from ait_jax.run.flat_config import flat_config
from ait_jax.run.storage import user_path

__all__ = [
    "GIVEN",
    "expand_homes",
    "get_key",
    "home_of_data",
    "near_key",
    "plain_value",
    "set_key",
]

# What teacher.weights is where the network was given to `zero_shot_quantize`.
GIVEN = "given"
_FOLDER = "folder:"  # What data.name begins with where it is a path.


def get_key(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a dotted key.

    Args:
        config: nested sections of values.
        key: as `train.batch_size`.

    Raises:
        KeyError: if the config has no such key, or it is a section.
    """
    section, name = _section(config, key)
    return section[name]


def set_key(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    """Sets the value of a dotted key, in place.

    Args:
        config: nested sections of values.
        key: as `train.batch_size`.
        value: of the type of the value that is there; an int may take the place of a float.

    Raises:
        KeyError: if the config has no such key, or it is a section.
        TypeError: if the value is of another type.
    """
    section, name = _section(config, key)
    section[name] = value


def _section(config: ml_collections.ConfigDict, key: str) -> tuple[ml_collections.ConfigDict, str]:
    """The section of a dotted key, and the key's name in it."""
    *sections, last = key.split(".")
    section: Any = config
    for name in sections:
        section = section.get(name) if isinstance(section, ml_collections.ConfigDict) else None
    if not isinstance(section, ml_collections.ConfigDict) or last not in section:
        raise KeyError(key)
    if isinstance(section[last], ml_collections.ConfigDict):
        raise KeyError(key)
    return section, last


def near_key(key: str, config: ml_collections.ConfigDict, prefix: str = "") -> str:
    """The end of a message about a key that a config does not have; see `errors.did_you_mean`.

    Args:
        key: dotted.
        config: with the keys there are.
        prefix: of those that may be meant, as `data.`.
    """
    known = flat_config(config.to_dict())
    return did_you_mean(key, [other for other in known if other.startswith(prefix)])


def plain_value(value: Any) -> Any:
    """A value as Python has it: scalars of NumPy and JAX as numbers, arrays and lists as tuples."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    if callable(getattr(value, "tolist", None)) and hasattr(value, "ndim"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(map(plain_value, value))
    return value


def home_of_data(name: str) -> str:
    """A `data.name` with the home for `~` where it is `folder:PATH`.

    Raises:
        PathError: as `storage.user_path`.
    """
    path = name.removeprefix(_FOLDER)
    return f"{_FOLDER}{user_path(path)}" if name == f"{_FOLDER}{path}" else name


def expand_homes(config: ml_collections.ConfigDict) -> None:
    """Writes the home for `~` in the paths of a config, in place.

    Raises:
        PathError: as `storage.user_path`.
    """
    for section, key in (("teacher", "weights"), ("data", "dir"), ("data", "name")):
        value = config[section][key]
        if isinstance(value, str) and "~" in value:
            expand = home_of_data if key == "name" else user_path
            config[section][key] = str(expand(value))
