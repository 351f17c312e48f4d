"""Files of tensors, told apart by their content: PyTorch, safetensors, NumPy and Flax (msgpack)."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors

from ait_jax.convert.content import describe_content
from ait_jax.convert.errors import WeightsError
from ait_jax.convert.tensor_sets import dicts_in
from ait_jax.convert.torch_file import read_torch_file

__all__ = ["READABLE", "is_of_flax", "read_tensors"]

READABLE = (
    "a PyTorch checkpoint (.pth, .pt, .th, .bin, .ckpt or any other name), a file of safetensors, "
    "NumPy (.npz) or Flax (.msgpack), or a folder saved by Orbax"
)

# The names of dtypes in safetensors. Those of less than a byte are packed, and not read.
_SAFETENSORS_DTYPES: dict[str, Any] = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
    "C64": "complex64",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
_HEAD = 512
_LONGEST_HEADER = 100_000_000  # of safetensors, by its definition


def read_tensors(path: Path) -> Any:
    """What a file holds, without executing anything in it.

    Args:
        path: of a file; its name does not matter.

    Returns:
        Nested dicts with numpy arrays in them, and what else PyTorch's files hold; bfloat16 and
        float8 as of `ml_dtypes`. Names with slashes are taken apart into dicts.

    Raises:
        WeightsError: if it is no file of tensors, or damaged; says what it looks like.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if _is_safetensors(head):
            return _taken_apart(_read_safetensors(path), path)
        if _is_msgpack(head):
            return _read_msgpack(path)
        if head[:2] == b"PK" and _is_npz(path):
            return _taken_apart(_read_npz(path), path)
    except OSError as error:
        raise WeightsError(
            f"teacher.weights: {path} cannot be read: {error.strerror or error}"
        ) from error
    if head[:2] == b"PK" or _is_pickle(head):
        return read_torch_file(path)
    raise WeightsError(
        f"teacher.weights: {path} cannot be read, {describe_content(head)}; it must be {READABLE}"
    )


def is_of_flax(tree: Any) -> bool:
    """Whether nested dicts hold Flax variables, rather than PyTorch's names."""
    return any("kernel" in node for _, node in dicts_in(tree))


def _is_pickle(head: bytes) -> bool:
    return len(head) > 1 and head[0] == 0x80 and head[1] <= 5


def _is_msgpack(head: bytes) -> bool:
    """Whether it starts with a map whose first key is text."""
    if head[:1] in (b"\xde", b"\xdf"):
        head = head[2 if head[0] == 0xDE else 4 :]
    elif not head or not 0x81 <= head[0] <= 0x8F:
        return False
    return len(head) > 1 and (0xA0 <= head[1] <= 0xBF or head[1] in (0xD9, 0xDA))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # The reader of PyTorch's archives says what is wrong.
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error
    tensors = {}
    for name, entry in entries:
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"teacher.weights: {path} cannot be read: tensor {name} is of {entry['dtype']}, "
                f"and known are {', '.join(_SAFETENSORS_DTYPES)}"
            )
        tensors[name] = np.frombuffer(entry["data"], np.dtype(dtype)).reshape(entry["shape"])
    return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # Damaged bytes make zipfile, zlib and numpy fail in any way.
        raise _damaged(path, error) from error


def _read_msgpack(path: Path) -> Any:
    try:
        return flax.serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # Likewise msgpack, and Flax, which makes arrays of what it read.
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> WeightsError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsError(f"teacher.weights: {path} cannot be read: {reason:.300}")


def _taken_apart(flat: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    for name in flat:
        inside = next((other for other in flat if other.startswith(name + "/")), None)
        if inside is not None:
            raise WeightsError(f"{path}: {name!r} cannot be a tensor and hold {inside!r} as well")
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")
