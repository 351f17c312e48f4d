"""The configs that come with the package, by name: `--config=cifar10_resnet20:w4a4,cpu`."""

import os
import runpy
from collections.abc import Sequence
from pathlib import Path

import ml_collections

from ait_jax.config.plugins import import_plugins, plugins_of_arguments
from ait_jax.config.validate import ConfigError
from ait_jax.errors import did_you_mean
from ait_jax.run.storage import user_path

__all__ = ["load_config", "resolve_arguments", "resolve_config", "shipped_configs"]

_PACKAGE = Path(__file__).parents[1]
# An installed wheel has them inside the package, a checkout beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped config, sorted by name."""
    folder = next(filter(Path.is_dir, _FOLDERS))
    return {file.stem: file for file in sorted(folder.glob("[!_]*.py"))}


def resolve_config(value: str) -> str:
    """The value of `--config` with the path of its file.

    Args:
        value: `FILE[:words]`, or `NAME[:words]` of a shipped config; an existing file wins.

    Returns:
        `FILE[:words]`.

    Raises:
        ConfigError: if there is neither; lists what is shipped.
        PathError: where `~NAME` is nobody's home.
    """
    name, colon, words = value.partition(":")
    name = os.fspath(user_path(name)) if name.startswith("~") else name
    if Path(name).is_file():
        return f"{name}{colon}{words}"
    shipped = shipped_configs()
    if name not in shipped:
        raise ConfigError(
            f"--config = {name!r} is not allowed: there is no such file, and shipped are "
            f"{', '.join(shipped)}{did_you_mean(Path(name).stem, shipped)}"
        )
    return f"{shipped[name]}{colon}{words}"


def load_config(value: str) -> ml_collections.ConfigDict:
    """The config that the program would get from `--config=VALUE`, to be changed as one likes.

    Args:
        value: as for `resolve_config`.

    Raises:
        ConfigError: as `resolve_config`; or if the config does not know one of the words.
    """
    file, colon, words = resolve_config(value).partition(":")
    return runpy.run_path(file)["get_config"](*[words] * bool(colon))


def resolve_arguments(argv: Sequence[str]) -> list[str]:
    """Command-line arguments, the value of `--config` among them resolved, and plugins imported.

    Raises:
        ConfigError: as `resolve_config`.
        PluginError: if a module of `--config.plugins` cannot be imported.
    """
    import_plugins(plugins_of_arguments(argv))
    resolved = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if argument == "--":  # What follows is for no flag.
            break
        if flag in ("--config", "-config"):
            if equals:
                resolved[i] = f"{flag}={resolve_config(value)}"
            elif i + 1 < len(argv):
                resolved[i + 1] = resolve_config(argv[i + 1])
    return resolved
