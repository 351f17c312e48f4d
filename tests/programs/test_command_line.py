"""What programs have in common: homes, the nearest word, exit codes, Ctrl-C and closed pipes."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from ait_jax import command_line
from ait_jax.config import ConfigError, default_config, keys, parse_words, validate_config
from ait_jax.config.shipped import load_config, resolve_config
from ait_jax.errors import UserError, did_you_mean
from ait_jax.evaluate import main as evaluate_main
from ait_jax.export.__main__ import main as export_main
from ait_jax.models.__main__ import main as models_main
from ait_jax.predict import main as predict_main
from ait_jax.report.__main__ import main as report_main
from ait_jax.run.flat_config import flat_config
from ait_jax.run.interruption import Terminated, check_stop, raise_on_signals
from ait_jax.run.storage import PathError, absolute, run_path, user_path
from ait_jax.run.workdir import Workdir
from tests.support import program
from tests.support.configs import config_with


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield folder
    assert not any(name.startswith("~") for name in os.listdir("."))


# Homes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [user_path, absolute, run_path, command_line.path_argument])
def test_paths_that_begin_at_home(home, expand):
    assert str(expand("~")) == str(home)
    assert str(expand("~/a/b~/~")) == f"{home}/a/b~/~"
    assert str(expand("~root/x")) == f"{os.path.expanduser('~root')}/x"


def test_what_is_no_home_stays(home):
    assert absolute("gs://bucket/~/x") == "gs://bucket/~/x"
    assert str(user_path("a/~/b")) == "a/~/b" and str(user_path("x~")) == "x~"
    with pytest.raises(PathError, match=r"'~unheard/x' .* no user 'unheard'.* './~unheard/x'"):
        user_path("~unheard/x")
    assert user_path("./~unheard/x").name == "x"  # As the message says.


def test_a_workdir_at_home(home):
    assert Workdir("~/run", config_with()).path == home / "run"
    assert (home / "run").is_dir()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("teacher.weights", "~/w.pth", "{}/w.pth"),
        ("data.dir", "~", "{}"),
        ("data.name", "folder:~/images", "folder:{}/images"),
        ("data.name", "digits", "digits"),
        ("teacher.weights", "a~/w.pth", "a~/w.pth"),
    ],
)
def test_paths_of_a_config(home, key, value, expected):
    config = config_with(**{"teacher.weights": "w.pth"} | {key: value})
    validate_config(config)
    assert flat_config(config.to_dict())[key] == expected.format(home)


def test_a_config_file_at_home(home):
    (home / "mine.py").write_text("def get_config(words=''):\n    return words\n")
    assert resolve_config("~/mine.py:w4a4") == f"{home}/mine.py:w4a4"
    assert load_config("~/mine.py:w4a4") == "w4a4"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (export_main, ["--workdir=~/run", "--out=~/out"]),
        (evaluate_main, ["--model=~/run"]),
        (predict_main, ["--model=~/run", "~/image.png"]),
        (report_main, ["~/run", "--out=~/out.html"]),
    ],
)
def test_programs_look_at_home(home, main, arguments, capsys):
    assert main(arguments) == 2
    assert str(home / "run") in capsys.readouterr().err


# The nearest word ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "known", "end"),
    [
        ("stpes", ["steps", "seed"], "; did you mean 'steps'?"),
        ("train.stpes", ["train.steps", "data.split"], "; did you mean 'train.steps'?"),
        ("Bisect", ["bisect", "select"], "; did you mean 'bisect'?"),
        ("split", ["data.split", "a.split", "x"], "; did you mean 'data.split' or 'a.split'?"),
        ("steps", ["steps"], ""),
        ("qqq", ["steps", "seed"], ""),
        ("", ["steps"], ""),
        (4, ["steps"], ""),
        (True, [False, True], ""),
    ],
)
def test_the_nearest_word(word, known, end):
    assert did_you_mean(word, known) == end


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("teacher.arch", "resnet_18", "resnet18"),
        ("teacher.arch", "ResNet50", "resnet50"),
        ("generator.name", "gdqf", "gdfq"),
        ("gi.search", "bisekt", "bisect"),
        ("parallel.mode", "shardmap", "shard_map"),
        ("loss.reduction", "batch_mean", "batchmean"),
    ],
)
def test_values_of_a_config(key, value, meant):
    config = config_with(**{"teacher.weights": "w", key: value})
    with pytest.raises(ConfigError, match=f"{key} = '{value}' .*; did you mean '{meant}'\\?"):
        validate_config(config)


def test_names_and_words_of_a_config():
    with pytest.raises(ConfigError, match=r"; did you mean 'cifar10_resnet20'\?"):
        resolve_config("cifar10_resnet2:w4a4")
    with pytest.raises(ConfigError, match=r"unknown word 'gdqf' .*; did you mean 'gdfq'\?"):
        parse_words("w4a4,gdqf", {"gdfq": print, "qimera": print})
    assert keys.near_key("data.nmae", default_config(), "data.") == "; did you mean 'data.name'?"


@pytest.mark.parametrize(
    ("main", "arguments", "line"),
    [
        (export_main, ["--workdir=a", "--otu=b"], "the following arguments are required: --out"),
        (export_main, ["--workdir=a", "--out=b", "--onxn"], "did you mean '--onnx'?"),
        (export_main, ["--workdir=a", "--out=b", "--which=bset"], "did you mean 'best'?"),
        (export_main, ["--workdir=~unheard", "--out=b"], "no user 'unheard'"),
        (report_main, ["a", "--uot=b"], "did you mean '--out'?"),
        (models_main, ["--nmes"], "unrecognized arguments: --nmes"),
        (predict_main, [], "--model, IMAGE"),
    ],
)
def test_arguments_that_are_wrong(main, arguments, line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and line in err
    assert err.startswith("error: ") and err.count("\n") == 1


# Exit codes ---------------------------------------------------------------------------------------


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("mend it"), 2, "error: mend it\n"),
        (FileNotFoundError(2, "No such file", "a.pth"), 2, "error: a.pth: No such file\n"),
        (PermissionError(13, "Permission denied", "b"), 2, "error: b: Permission denied\n"),
        (OSError(28, "No space left on device", "c"), 2, "error: c: No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (RuntimeError("oh"), 1, "please report it, with the lines above\n"),
        (ValueError("ours"), 1, "ValueError: ours\n"),
        (OSError("no file of it"), 1, "OSError: no file of it\n"),
    ],
)
def test_exit_codes(error, code, said, capsys):
    assert command_line.exit_code(raising(error)) == code
    err = capsys.readouterr().err
    assert said in err and ("Traceback" in err) == (code == 1)
    assert command_line.exit_code(lambda: None) == 0 and command_line.exit_code(lambda: 7) == 7


PROCESS = {"cwd": program.ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_flags_that_are_wrong(tmp_path):
    """Of a program with absl's flags, where each has a process of its own."""
    module = [sys.executable, "-m", "ait_jax.convert"]
    out = f"--out={tmp_path / 'x.safetensors'}"
    starts = {
        "error: --arch, --weights, --out must be given": [],
        "; did you mean 'resnet50'?": ["--arch=resnet_50", "--weights=a", out],
        "'otu'. Did you mean: out ?": ["--arch=resnet50", "--weights=a", "--otu=b"],
        "there is no such file": ["--arch=resnet50", "--weights=a", out],
        "error: unknown arguments: more": ["--arch=resnet50", "--weights=a", out, "more"],
    }
    running = {
        part: subprocess.Popen([*module, *arguments], **PROCESS)
        for part, arguments in starts.items()
    }
    for part, process in running.items():
        out, err = process.communicate(timeout=program.HANGS)
        assert process.returncode == 2 and not out, err
        assert err.startswith("error: ") and part in err and err.count("\n") == 1


