"""Programs from outside: `ait-jax COMMAND`, arguments, exit codes, Ctrl-C and closed pipes.

Light: it is there before anything heavy is imported. docs/reliability.md lists the exit codes.
"""

import argparse
import errno
import functools
import os
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from ait_jax.errors import UserError, did_you_mean

__all__ = [
    "COMMANDS",
    "INTERNAL_ERROR",
    "INTERRUPTED",
    "USER_ERROR",
    "Parser",
    "as_called",
    "exit_code",
    "flag_error",
    "guard_imports",
    "hush_closed_loops",
    "main",
    "parse_flags",
    "path_argument",
    "refused_file",
    "run",
    "run_with_flags",
    "tell",
]

USER_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT
INTERNAL_ERROR = "this is an error of the program: please report it, with the lines above"

# What the system says of files that the user has to see to.
_REFUSED = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE),
)


# Ctrl-C ------------------------------------------------------------------------------------------


def _end_at_once(signum: int, frame: Any) -> NoReturn:
    # An exception would be lost in whatever module is being imported, or be printed with a page of
    # traceback.
    del signum, frame
    os._exit(INTERRUPTED)


def hush_closed_loops() -> None:
    """Keeps one traceback of our libraries off the terminal; for programs, once, at their start.

    Where a checkpoint cannot be written, Orbax closes its event loop while tensorstore still has
    results for it, and the error of the second comes on top of the first one's, which is told.
    """
    shown = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            shown(unraisable)

    sys.unraisablehook = hook


def guard_imports() -> None:
    """Lets Ctrl-C end the process at once and without a word, until a program is `run`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def _imported() -> None:
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Closed pipes ------------------------------------------------------------------------------------


class _Stream:
    """A stream that goes nowhere once nobody reads it any more: `| head -1` ends no work."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # What it still holds goes there as well, also at the end of the process.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _outlive_readers() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Stream):
            setattr(sys, name, _Stream(stream))


# Arguments ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but that what is wrong is told in one line, with the nearest word there is."""

    def __init__(self, **settings: Any):
        """Takes what `argparse.ArgumentParser` does; arguments must be written out."""
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with 2."""
        if choice := re.search(r"invalid choice: (.+?) \(choose from (.*)\)", message, re.DOTALL):
            choices = [word.strip(" '\"") for word in choice[2].split(",")]
            message += did_you_mean(choice[1].strip("'\""), choices)
        elif unknown := re.search(r"unrecognized arguments: (--?[^\s=]+)", message):
            message += did_you_mean(unknown[1], self._option_string_actions)
        tell(message)
        sys.exit(USER_ERROR)


def path_argument(text: str) -> Any:
    """The type of an argument that is a path: a `pathlib.Path`, see `storage.user_path`.

    Raises:
        argparse.ArgumentTypeError: if it begins with the home of nobody.
    """
    from ait_jax.run.storage import user_path

    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def flag_error(error: Exception) -> str:
    """What absl says against a flag, in one line, with the nearest value there is."""
    text = " ".join(str(error).split()).rstrip(".")
    if match := re.search(r"flag --\w+=(.*): value should be one of <(.*)>", text):
        text += did_you_mean(match[1], match[2].split("|"))
    missing = re.findall(r"flag --(\w+)=None: Flag --\w+ must have a value", text)
    return f"{', '.join(f'--{name}' for name in missing)} must be given" if missing else text


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl's flags; what is wrong with them is one line and exit code 2, not a usage."""
    from absl import flags

    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        tell(flag_error(error))
        sys.exit(USER_ERROR)


# Ends --------------------------------------------------------------------------------------------


def tell(text: object) -> None:
    """Prints what the user has to mend, in one line."""
    print(f"error: {text}", file=sys.stderr, flush=True)


