"""The lock of a run's folder: whose it is, how it ends, and folders that are only read."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from ait_jax.parallel import distributed
from ait_jax.run import lock
from ait_jax.run.lock import LOCK, LockError, RunLock
from ait_jax.run.workdir import Workdir, WorkdirError
from tests.support import program
from tests.support.configs import config_with

HOLDER = """
import sys, time
from pathlib import Path
from ait_jax.run.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(program.ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_SILENT_SECONDS", 0.3)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.02)


def owner(folder, **changes):
    """Writes the lock of another machine."""
    record = {"host": "elsewhere", "pid": 77, "since": "yesterday", "command": "python run"}
    (folder / LOCK).write_text(json.dumps(record | {"machine": "another"} | changes))


def taken(folder):
    """Locks and unlocks; whose it was meanwhile."""
    mine = RunLock(folder)
    mine.acquire()
    record = json.loads((folder / LOCK).read_text())
    mine.release()
    assert not (folder / LOCK).exists()
    return record["pid"], record["host"]


ME = (os.getpid(), os.uname().nodename)


def test_a_process_that_runs_keeps_the_folder_and_one_that_was_killed_does_not(
    tmp_path, holder, caplog
):
    before = (tmp_path / LOCK).read_bytes()
    record = json.loads(before)
    assert record["pid"] == holder.pid and record["host"] == ME[1]
    with pytest.raises(LockError) as caught:
        RunLock(tmp_path).acquire()
    text = str(caught.value)
    for part in (f"process {holder.pid} on {ME[1]}", f"since {record['since']}", str(tmp_path)):
        assert part in text
    assert "\n" not in text and (tmp_path / LOCK).read_bytes() == before
    caplog.set_level(logging.INFO)
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    assert taken(tmp_path) == ME
    assert f"process {holder.pid} on" in caplog.text and "is taken over" in caplog.text


def test_one_process_locks_a_folder_once(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(LockError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    first.release()
    assert taken(tmp_path) == ME


def test_a_lock_of_another_machine_is_taken_over_once_it_gives_no_sign(tmp_path, impatient, caplog):
    owner(tmp_path)
    caplog.set_level(logging.INFO)
    assert taken(tmp_path) == ME
    assert "locked by process 77 on elsewhere, since yesterday" in caplog.messages[0]
    assert "sign of life" in caplog.messages[0]


@pytest.mark.parametrize("sign", ["touched", "written", "removed"])
def test_a_sign_of_life_from_another_machine(tmp_path, impatient, monkeypatch, sign):
    owner(tmp_path)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            if sign == "touched":
                os.utime(tmp_path / LOCK, (1, 1))  # Its clock need not be ours.
            elif sign == "written":
                owner(tmp_path, pid=78)
            else:
                (tmp_path / LOCK).unlink()

    monkeypatch.setattr(lock.time, "sleep", nap)
    if sign == "removed":  # It has ended well.
        assert taken(tmp_path) == ME
        return
    with pytest.raises(LockError, match="process 77 on elsewhere, since yesterday"):
        RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


def test_the_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    mine = RunLock(tmp_path)
    mine.acquire()
    os.utime(tmp_path / LOCK, (1, 1))
    deadline = time.monotonic() + 30
    while os.stat(tmp_path / LOCK).st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine.release()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{", b"[1]", b"\xff\xfe", b"{}", b'"x"'])
def test_a_damaged_lock_of_nobody_is_taken_over(tmp_path, impatient, content):
    (tmp_path / LOCK).write_bytes(content)
    assert taken(tmp_path) == ME


def test_a_lock_that_is_no_file_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(LockError, match=rf"{tmp_path}/{LOCK} cannot be written \(Is a directory\)"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / LOCK).is_dir()


def test_where_the_file_system_keeps_no_locks(tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda file: None)
    assert taken(tmp_path) == ME
    owner(tmp_path, machine=lock._machine())
    assert taken(tmp_path) == ME
    first = RunLock(tmp_path)
    first.acquire()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(tmp_path / LOCK))
    with pytest.raises(LockError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path).acquire()
    first.release()


# The folder ---------------------------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for error in (WorkdirError("no"), KeyboardInterrupt(), OSError()):
        for path in (there / "a" / "b" / "run", there):
            with pytest.raises(type(error)):
                _fail(Workdir(path, config_with()), error)
            assert there.is_dir() and not list(there.iterdir())


def _fail(workdir, error):
    with workdir.removed_if_unused(), workdir.locked():
        workdir.bind("f")
        workdir.checkpoints.mkdir()
        assert (workdir.path / LOCK).exists()
        raise error


def test_nothing_that_was_there_is_removed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = tmp_path / "run"
    Workdir(run, config_with()).bind("f")
    before = (run / "config.json").read_bytes()
    for path in (tmp_path, run):
        workdir = Workdir(path, config_with())
        with pytest.raises(KeyboardInterrupt):
            _fail(workdir, KeyboardInterrupt())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (run / "config.json").read_bytes() == before
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["teacher.safetensors", "metrics.jsonl", "checkpoints/4/x"])
def test_what_a_start_has_made_is_kept(tmp_path, name):
    workdir = Workdir(tmp_path / "run", config_with())
    with pytest.raises(KeyboardInterrupt), workdir.removed_if_unused(), workdir.locked():
        workdir.bind("f")
        (workdir.path / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir.path / name).write_text("made")
        raise KeyboardInterrupt
    assert (workdir.path / name).read_text() == "made"
    assert (workdir.path / "config.json").exists() and not (workdir.path / LOCK).exists()


def test_other_processes_of_a_run_lock_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with Workdir(tmp_path, config_with()).locked():
        assert not (tmp_path / LOCK).exists()


# The program --------------------------------------------------------------------------------------


def test_the_program_is_refused_where_another_runs(tmp_path, holder, compilation_cache):
    before = (tmp_path / LOCK).read_bytes()
    args = program.arguments(tmp_path, tmp_path / "nowhere.safetensors")
    code, _, err = program.run(args, cache=compilation_cache)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"process {holder.pid} on {ME[1]}, since 2" in line
    assert "Traceback" not in err and holder.poll() is None
    assert os.listdir(tmp_path) == [LOCK] and (tmp_path / LOCK).read_bytes() == before
