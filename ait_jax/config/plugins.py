"""Modules of the user's that register more methods: `--config.plugins=my_module,other`."""

import importlib
import os
import sys
from collections.abc import Sequence

from ait_jax.errors import UserError

__all__ = ["PluginError", "import_plugins", "plugins_of_arguments"]

_FLAG = "config.plugins"


class PluginError(UserError):
    """A plugin that cannot be imported; names the module, and why."""


def import_plugins(names: str) -> None:
    """Imports modules; what they register can be named in configs from here on.

    The current folder is searched too, however the program was started.

    Args:
        names: of the modules, dotted, separated by commas; may be empty.

    Raises:
        PluginError: if there is no such module, or it fails.
    """
    for name in filter(None, (part.strip() for part in names.split(","))):
        here = os.getcwd()
        added = here not in sys.path
        if added:
            sys.path.append(here)
        try:
            importlib.import_module(name)
        except UserError as error:
            raise PluginError(f"plugins: {name!r} cannot be imported: {error}") from error
        except Exception as error:
            raise PluginError(
                f"plugins: {name!r} cannot be imported ({type(error).__name__}: {error}); it must "
                "be the dotted name of a module that Python finds, in the current folder or "
                "installed"
            ) from error
        finally:
            if added:
                sys.path.remove(here)


def plugins_of_arguments(argv: Sequence[str]) -> str:
    """The value of `--config.plugins` among command-line arguments; the last one counts."""
    found = ""
    for i, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument == "--":
            break
        if flag == _FLAG and argument.startswith("-"):
            found = value if equals else (argv[i + 1] if i + 1 < len(argv) else "")
    return found