def refused_file(error: Exception, folder: str | None = None) -> str:
    """What an error of the system says of a file that the user has to see to; empty if none.

    Args:
        error: of any kind.
        folder: named where the error names no file; None: then it is the program's.
    """
    name = getattr(error, "filename", None) or folder
    if not isinstance(error, OSError) or error.errno not in _REFUSED or name is None:
        return ""
    return f"{os.fsdecode(name)}: {error.strerror}"


def exit_code(main: Callable[[], int | None]) -> int:
    """The exit code to which a program comes whose modules are imported by now.

    Args:
        main: returns the exit code, None for 0; may raise.
    """
    _imported()
    _outlive_readers()
    try:
        return main() or 0
    except UserError as error:
        tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        if refused := refused_file(error):
            tell(refused)
            return USER_ERROR
        traceback.print_exc()
        tell(INTERNAL_ERROR)
        return 1
    finally:
        sys.stdout.flush()


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a program with the process's arguments, and ends the process with its exit code.

    Args:
        main: takes the arguments without the program's name; see `exit_code`.

    Returns:
        Never.
    """
    _outlive_readers()
    sys.exit(exit_code(lambda: main(sys.argv[1:])))


def run_with_flags(
    main: Callable[[list[str]], int | None],
    parse: Callable[[list[str]], list[str]] = parse_flags,
) -> NoReturn:
    """Runs a program with absl's flags, and ends the process with its exit code.

    Args:
        main: takes what no flag has taken, the program's name first; see `exit_code`.
        parse: takes the flags.

    Returns:
        Never.
    """
    from absl import app

    _outlive_readers()
    parse_or_help = functools.partial(_parse_or_help, parse)
    app.run(lambda argv: exit_code(lambda: main(argv)), flags_parser=parse_or_help)
    sys.exit()  # absl has done so.


def _parse_or_help(parse: Callable[[list[str]], list[str]], argv: list[str]) -> list[str]:
    try:
        return parse(argv)
    except SystemExit as stop:
        # absl ends with 1 once it has shown help, as it was asked to.
        raise SystemExit(0 if stop.code == 1 else stop.code) from None


# `ait-jax COMMAND` --------------------------------------------------------------------------------

COMMANDS = {
    "main": "quantize a network without data, or go on with an interrupted run",
    "export": "write the integers of a finished run",
    "evaluate": "measure the accuracy of exported integers",
    "predict": "classify images with exported integers",
    "report": "rebuild the HTML page of a run, or compare runs",
    "convert": "turn a PyTorch checkpoint into Flax variables",
    "models": "list the networks",
    "compile_check": "compile for a TPU slice that is not there, and see whether it fits",
}


_by_console = False


def as_called(text: str) -> str:
    """Help that names programs by `python -m`, in the words by which this process was started."""
    return text.replace("python -m ait_jax.", "ait-jax ") if _by_console else text


def _usage() -> str:
    lines = [f"  {name:<15}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ait-jax COMMAND [ARGUMENT...]",
            "",
            "commands:",
            *lines,
            "",
            "ait-jax COMMAND --help tells its arguments; ait-jax --version the version.",
        ]
    )


def main() -> None:
    """Entry point of the console; what it runs is the module, as `python -m` does.

    Raises:
        SystemExit: with the command's exit code; 2 if there is no such command.
    """
    global _by_console
    _by_console = True
    guard_imports()
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in COMMANDS:
        # Programs that start the process anew read `sys.orig_argv`, which stays this script's.
        del sys.argv[0]
        runpy.run_module(f"ait_jax.{command}", run_name="__main__", alter_sys=True)
    elif code := exit_code(lambda: _no_command(command)):
        sys.exit(code)


def _no_command(command: str) -> int:
    if command in ("-h", "--help"):
        print(_usage())
    elif command == "--version":
        package: Any = sys.modules["ait_jax"]  # Always imported before its modules.
        print(f"ait-jax {package.__version__}")
    else:
        given = f"unknown command {command!r}" if command else "a command is missing"
        near = did_you_mean(command, COMMANDS)
        tell(f"{given}: the commands are {', '.join(COMMANDS)}{near}")
        return USER_ERROR
    return 0