# Closed pipes -------------------------------------------------------------------------------------

PRINTS = """
import sys
from pathlib import Path
from ait_jax import command_line

def main(arguments):
    for _ in range(20_000):
        print("a line", flush="flush" in arguments)
        print("another", file=sys.stderr)
    Path(arguments[0]).write_text("all of it")
    return 7 * ("fails" in arguments)

command_line.run(main)
"""


@pytest.mark.parametrize("how", ["flush", "fails", "both"])
def test_a_closed_pipe_ends_no_work(tmp_path, how):
    done = tmp_path / "done"
    process = subprocess.Popen([sys.executable, "-c", PRINTS, str(done), how], **PROCESS)
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    if how == "both":
        process.stderr.close()
    said = "" if how == "both" else process.stderr.read()
    assert process.wait(program.HANGS) == 7 * (how == "fails")
    assert done.read_text() == "all of it" and said.count("another\n") == len(said.splitlines())
    process.stderr.close()


def test_help_into_a_closed_pipe():
    line = f"{sys.executable} -m ait_jax.models --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], **PROCESS, check=True)
    assert done.stdout == "0\n" and done.stderr == ""


# Ctrl-C -------------------------------------------------------------------------------------------

# A module that takes its time to be imported, and swallows what is raised meanwhile.
SLOW = """
import time
print("importing", flush=True)
for _ in range(3000):
    try:
        time.sleep(0.02)
    except BaseException:
        pass
"""


