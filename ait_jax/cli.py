"""The console script: `ait-jax COMMAND ...` is `python -m ait_jax.COMMAND ...`."""

import runpy
import sys

import ait_jax
from ait_jax.command_line import USER_ERROR, exit_code, guard_imports, tell
from ait_jax.errors import did_you_mean

__all__ = ["COMMANDS", "as_called", "main"]

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
        print(f"ait-jax {ait_jax.__version__}")
    else:
        given = f"unknown command {command!r}" if command else "a command is missing"
        near = did_you_mean(command, COMMANDS)
        tell(f"{given}: the commands are {', '.join(COMMANDS)}{near}")
        return USER_ERROR
    return 0
