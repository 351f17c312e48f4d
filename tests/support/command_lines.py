"""Parses command lines as their programs do, and goes no further.

Reads a JSON list of `[module, arguments]` and prints a list of errors, null where there is none.
In a process of its own, since programs define flags of the same names.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys

from absl import app, flags
from ml_collections import ConfigDict

from ait_jax.config import validate_config

# Modules that define flags when they are imported by others.
_WITH_FLAGS = ("ait_jax.main", "ait_jax.compile_check", "benchmarks.", "experiments.")


class _Parsed(BaseException):
    """The program has its arguments."""


def _run(main, argv=None, flags_parser=flags.FLAGS):
    """In place of `absl.app.run`."""
    del main, argv
    rest = flags_parser(sys.argv)
    if len(rest) > 1:
        sys.exit(f"unknown arguments: {rest[1:]}")
    if "config" in flags.FLAGS and isinstance(flags.FLAGS.config, ConfigDict):
        validate_config(flags.FLAGS.config)
    raise _Parsed


def _parse_known_args(self, args=None, namespace=None):
    """In place of argparse's, which `parse_args` calls too."""
    _, rest = _PARSE(self, args, namespace)
    if [argument for argument in rest if not argument.startswith("--config.data.")]:
        sys.exit(f"unknown arguments: {rest}")
    raise _Parsed


_PARSE = argparse.ArgumentParser.parse_known_args


def error_of(module, arguments):
    """What a program says against its arguments; None if nothing."""
    sys.argv = [module, *arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            runpy.run_module(module, run_name="__main__")
    except _Parsed:
        return None
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}\n{printed.getvalue()}"
    return f"it never parsed its arguments\n{printed.getvalue()}"


def main():
    """Parses them all."""
    app.run = _run
    argparse.ArgumentParser.parse_known_args = _parse_known_args
    at_start = set(flags.FLAGS)
    errors = []
    for module, arguments in json.load(sys.stdin):
        errors.append(error_of(module, arguments))
        for name in set(flags.FLAGS) - at_start:
            delattr(flags.FLAGS, name)
        for name in [name for name in sys.modules if name.startswith(_WITH_FLAGS)]:
            package, _, module = name.rpartition(".")
            del sys.modules[name]
            if package in sys.modules:  # Itself one of them, it may have gone first.
                delattr(sys.modules[package], module)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
