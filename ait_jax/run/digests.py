"""Digests of a checkpoint's files: a byte that has changed on disk is told, not trained with.

Tensorstore keeps checksums of its indices, but none of the numbers of an array. Object stores keep
their own, so this is for folders of this machine.
"""

import hashlib
import json
from pathlib import Path

from ait_jax.run.storage import write_whole

__all__ = ["DIGESTS", "changed_file", "write_digests"]

DIGESTS = "digests.json"

# Orbax writes these after all others; no part of a state is read from them.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_digests(folder: Path) -> None:
    """Writes the SHA-256 of each file under a folder into `digests.json` there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    digests = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in files
        if path.name not in _LATER
    }
    write_whole(folder / DIGESTS, json.dumps(digests, indent=1) + "\n")


def changed_file(folder: Path) -> str | None:
    """Compares the files of a folder with their digests.

    Args:
        folder: which holds `digests.json`.

    Returns:
        The file that has changed, and how; None if all are as they were written.
    """
    try:
        digests = dict(json.loads((folder / DIGESTS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        return f"{DIGESTS} cannot be read ({error})"
    for name, digest in digests.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
