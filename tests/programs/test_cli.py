"""The console script: the programs of `python -m`, by name."""

import importlib.util
import os
import subprocess
import sys
import tomllib

import pytest

import ait_jax
from ait_jax import command_line as cli
from tests.support.program import HANGS, ROOT

ABSL = {"main", "convert", "compile_check"}  # Their flags are the process's.


def run(*arguments):
    """Runs the script as its wrapper does, in a process of its own."""
    code = "from ait_jax.command_line import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_the_package_installs_it():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ait-jax": "ait_jax.command_line:main"}


def test_every_program_is_a_command():
    programs = {path.parent.name for path in (ROOT / "ait_jax").glob("*/__main__.py")}
    assert set(cli.COMMANDS) == programs | {"main", "evaluate", "predict"}
    for command in cli.COMMANDS:
        assert importlib.util.find_spec(f"ait_jax.{command}")


def test_help_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ait-jax", "--help"])
    cli.main()
    printed = capsys.readouterr().out
    for command, what in cli.COMMANDS.items():
        assert f"  {command:<15}{what}\n" in printed


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - ABSL))
def test_help_of_a_command_is_in_its_users_words(command, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_by_console", False)
    assert cli.as_called("python -m ait_jax.export") == "python -m ait_jax.export"
    monkeypatch.setattr(sys, "argv", ["ait-jax", command, "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    assert stop.value.code in (None, 0) and printed.startswith(f"usage: ait-jax {command} ")
    assert "python -m" not in printed


@pytest.mark.parametrize("command", sorted(ABSL))
def test_help_of_a_command_with_absl_flags(command):
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"`ait-jax {command} --" in done.stdout and "python -m" not in done.stdout


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ait-jax", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"ait-jax {ait_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: unknown command 'trian': the commands are main, export,"),
        ([], "error: a command is missing: the commands are main, export,"),
        (["--workdir=a"], "error: unknown command '--workdir=a'"),
    ],
)
def test_no_such_command(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["ait-jax", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)


def test_the_program_sees_its_arguments_and_returns_its_code(tmp_path):
    """Of the one that starts the process anew, and of one that does not."""
    done = run("main", "--config=quickstart:w9a4", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert "error: quant.weight_bits = 9 is not allowed" in done.stderr
    done = run("report", str(tmp_path), f"--out={tmp_path / 'page.html'}")
    assert done.returncode == 2 and f"error: '{tmp_path}' is not allowed" in done.stderr


def test_the_commands_are_known_before_anything_heavy_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ait_jax.command_line; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    loaded = set(done.stdout.split())
    assert "ait_jax.command_line" in loaded and not loaded & {"jax", "flax", "numpy", "absl"}
