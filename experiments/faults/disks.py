"""Disks that are full, and folders that are read-only: small file systems in memory, mounted here.

Root writes into folders whatever their permissions are, so it takes a read-only mount to stop it.
"""

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.faults.stage import Run, Skipped, Stage

__all__ = ["FAULTS"]

_MEGABYTES = 64
_STEP = 13


def _mount(*arguments: str | Path) -> None:
    try:
        subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"cannot mount: {getattr(error, 'stderr', '') or error}".strip()) from error


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A small disk, empty, in place of a folder."""
    if os.geteuid() != 0:
        raise Skipped("only root can mount a disk")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(path: Path, leave: int) -> None:
    """Writes a file until so many bytes are free."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(file.tell() - leave)


def _full(stage: Stage, *, count: int, leave: int) -> dict[str, Any]:
    with _disk(stage.folder / "disk") as disk:
        run = stage.run("run", count, folder=disk).start()
        run.wait_for_step(_STEP)
        _fill(disk / "ballast", leave)
        run.fault()
        ended, left = run.end(), run.left()
        (disk / "ballast").unlink()
        # Process 0 writes; the others lose it.
        codes = [process["code"] for process in ended]
        fine = codes[0] == 2 and all(code == 134 for code in codes[1:])
        return _gone_on(run, ended, left, fine)


def _gone_on(run: Run, ended: list, left: dict[str, Any], fine: bool) -> dict[str, Any]:
    again = run.again()
    fine &= again["from_step"] == left["checkpoints"][-1]
    return {"processes": ended, "left": left, "again": again, "as_expected": fine}


def _checkpoints_read_only(stage: Stage) -> dict[str, Any]:
    with _disk(stage.folder / "disk") as disk:
        run = stage.run("run", folder=disk).start()
        run.wait_for_step(_STEP)
        folder = run.workdir / "checkpoints"
        _mount("--bind", folder, folder)
        try:
            _mount("-o", "remount,bind,ro", folder)
            run.fault()
            ended, left = run.end(), run.left()
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return _gone_on(run, ended, left, ended[0]["code"] == 2)


def _workdir_read_only(stage: Stage) -> dict[str, Any]:
    with _disk(stage.folder / "disk") as disk:
        run = stage.run("run", folder=disk).start()
        run.wait_for_step(_STEP)
        run.signal(0, signal.SIGTERM)
        run.end()
        _mount("-o", "remount,ro", disk)
        ended, left = run.start().end(), run.left()
        _mount("-o", "remount,rw", disk)
        return _gone_on(run, ended, left, ended[0]["code"] == 2)


FAULTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "disk full to the last byte": functools.partial(_full, count=1, leave=0),
    "disk too full for a checkpoint": functools.partial(_full, count=1, leave=1 << 17),
    "disk full, two processes": functools.partial(_full, count=2, leave=0),
    "folder of checkpoints read-only from a step on": _checkpoints_read_only,
    "workdir read-only when the line is run again": _workdir_read_only,
}
