"""Where a run's files are: folders of this machine, or of an object store such as gs://.

An object store has no files that grow, and shows an object only when it is whole.
"""

import os
import time
from pathlib import Path
from typing import Any

from etils import epath

from ait_jax.errors import UserError

__all__ = [
    "PathError",
    "StorageError",
    "absolute",
    "is_remote",
    "open_growing",
    "run_path",
    "user_path",
    "write_whole",
]

# An object that grows is written anew; a store may take one write of it a second.
_REWRITE_SECONDS = 30.0


class StorageError(UserError):
    """An object store that cannot be reached; says which."""


class PathError(UserError):
    """A path that begins with the home of a user whom nobody knows; names both."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of an object store."""
    return "://" in os.fspath(path)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A local path as the user gave it, `~` and `~NAME` at its start being homes.

    Shells leave `~` as it is in `--out=~/x`, and in all that is no word of its own.

    Raises:
        PathError: if there is no user of that name, nor a file.
    """
    text = os.fspath(path)
    expanded = os.path.expanduser(text)
    first = text.split("/")[0]
    if first.startswith("~") and expanded == text and not os.path.lexists(first):
        raise PathError(
            f"'{text}' is not allowed: there is no user {first[1:]!r}, whose home {first!r} would "
            f"be; a file of that name is './{text}'"
        )
    return Path(expanded)


def absolute(path: str | os.PathLike[str]) -> str:
    """An absolute local path (Orbax fails late, in the background, on relative ones); URLs stay.

    Raises:
        PathError: as `user_path`.
    """
    return os.fspath(path) if is_remote(path) else os.path.abspath(user_path(path))


def run_path(path: str | os.PathLike[str]) -> Path:
    """The path of a run's folder, with the methods of `pathlib.Path` for URLs as well.

    Raises:
        StorageError: if the packages that reach the store are not installed.
    """
    if not is_remote(path):
        return Path(absolute(path))
    remote: Any = epath.Path(os.fspath(path))
    try:
        remote.exists()
    except ImportError as error:
        raise StorageError(
            f"'{path}' is not allowed: {error}; for gs:// pip install 'ait_jax[gcs]'"
        ) from error
    return remote


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old or the new content, never a part.

    Not even if the power fails: the content is on disk before it gets its name.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class _Synced:
    """A file of this machine: there at each `write`, on disk at `close`."""

    def __init__(self, path: Path):
        self._file = path.open("a")

    def write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


class _Rewritten:
    """An object, written anew now and then, and at `close`."""

    def __init__(self, path: Path):
        self._path = path
        self._text = path.read_text() if path.exists() else ""
        self._written = time.monotonic()

    def write(self, text: str) -> None:
        self._text += text
        if time.monotonic() - self._written > _REWRITE_SECONDS:
            self.close()
            self._written = time.monotonic()

    def close(self) -> None:
        write_whole(self._path, self._text)


def open_growing(path: Path) -> _Synced | _Rewritten:
    """Opens a file to append text: `write(text)`; `close()` makes sure that it is kept."""
    return _Rewritten(path) if is_remote(path) else _Synced(path)
