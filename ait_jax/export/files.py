"""The folder of an artefact: written whole or not at all, read with every byte checked.

docs/format.md describes it byte by byte.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ait_jax.export.artefact import Artefact
from ait_jax.export.manifest import MANIFEST, ArtefactError, parse_manifest

__all__ = ["README", "TENSORS", "check_vacant", "read_artefact", "write_artefact"]

TENSORS = "model.safetensors"
README = "README.md"

_DTYPES = {"uint8": "U8", "int32": "I32", "float32": "F32"}
# In the header of the tensors' file, so that a manifest that was changed is found out.
_MANIFEST_SUM = "manifest_sha256"


def write_artefact(
    artefact: Artefact,
    folder: Path,
    readme: Callable[[int], str],
    *,
    programs: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> int:
    """Writes a folder, whole or not at all.

    Args:
        artefact: what it holds; `manifest["tensors"]` is made here.
        folder: created, with the folders above it.
        readme: the model card, given the size of the tensors' file in bytes.
        programs: other forms of the network, by the name of the file.
        force: whether an artefact that is there already is replaced.

    Returns:
        The size of the tensors' file in bytes.

    Raises:
        ArtefactError: if something is there already (that is no artefact, with `force`), or it
            cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_vacant(folder, force=force)
    tensors = artefact.tensors()
    entries = {name: _entry(array) for name, array in tensors.items()}
    manifest = _json(artefact.manifest | {"tensors": entries})
    parse_manifest(manifest, str(folder / MANIFEST))
    try:
        with _whole(folder) as partial:
            (partial / MANIFEST).write_bytes(manifest)
            metadata = {_MANIFEST_SUM: hashlib.sha256(manifest).hexdigest()}
            safetensors.numpy.save_file(tensors, partial / TENSORS, metadata)
            size = (partial / TENSORS).stat().st_size
            for name, program in (programs or {}).items():
                (partial / name).write_bytes(program)
            (partial / README).write_text(readme(size))
            for file in partial.iterdir():
                file.chmod(0o644)  # safetensors leaves its own to the owner alone.
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{folder} cannot be written: {error}") from error
    return size


def check_vacant(folder: Path, *, force: bool) -> None:
    """Checks that an artefact may be written there.

    Raises:
        ArtefactError: as `write_artefact`.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder) and not force:
        raise ArtefactError(f"{folder} exists already: choose another folder, or --force")
    if os.path.lexists(folder) and not (folder / MANIFEST).is_file():
        raise ArtefactError(f"{folder} is no artefact, and is not replaced: choose another folder")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, or vanishes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        new, old = beside / "new", beside / "old"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _json(manifest: dict[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=1)
    # Arrays of numbers in one line; text in JSON has no line ends.
    text = re.sub(r"\[\n[-+.,\deE\s]*\]", lambda match: " ".join(match[0].split()), text)
    return text.encode() + b"\n"


def _entry(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[array.dtype.name],
        "shape": list(array.shape),
        "sha256": hashlib.sha256(array.data).hexdigest(),
    }


def read_artefact(folder: Path) -> Artefact:
    """Reads a folder, and checks every byte that it uses.

    Args:
        folder: as `write_artefact` has written it.

    Returns:
        What it holds.

    Raises:
        ArtefactError: if it is no artefact, of another format version, incomplete or damaged.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{folder} is no artefact: {path} cannot be read: {error}") from error
    manifest = parse_manifest(data, str(path))
    tensors = _read_tensors(folder / TENSORS, manifest, hashlib.sha256(data).hexdigest())
    for part in ("scale", "zero_point"):
        if [site[part] for site in manifest["sites"]] != tensors[f"sites/{part}"].tolist():
            raise ArtefactError(f"{path}: the {part}s of its sites are not those of {TENSORS}")
    return Artefact.from_tensors(manifest, tensors)


def _read_tensors(path: Path, manifest: dict[str, Any], manifest_sum: str) -> dict[str, np.ndarray]:
    listed = manifest["tensors"]
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
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    for name, array in tensors.items():
        if _entry(array)["sha256"] != listed[name]["sha256"]:
            raise ArtefactError(
                f"{path} is damaged: {name!r} has another checksum than {MANIFEST}'s"
            )
    if metadata.get(_MANIFEST_SUM) != manifest_sum:
        raise ArtefactError(f"{path.parent / MANIFEST} was changed since {path} was written")
    return tensors


def _check_names(path: Path, stored: set[str], listed: set[str]) -> None:
    for where, names in (
        (f"{path} has", stored - listed),
        (f"{MANIFEST} lists", listed - stored),
    ):
        if names:
            other = MANIFEST if names <= stored else str(path)
            raise ArtefactError(f"{where} the tensor {min(names)!r}, and {other} does not")
