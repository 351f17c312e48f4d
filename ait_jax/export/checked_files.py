"""A manifest and its tensors as two files, each with the checksum of the other.

`manifest.json` lists dtype, shape and SHA-256 of every tensor of `model.safetensors`, whose header
holds the SHA-256 of the manifest: a byte that is not what was written is found out.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ait_jax.export.manifest import MANIFEST, TENSOR_ENTRY, ArtefactError, check_object

__all__ = [
    "TENSORS",
    "manifest_bytes",
    "read_manifest",
    "read_tensors",
    "whole_folder",
    "write_checked",
]

TENSORS = "model.safetensors"

_DTYPES = {"uint8": "U8", "int32": "I32", "float32": "F32"}
_MANIFEST_SUM = "manifest_sha256"


def manifest_bytes(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """A manifest as JSON, with a list of its tensors under `tensors`.

    Args:
        manifest: what else is in it.
        tensors: C-contiguous arrays of uint8, int32 or float32, by name.
    """
    entries = {name: _entry(array) for name, array in tensors.items()}
    text = json.dumps({**manifest, "tensors": entries}, indent=1)
    # Arrays of numbers in one line; text in JSON has no line ends.
    text = re.sub(r"\[\n[-+.,\deE\s]*\]", lambda match: " ".join(match[0].split()), text)
    return text.encode() + b"\n"


def write_checked(folder: Path, manifest: bytes, tensors: Mapping[str, np.ndarray]) -> int:
    """Writes both files into a folder that exists.

    Args:
        folder: to write to.
        manifest: of `manifest_bytes`.
        tensors: those that it lists.

    Returns:
        The size of the file of tensors in bytes.

    Raises:
        OSError: if it cannot be written.
        safetensors.SafetensorError: likewise.
    """
    (folder / MANIFEST).write_bytes(manifest)
    metadata = {_MANIFEST_SUM: _sha256(manifest)}
    safetensors.numpy.save_file(dict(tensors), folder / TENSORS, metadata)
    return (folder / TENSORS).stat().st_size


def read_manifest(folder: Path) -> bytes:
    """The bytes of a folder's manifest.

    Raises:
        ArtefactError: if it cannot be read.
    """
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{folder} is no artefact: {folder / MANIFEST} cannot be read: {error}"
        ) from error


def read_tensors(
    folder: Path, listed: Mapping[str, Mapping[str, Any]], manifest: bytes
) -> dict[str, np.ndarray]:
    """Reads the tensors of a folder, and checks every byte of them and of the manifest.

    Args:
        folder: of both files.
        listed: dtype, shape and SHA-256 of each tensor, as in the manifest.
        manifest: the file.

    Returns:
        The arrays by name.

    Raises:
        ArtefactError: if the files cannot be read, or are not those that were written together.
    """
    path = folder / TENSORS
    for name, entry in listed.items():
        check_object(entry, TENSOR_ENTRY, f"{folder / MANIFEST}: tensors[{name!r}]")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            _check_names(path, set(file.keys()), set(listed))
            tensors = {}
            for name, entry in listed.items():
                stored = file.get_slice(name)
                if (stored.get_dtype(), stored.get_shape()) != (entry["dtype"], entry["shape"]):
                    raise ArtefactError(
                        f"{path}: {name!r} is {stored.get_dtype()} {stored.get_shape()}, and "
                        f"{MANIFEST} says {entry['dtype']} {entry['shape']}"
                    )
                tensors[name] = file.get_tensor(name)
            metadata = file.metadata() or {}
        with path.open("rb") as raw:
            header = raw.read(int.from_bytes(raw.read(8), "little"))
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    for name, array in tensors.items():
        if _entry(array)["sha256"] != listed[name]["sha256"]:
            raise ArtefactError(
                f"{path} is damaged: {name!r} has another checksum than {MANIFEST}'s"
            )
    if metadata.get(_MANIFEST_SUM) != _sha256(manifest):
        raise ArtefactError(f"{folder / MANIFEST} was changed since {path} was written")
    # Nothing reads what pads the header, so no checksum covers it.
    if not header.rstrip(b" ").endswith(b"}"):
        raise ArtefactError(f"{path} is damaged: its header must end in }} and spaces")
    return tensors


def _check_names(path: Path, stored: set[str], listed: set[str]) -> None:
    for where, names in (
        (f"{path} has", stored - listed),
        (f"{MANIFEST} lists", listed - stored),
    ):
        if names:
            other = MANIFEST if names <= stored else str(path)
            raise ArtefactError(f"{where} the tensor {min(names)!r}, and {other} does not")


def _entry(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[array.dtype.name],
        "shape": list(array.shape),
        "sha256": hashlib.sha256(array.data).hexdigest(),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, or vanishes.

    Args:
        folder: absolute; what is there is replaced.

    Yields:
        The folder to write to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        yield new
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors leaves its own to the owner alone.
        if os.path.lexists(folder):
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
