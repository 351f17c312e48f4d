"""Arrays that a run keeps at the end of a phase, and banks of images that are there already."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ait_jax.errors import UserError
from ait_jax.run.storage import run_path, write_whole

__all__ = ["read_bank", "save_arrays"]


def save_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as `NAME.npy`, each whole or not at all; the first process does so for all.

    Args:
        folder: of the run, possibly the URL of one.
        arrays: by name, without suffix; whole on every process.
    """
    if jax.process_index() != 0:
        return
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, np.asarray(array), allow_pickle=False)
        write_whole(folder / f"{name}.npy", file.getvalue())


def read_bank(path: str | os.PathLike[str], count: int, image_shape: tuple[int, ...]) -> np.ndarray:
    """The first images of a `.npy` file, as `images.given` names it.

    Args:
        path: of the file, possibly a URL; floats [N, H, W, C], normalised as the teacher takes
            them.
        count: images to read, `images.count`.
        image_shape: (H, W, C).

    Returns:
        float32 [count, H, W, C].

    Raises:
        UserError: if there is no such file, or it holds something else, or fewer images.
    """
    told = f"images.given = '{path}' is not allowed"
    try:
        found = np.load(io.BytesIO(run_path(path).read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{told}: it must be a .npy file of images ({error})") from error
    if not isinstance(found, np.ndarray):
        raise UserError(f"{told}: it holds several arrays, and must hold one")
    if found.dtype.kind != "f" or found.shape[1:] != tuple(image_shape):
        raise UserError(
            f"{told}: it holds {found.dtype} {list(found.shape)}, and must hold floats "
            f"[N, {', '.join(map(str, image_shape))}], normalised as the teacher takes them"
        )
    if len(found) < count:
        raise UserError(
            f"{told} with images.count = {count}: it holds {len(found)} images; set images.count "
            f"to at most {len(found)}"
        )
    images = found[:count].astype(np.float32)
    if not np.isfinite(images).all():
        raise UserError(f"{told}: it holds values that are not finite")
    return images
