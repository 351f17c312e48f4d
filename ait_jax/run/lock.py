"""The lock of a run's folder: one program at a time writes there.

On one machine the kernel keeps it (`flock`), and lets go of it when the process ends, however it
ends. Where machines share a folder, not every file system tells one of the other's locks, and some
know none at all. There the file itself tells: its owner touches it every few seconds, and whoever
finds the lock of another machine takes it over only after a minute without such a sign of life.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ait_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "LockError", "RunLock"]

LOCK = "run.lock"

_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0
_POLL_SECONDS = 1.0
_MOST_BYTES = 1 << 16

logger = logging.getLogger(__name__)


class LockError(UserError):
    """A folder in which another program is running, or that cannot be locked; says whose it is."""


def _machine() -> str:
    """Names this machine between two starts of it, also inside its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class RunLock:
    """The lock of one folder, of this machine or of a file system that machines share.

    Attributes:
        path: of its file.
    """

    def __init__(self, folder: Path):
        """Names the file; nothing is locked yet."""
        self.path = folder / LOCK
        self._file = -1
        self._heart = threading.Thread()
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Locks the folder until `release`, or the end of the process.

        Raises:
            LockError: if another process has it, or the file cannot be written.
        """
        try:
            while not self._acquired():
                pass
        except OSError as error:
            raise LockError(
                f"--workdir = '{self.path.parent}' is not allowed: it must be a folder that can be "
                f"locked, and {self.path} cannot be written ({error.strerror or error})"
            ) from error
        self._ended.clear()
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Unlocks the folder, and removes the file."""
        self._ended.set()
        self._heart.join(_POLL_SECONDS)
        with contextlib.suppress(OSError):  # The disk may have become read-only.
            if self._in_place(self._file):
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _acquired(self) -> bool:
        """Locks; False if the file was removed meanwhile, and a new one must be made."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            kept = _flock(self._file)
            owner = _read(self._file)
            if kept is False:
                raise LockError(self._refusal(owner))
            if not self._in_place(self._file):
                os.close(self._file)
                return False
            self._take_over(owner, kept=bool(kept))
            if not self._in_place(self._file):  # Its owner has ended while we watched.
                os.close(self._file)
                return False
            self._write(kept=bool(kept))
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(self._file)
            raise
        return True

    def _in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _take_over(self, owner: dict[str, Any] | None, *, kept: bool) -> None:
        """Returns when the owner, if there is one, is known to have ended.

        Args:
            owner: as in the file; None if it was empty.
            kept: whether the kernel keeps locks here, and has given us this one.
        """
        if owner is None:
            return
        if not kept or (owner and owner.get("machine") != _machine()):
            self._watch(owner)
        logger.info("the lock of %s is taken over: it has ended", _named(owner))

    def _watch(self, owner: dict[str, Any]) -> None:
        logger.info(
            "%s is locked by %s: waiting %.0f s for a sign of life",
            *(self.path.parent, _named(owner), _SILENT_SECONDS),
        )
        deadline, before = time.monotonic() + _SILENT_SECONDS, self._seen()
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            if (now := self._seen()) != before:
                if now is None:
                    return
                raise LockError(self._refusal(owner))

    def _seen(self) -> Any:
        """What a sign of life changes; None if the file is gone."""
        try:
            # Opened anew: a network's file system then asks its server.
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                return status.st_mtime_ns, status.st_ino, file.read(_MOST_BYTES)
        except FileNotFoundError:
            return None

    def _write(self, *, kept: bool) -> None:
        now = datetime.datetime.now().astimezone()
        record = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": now.isoformat(" ", "seconds"),
            "command": shlex.join(sys.orig_argv)[:1000],
            "machine": _machine(),
        }
        data = json.dumps(record, indent=1).encode() + b"\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        os.fsync(self._file)
        if not kept:
            # Two may have come at once: the last one to write has it.
            time.sleep(_POLL_SECONDS)
            if (owner := _read(self._file)) != record:
                raise LockError(self._refusal(owner))

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file if os.utime in os.supports_fd else self.path)

    def _refusal(self, owner: dict[str, Any] | None) -> str:
        return (
            f"--workdir = '{self.path.parent}' is not allowed: it is in use by {_named(owner)}; "
            f"wait for its end, or choose another folder (the lock is {self.path.name})"
        )


def _flock(file: int) -> bool | None:
    """Whether this process has the kernel's lock now; None where the file system keeps none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return None
    return True


def _read(file: int) -> dict[str, Any] | None:
    """What an owner has written: None if nothing, an empty dict if it cannot be read."""
    data = os.pread(file, _MOST_BYTES, 0)
    if not data.strip(b"\0 \n"):
        return None
    try:
        owner = json.loads(data)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another process"
    host, pid, since, command = (owner.get(key, "?") for key in ("host", "pid", "since", "command"))
    return " ".join(f"process {pid} on {host}, since {since} ({str(command)[:200]})".split())