@pytest.mark.parametrize("start", ["module", "console"])
def test_ctrl_c_during_imports(tmp_path, start):
    (tmp_path / "jax.py").write_text(SLOW)
    module = [sys.executable, "-m", "ait_jax.models"]
    code = (
        "import sys; sys.argv = ['ait-jax', 'models']; "
        "from ait_jax.command_line import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{program.ROOT}"}
    process = subprocess.Popen(
        module if start == "module" else [sys.executable, "-c", code],
        **PROCESS | {"cwd": tmp_path},
        env=environment,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == ""


def test_a_program_that_runs_hears_ctrl_c_as_python_does(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command_line.guard_imports()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert command_line.exit_code(lambda: signal.raise_signal(signal.SIGINT)) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # As nohup does.
        command_line.guard_imports()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_closed_event_loop_is_not_shown_and_all_else_is(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda shown: seen.append(str(shown.exc_value)))
    command_line.hush_closed_loops()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("closed"), ValueError("no")):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert seen == ["closed", "no"]


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_stop_that_python_drops_is_raised_again(signum, kind, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: shown.append(dropped.exc_value))

    class Finalized:
        def __del__(self):
            signal.raise_signal(signum)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise_on_signals()
        check_stop()  # Nothing has come yet.
        Finalized()  # Python prints what it raises, and goes on; but for this.
        assert not shown
        error = ValueError("no stop")
        sys.unraisablehook(SimpleNamespace(exc_value=error))
        assert shown == [error]
        with pytest.raises(KeyboardInterrupt) as caught:
            check_stop()
        assert caught.type is kind
        check_stop()  # Once is enough.
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_teacher_is_trained(tmp_path, compilation_cache, signum):
    args = [
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'new' / 'run'}",
        "--config.teacher.training.steps=1000000",
    ]
    process = program.start(args, cache=compilation_cache)
    for line in process.stderr:
        if "training a teacher on" in line:
            break
    time.sleep(1)  # Anywhere in it: it may be compiling.
    process.send_signal(signum)
    _, err = process.communicate(timeout=program.HANGS)
    assert process.returncode == 128 + signum, err
    assert "while the teacher was being trained: nothing of it is kept" in err
    assert f"{signum.name}: stopped" in err and "Traceback" not in err
    assert not (tmp_path / "new").exists()  # The workdir was made for nothing.
