"""Read PyTorch checkpoints with numpy alone, without running what is in the file.

Both layouts of ``torch.save`` are known, a pickle plus raw storages: the zip archive (torch >= 1.6)
and the legacy stream (before it). torch itself is imported only when a file holds something that
`torch_pickle` does not know.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import pickle
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ait_jax.convert import torch_pickle
from ait_jax.convert.content import describe_content
from ait_jax.convert.errors import WeightsError
from ait_jax.convert.tensor_sets import choose_set, unwrapped
from ait_jax.convert.torch_pickle import NotDenseError, Storage, UnsupportedError

__all__ = ["TorchFileError", "read_state_dict", "read_torch_file"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ALLOWED = "allowed is a file that torch.save wrote (.th, .pth, .pt) with a state_dict in it"


class TorchFileError(WeightsError):
    """A checkpoint could not be read; the message names the file, the cause and what is allowed."""


def _read_legacy(path: Path, file: BinaryIO, size: int) -> Any:
    # Mapped, so that storages are copied once, into their arrays; freed with its last view.
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head = io.BytesIO(data[:1024])  # no more: any other file would be scanned to its end
    try:
        magic, _ = torch_pickle.load(head)
    except (NotDenseError, UnsupportedError):
        raise
    except Exception:  # arbitrary bytes make a pickle fail in any way
        magic = None
    if magic != _LEGACY_MAGIC:
        words = describe_content(data[:512])
        raise TorchFileError(f"{path}: not a PyTorch file, {words}; {_ALLOWED}")
    data.seek(head.tell())
    protocol, _ = torch_pickle.load(data)
    if protocol != _LEGACY_PROTOCOL:
        raise UnsupportedError(f"the legacy protocol {reprlib.repr(protocol)}")
    torch_pickle.load(data)  # sys_info; storages are little-endian whatever it says
    value, storages = torch_pickle.load(data)
    keys, _ = torch_pickle.load(data)
    raw: dict[str, memoryview] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise pickle.UnpicklingError(f"storage {reprlib.repr(key)}, which no tensor refers to")
        start = data.tell() + 8
        numel = int.from_bytes(data.read(8), "little")
        end = start + numel * storage.dtype.itemsize
        if numel != storage.numel or end > size:
            raise pickle.UnpicklingError(
                f"storage {key!r} should hold {storage.numel} elements, its header says {numel}, "
                f"and {max(size - start, 0)} bytes of the file remain"
            )
        raw[key] = memoryview(data)[start:end]
        data.seek(end)
    return torch_pickle.build(value, lambda storage: raw[storage.key], size)


def _read_zip(path: Path, file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(pickles) != 1:
            raise TorchFileError(
                f"{path}: a zip archive that is not a PyTorch file, its entries {names[:4]} do not "
                f"include one <name>/data.pkl; {_ALLOWED}"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if any(name.startswith((f"{prefix}constants.pkl", f"{prefix}code/")) for name in names):
            raise TorchFileError(
                f"{path}: a TorchScript archive, which is a program; save the weights alone with "
                f"torch.save(torch.jit.load(file).state_dict(), new_file); {_ALLOWED}"
            )

        def read(name: str, nbytes: int = 0) -> bytes:
            info = archive.getinfo(prefix + name)
            if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a bomb would
                raise UnsupportedError(f"the compressed entry {name!r:.80}")
            if not nbytes <= info.file_size <= size:
                raise pickle.UnpicklingError(
                    f"entry {name!r} has {info.file_size} bytes where {nbytes} are due"
                )
            return archive.read(info)  # checks the CRC

        order = read("byteorder") if f"{prefix}byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise pickle.UnpicklingError(f"the byte order {order!r:.80}")
        value, _ = torch_pickle.load(io.BytesIO(read("data.pkl")))

        def fetch(storage: Storage) -> bytes:
            return read(f"data/{storage.key}", storage.numel * storage.dtype.itemsize)

        return torch_pickle.build(value, fetch, size, swap=order == b"big")


def _read_with_torch(path: Path, found: str) -> Any:
    found = (
        f"{path}: found {found}, which this reader does not know and did not execute (of a model, "
        "save model.state_dict() and nothing else)"
    )
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: its shared libraries do not load
        raise TorchFileError(
            f"{found}; {_ALLOWED}; for torch's own weights_only loader to try it: "
            'pip install "ait_jax[torch]"'
        ) from error

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Size):
            return tuple(value)
        if not isinstance(value, torch.Tensor):
            return value
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        dtype = torch_pickle.EXTENSION_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            return np.array(tensor.numpy())
        # torch gives numpy no types of ml_dtypes; their bits pass as integers of the same width.
        bits = tensor.view(torch.int16 if dtype.itemsize == 2 else torch.uint8)
        return np.array(bits.numpy()).view(dtype)

    try:
        value = torch.load(str(path), map_location="cpu", weights_only=True)
        return torch_pickle.map_leaves(value, leaf)
    except Exception as error:  # torch raises many types here, and the promise is one
        reason = re.sub(r"\x1b\[\d*m", "", (str(error).splitlines() or [""])[0])
        raise TorchFileError(
            f"{found}; torch's weights_only loader failed too, {type(error).__name__}: "
            f"{reason:.300}; {_ALLOWED}"
        ) from error


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint of ``torch.save`` without executing anything in it.

    Args:
        path: A file in the zip format (torch >= 1.6) or in the legacy one.

    Returns:
        The saved object with each tensor as a contiguous array that owns its data, bfloat16 and
        the float8 types as those of ``ml_dtypes``; torch dtypes as numpy ones, ``torch.Size`` as
        a tuple, ``torch.device`` as a string; settings (``argparse.Namespace``, paths) as None.

    Raises:
        TorchFileError: The file is missing, unreadable, truncated, no checkpoint, or TorchScript;
            or it refers to something unknown here and torch is missing or refuses it as well.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(512)
            file.seek(0)
            if not head:
                raise TorchFileError(f"{path}: the file is empty; {_ALLOWED}")
            if head[257:262] == b"ustar":
                raise UnsupportedError("the tar format of torch < 0.2")
            return (_read_zip if head[:2] == b"PK" else _read_legacy)(path, file, size)
    except UnsupportedError as error:
        found = str(error)
    except NotDenseError as error:
        raise TorchFileError(
            f"{path}: holds {error}, where dense floating-point ones are needed; {_ALLOWED}"
        ) from error
    except TorchFileError:
        raise
    except OSError as error:
        # Opening names the file in the error; a seek that a damaged zip asked for does not.
        what = "cannot be read" if error.filename else "truncated or damaged"
        reason = error.strerror or str(error)
        raise TorchFileError(f"{path}: {what}, {reason}; {_ALLOWED}") from error
    except Exception as error:  # damaged bytes make pickle, zipfile and numpy fail in any way
        raise TorchFileError(
            f"{path}: truncated or damaged, {type(error).__name__}: {error!s:.300}; {_ALLOWED}"
        ) from error
    return _read_with_torch(path, found)


def read_state_dict(path: str | os.PathLike[str], key: str = "") -> dict[str, np.ndarray]:
    """Reads the flat state dict of a checkpoint; the log says so where it holds several.

    Args:
        path: A checkpoint file, as for `read_torch_file`.
        key: Which of its state dicts, as for `choose_set`: where the dict lies, such as
            "state_dict_ema"; "": the one that is there by convention, under ``state_dict`` and the
            like or at the top.

    Returns:
        Arrays by name, in the file's order, without the ``module.`` that DataParallel puts before
        every name and the likes of it. Entries that are not tensors are dropped.

    Raises:
        TorchFileError: As for `read_torch_file`, or the file holds no named tensors.
        WeightsError: If there is no such state dict, or several without one by convention.
    """
    value = read_torch_file(path)
    found = choose_set(value, key=key, source=str(path))
    if found is None:
        held = f"the keys {reprlib.repr(list(value))}" if isinstance(value, dict) else "no dict"
        raise TorchFileError(
            f"{path}: no named tensors, found a {type(value).__name__} with {held}; allowed is a "
            "dict of tensors, at the top level or under a key such as state_dict"
        )
    return unwrapped(found.tensors)
