"""The folder of an artefact: written whole or not at all, read with every byte checked.

docs/format.md describes it byte by byte.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors

from ait_jax.export.artefact import Artefact
from ait_jax.export.checked_files import (
    TENSORS,
    manifest_bytes,
    read_manifest,
    read_tensors,
    whole_folder,
    write_checked,
)
from ait_jax.export.manifest import MANIFEST, ArtefactError, parse_manifest

__all__ = ["README", "TENSORS", "check_vacant", "read_artefact", "write_artefact"]

README = "README.md"


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
    manifest = manifest_bytes(artefact.manifest, tensors)
    parse_manifest(manifest, str(folder / MANIFEST))
    try:
        with whole_folder(folder) as partial:
            size = write_checked(partial, manifest, tensors)
            for name, program in (programs or {}).items():
                (partial / name).write_bytes(program)
            (partial / README).write_text(readme(size))
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


def read_artefact(folder: Path) -> Artefact:
    """Reads a folder, and checks every byte that it uses.

    Args:
        folder: as `write_artefact` has written it.

    Returns:
        What it holds.

    Raises:
        ArtefactError: if it is no artefact, of another format version, incomplete or damaged.
    """
    path, data = folder / MANIFEST, read_manifest(folder)
    manifest = parse_manifest(data, str(path))
    tensors = read_tensors(folder, manifest["tensors"], data)
    for part in ("scale", "zero_point"):
        if [site[part] for site in manifest["sites"]] != tensors[f"sites/{part}"].tolist():
            raise ArtefactError(f"{path}: the {part}s of its sites are not those of {TENSORS}")
    return Artefact.from_tensors(manifest, tensors)
