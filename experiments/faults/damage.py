"""Files that have changed between two lives of a run."""

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.faults.stage import Run, Stage

__all__ = ["FAULTS", "flip", "kinds_of_files"]

_STEP = 13
_DAY_SECONDS = 24 * 3600
# Of the files of a checkpoint, see `kinds_of_files`; tests/run/test_workdir.py harms all.
_HARMED = ("state/ocdbt.process_0/d/*", "state/manifest.ocdbt", "record/metadata")
# Nothing is restored from these two.
_HARMLESS = ("_CHECKPOINT_METADATA", "commit_success.txt")


def _record(ended, left, mended, again, fine) -> dict[str, Any]:
    """Of a fault that was mended before the same line was run again."""
    return {
        "processes": ended,
        "left": left,
        "mended": mended,
        "again": again,
        "as_expected": fine,
    }


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def kinds_of_files(checkpoint: Path) -> dict[str, Path]:
    """One file of each kind that a checkpoint has, by its path with `*` for a name of no meaning.

    Of several it is the largest: Orbax gives numbers, indices and manifests folders of their own.
    """
    kinds: dict[str, Path] = {}
    for path in sorted(checkpoint.rglob("*"), key=lambda path: path.stat().st_size):
        if path.is_file():
            name = path.relative_to(checkpoint)
            kinds[str(name.with_name("*") if path.parent.name == "d" else name)] = path
    return kinds


@functools.cache
def _stopped(stage: Stage) -> Run:
    """A run that has been stopped, to be copied."""
    run = stage.run("stopped").start()
    run.wait_for_step(_STEP)
    run.signal(0, signal.SIGTERM)
    run.end()
    return run


def _copy(stage: Stage, name: str) -> tuple[Run, Path]:
    """A run that has been stopped, and its newest checkpoint."""
    run = stage.run(name)
    shutil.copytree(_stopped(stage).workdir, run.workdir)
    return run, run.workdir / "checkpoints" / str(run.left()["checkpoints"][-1])


def _each_file(stage: Stage, *, name: str, harm: Callable[[Path], None]) -> dict[str, Any]:
    """Harms one file after the other, and then does what the message says."""
    run, newest = _copy(stage, name)
    files, ended, fine = {}, [], True
    for kind in _HARMED:
        path = kinds_of_files(newest)[kind]
        sound = path.read_bytes()
        harm(path)
        ended = run.start().end()
        files[kind] = {"code": ended[0]["code"], "said": ended[0]["said"]}
        fine &= ended[0]["code"] == 2 and str(path.relative_to(newest)) in ended[0]["said"]
        path.write_bytes(sound)
    left = run.left()
    shutil.rmtree(newest)
    again = run.again()
    fine &= again["from_step"] == left["checkpoints"][-2]
    return {
        "processes": ended,
        "files": files,
        "left": left,
        "mended": "the folder that the message names was removed",
        "again": again,
        "as_expected": fine,
    }


def _harmless(stage: Stage) -> dict[str, Any]:
    run, newest = _copy(stage, "harmless")
    for path in newest.rglob("*"):
        if path.name in _HARMLESS:
            flip(path)
    return _unnoticed(run)


def _unnoticed(run: Run) -> dict[str, Any]:
    left = run.left()
    again = run.again()
    fine = again["from_step"] == left["checkpoints"][-1]
    return {"left": left, "again": again, "as_expected": fine}


def _two_processes(stage: Stage) -> dict[str, Any]:
    run = stage.run("flipped two", 2).start()
    run.wait_for_step(_STEP)
    run.signal(1, signal.SIGTERM)
    run.end()
    left = run.left()
    newest = run.workdir / "checkpoints" / str(left["checkpoints"][-1])
    flip(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size))
    ended = run.start().end()
    fine = all(process["code"] == 2 for process in ended)
    shutil.rmtree(newest)
    again = run.again()
    fine &= again["from_step"] == left["checkpoints"][-2]
    mended = "the folder that the message names was removed"
    return _record(ended, left, mended, again, fine)


def _truncated_config(stage: Stage) -> dict[str, Any]:
    run, _ = _copy(stage, "truncated config")
    path = run.workdir / "config.json"
    os.truncate(path, path.stat().st_size // 2)
    ended, left = run.start().end(), run.left()
    # As the message says.
    other = stage.run("config from elsewhere").start()
    other.wait_for_step(1)
    other.signal(0, signal.SIGKILL)
    other.end()
    shutil.copy(other.workdir / "config.json", path)
    again = run.again()
    fine = ended[0]["code"] == 2 and again["from_step"] == left["checkpoints"][-1]
    mended = "config.json was copied from a new run of the same line"
    return _record(ended, left, mended, again, fine)


def _clock(stage: Stage) -> dict[str, Any]:
    """For the second life, all that the first one has left is of tomorrow."""
    run, _ = _copy(stage, "clock")
    for path in run.workdir.rglob("_CHECKPOINT_METADATA"):
        times = json.loads(path.read_text())
        for key in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
            times[key] += _DAY_SECONDS * 10**9
        path.write_text(json.dumps(times))
    tomorrow = time.time() + _DAY_SECONDS
    for path in run.workdir.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    record = _unnoticed(run)
    kept = run.left()["checkpoints"]
    record["kept"] = kept
    record["as_expected"] &= kept == [44, 48]
    return record


FAULTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "a bit flipped in a file of the newest checkpoint": functools.partial(
        _each_file, name="flipped", harm=flip
    ),
    "a bit flipped in the newest checkpoint, two processes": _two_processes,
    "a file of the newest checkpoint missing": functools.partial(
        _each_file, name="missing", harm=Path.unlink
    ),
    "a bit flipped in files from which nothing is restored": _harmless,
    "config.json cut in half": _truncated_config,
    "clock set back by a day between two lives": _clock,
}
