"""The pickle inside a PyTorch checkpoint: inert stand-ins instead of objects, then arrays.

`load` knows a fixed list of names, the ones of torch as stand-ins, and refuses all others; `build`
makes numpy arrays of the stand-ins once the raw bytes of the storages are at hand.
"""

from __future__ import annotations

import io
import math
import operator
import pickle
import pickletools
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = [
    "EXTENSION_DTYPES",
    "NotDenseError",
    "Storage",
    "UnsupportedError",
    "build",
    "load",
    "map_leaves",
]

# Repeated views and stride 0 let a tiny file ask for any amount of memory; this bounds their sum.
_EXPANSION_FLOOR, _EXPANSION_FACTOR = 1 << 30, 16
# Hashing a tuple recurses in C without a guard: a pickle of 100,000 nested ones kills the process.
_MAX_TUPLE_DEPTH = 200

_STANDARD = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"
_EXTENSION = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
EXTENSION_DTYPES = {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENSION.split()}
_DTYPES = {name: np.dtype(name) for name in f"{_STANDARD} complex64 complex128".split()}
_DTYPES |= EXTENSION_DTYPES
_STORAGES = {
    "HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16", "BoolStorage": "bool", "ByteStorage": "uint8",
    "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32", "LongStorage": "int64",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8", "_UntypedStorage": "uint8",
}  # fmt: skip


class UnsupportedError(Exception):
    """The file may be sound, but it holds something that only torch itself could read."""


class NotDenseError(Exception):
    """The file holds tensors that are no dense floating-point numbers; the message says which."""


# The stand-ins are tuples or have __slots__ so that a pickle's BUILD opcode cannot alter them.
class Storage(NamedTuple):
    """A storage in the file.

    Attributes:
        dtype: of its elements.
        key: its name in the file.
        numel: elements that it has.
        start: the first element that is in use.
        length: elements from there on that are in use.
    """

    dtype: np.dtype
    key: str
    numel: int
    start: int = 0
    length: int = 0


class _Tensor(NamedTuple):
    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dtype:
    """A torch dtype, a storage type or a numpy dtype (whose BUILD step sets the byte order)."""

    __slots__ = ("value",)

    def __init__(self, value: np.dtype) -> None:
        self.value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(">" if state[1] == ">" else "<")


class _Settings:
    """In the place of a training script's settings, which nobody reads; takes and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Settings:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, *_: Any) -> None:
        pass


class _Call:
    """One of the functions below; a plain function would let BUILD set its attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(operator.index(value) for value in values)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, storage.dtype, operator.index(offset), _ints(size), _ints(stride))


def _rebuild_tensor_v2(*args: Any) -> _Tensor:  # as above, requires_grad, hooks[, metadata]
    if any(args[6:]):  # lazily conjugated or negated views
        raise UnsupportedError(f"a tensor with the metadata {reprlib.repr(args[6])}")
    return _rebuild_tensor(*args[:4])


def _rebuild_tensor_v3(*args: Any) -> _Tensor:  # as above, requires_grad, hooks, dtype[, metadata]
    return _rebuild_tensor_v2(*args[:6], *args[7:])._replace(dtype=args[6].value)


def _numpy_dtype(name: Any, *_: Any) -> _Dtype:
    if not (isinstance(name, str) and re.fullmatch(r"[biufc]\d{1,2}", name)):
        raise UnsupportedError(f"the numpy dtype {reprlib.repr(name)}")
    return _Dtype(np.dtype(name))


def _numpy_scalar(dtype: _Dtype, data: bytes) -> np.generic:
    return np.frombuffer(data, dtype.value, 1)[0]


def _encode(text: str, encoding: str) -> bytes:
    # Protocol 2 has no opcode for bytes: Python 3 writes them as latin-1 text plus this call.
    if encoding != "latin1":
        raise UnsupportedError(f"text in the encoding {reprlib.repr(encoding)}")
    return text.encode("latin-1")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: data,
    ("torch", "Size"): _ints,
    ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts),
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("_codecs", "encode"): _encode,
}
# Parts of the names that torch makes such tensors by, in lower case, and what they are.
_NOT_DENSE = (
    ("qtensor", "quantized tensors, which tensor.dequantize() makes floats of"),
    ("qint", "quantized tensors, which tensor.dequantize() makes floats of"),
    ("quint", "quantized tensors, which tensor.dequantize() makes floats of"),
    ("sparse", "sparse tensors, which tensor.to_dense() makes dense"),
    ("meta_tensor", "tensors without values, of the device 'meta'"),
)
# What training scripts put beside the weights, their arguments above all.
_SETTINGS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
}
_TYPES = {"set": set, "frozenset": frozenset, "dict": dict, "list": list, "complex": complex}


class _Unpickler(pickle.Unpickler):
    """An unpickler that resolves only the names above; `storages` collects what it meets.

    Hostile input is shown through reprlib: a repr of shared references can grow exponentially.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")  # as torch reads Python 2 files
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _Call(_FUNCTIONS[module, name])
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("collections", "defaultdict"):
            return _Call(lambda *_: OrderedDict())  # Without what it makes of missing keys.
        if name in _SETTINGS.get(module, ()):
            return _Settings
        if module in ("builtins", "__builtin__") and name in _TYPES:
            return _TYPES[name]
        if module == "torch" and name in _DTYPES:
            return _Dtype(_DTYPES[name])
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _Dtype(_DTYPES[_STORAGES[name]])
        if module.startswith("torch"):
            for pattern, kind in _NOT_DENSE:
                if pattern in name.lower():
                    raise NotDenseError(f"{kind} ({module}.{name})"[:200])
        raise UnsupportedError(f"a reference to {f'{module}.{name}':.120}")

    def persistent_load(self, pid: Any) -> Storage:
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise UnsupportedError(f"the persistent id {reprlib.repr(pid)}")
        if not (isinstance(pid[1], _Dtype) and isinstance(pid[2], str)):
            raise pickle.UnpicklingError("a storage without a type or a key")
        numel = operator.index(pid[4])
        root = Storage(pid[1].value, pid[2], numel, 0, numel)
        if numel < 0 or self.storages.setdefault(root.key, root) != root:
            raise pickle.UnpicklingError(f"contradicting sizes or types of storage {root.key!r}")
        if len(pid) == 6 and pid[5] is not None:  # legacy: a storage that is part of another
            _, start, length = pid[5]
            root = root._replace(start=operator.index(start), length=operator.index(length))
            if not 0 <= root.start <= root.start + root.length <= numel:
                raise pickle.UnpicklingError(f"a view out of the bounds of storage {root.key!r}")
        return root


def _scan(file: Any) -> None:
    """Steps over one pickle, refusing what would exhaust memory or the C stack."""
    stack: list[int] = []  # how deep tuples nest in each entry; -1 is a mark
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name, before, inside = opcode.name, list(opcode.stack_before), [0]
        index: Any = len(memo) if name == "MEMOIZE" else argument
        if name.startswith("EXT"):  # the registry's cache of objects would bypass find_class
            raise UnsupportedError(f"the pickle opcode {name}")
        if "PUT" in name or name == "MEMOIZE":
            if index > count:  # the C unpickler would allocate a table up to this index
                raise pickle.UnpicklingError("a memo index out of order")
            memo[index] = stack[-1]
            continue
        if pickletools.markobject in before:
            while (depth := stack.pop()) >= 0:
                inside.append(depth)
            before = before[: before.index(pickletools.markobject)]
        inside += [stack.pop() for _ in before]
        depth = memo[index] if name.endswith("GET") else max(inside)
        depth += name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
        if depth > _MAX_TUPLE_DEPTH:
            raise pickle.UnpicklingError(f"more than {_MAX_TUPLE_DEPTH} nested tuples")
        stack += [-1] if name == "MARK" else [depth] * len(opcode.stack_after)


def load(file: Any) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from a file's position on: its value with stand-ins, its storages by key."""
    start = file.tell()
    _scan(file)
    end = file.tell()
    file.seek(start)
    unpickler = _Unpickler(file.read(end - start))
    return unpickler.load(), unpickler.storages


class _Builder:
    """Turns the stand-ins of one file into arrays."""

    def __init__(self, fetch: Callable[[Storage], Any], file_size: int, swap: bool) -> None:
        self._fetch, self._swap = fetch, swap
        self._flat: dict[str, np.ndarray] = {}
        self._budget = max(_EXPANSION_FLOOR, _EXPANSION_FACTOR * file_size)

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, _Dtype):
            return leaf.value
        if isinstance(leaf, _Call):
            raise UnsupportedError("a function in the place of a value")
        if isinstance(leaf, _Settings) or leaf is _Settings:
            return None
        if isinstance(leaf, Storage):
            return self._storage(leaf).copy()
        return self._tensor(leaf) if isinstance(leaf, _Tensor) else leaf

    def _storage(self, storage: Storage) -> np.ndarray:
        if storage.key not in self._flat:
            dtype = storage.dtype
            flat = np.frombuffer(self._fetch(storage), dtype, storage.numel)
            if self._swap:  # in two halves for complex; as integers, for ml_dtypes cannot swap
                unit = np.dtype(f"u{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
                flat = flat.view(unit).byteswap().view(dtype)
            self._flat[storage.key] = flat
        return self._flat[storage.key][storage.start : storage.start + storage.length]

    def _tensor(self, tensor: _Tensor) -> np.ndarray:
        shape, strides, itemsize = tensor.shape, tensor.strides, tensor.dtype.itemsize
        flat = self._storage(tensor.storage)
        if tensor.dtype != flat.dtype:
            flat = flat[: flat.size // itemsize * itemsize].view(tensor.dtype)
        last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if min((tensor.offset, *shape, *strides)) < 0:
            raise pickle.UnpicklingError("a tensor with a negative offset, size or stride")
        if 0 in shape:
            return np.zeros(shape, tensor.dtype)
        if last >= flat.size:
            raise pickle.UnpicklingError(
                f"a tensor of shape {shape}, strides {strides}, offset {tensor.offset} out of the "
                f"bounds of storage {tensor.storage.key!r} with {flat.size} elements"
            )
        self._budget -= math.prod(shape) * itemsize
        if self._budget < 0:
            raise pickle.UnpicklingError(f"views that expand far beyond the file, to {shape}")
        # The stride of a dimension of size 1 is arbitrary and may overflow.
        steps = [step * itemsize if n > 1 else 0 for n, step in zip(shape, strides, strict=True)]
        array = np.empty(shape, tensor.dtype)
        # As integers, for numpy cannot stride float8_e5m2; there are none as wide as complex128.
        unit = f"u{itemsize}" if itemsize <= 8 else tensor.dtype
        flat = flat[tensor.offset :].view(unit)
        array.view(unit)[...] = np.lib.stride_tricks.as_strided(flat, shape, steps)
        return array


def map_leaves(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Rebuilds nested containers with `leaf` applied to everything else, once per object."""
    done: dict[int, Any] = {}

    def visit(value: Any) -> Any:
        if id(value) in done:
            return done[id(value)]
        kind: Any = type(value)  # exact types: the stand-ins are tuples, torch.Size as well
        if kind in (dict, OrderedDict):
            done[id(value)] = result = kind()
            for key, item in kind.items(value):  # of the type: BUILD can set items on the object
                result[visit(key)] = visit(item)
        elif kind is list:
            done[id(value)] = result = []
            result.extend(map(visit, value))
        else:
            inner = kind in (tuple, set, frozenset)
            done[id(value)] = result = kind(map(visit, value)) if inner else leaf(value)
        return result

    return visit(value)


def build(
    value: Any, fetch: Callable[[Storage], Any], file_size: int, *, swap: bool = False
) -> Any:
    """Replaces the stand-ins in a value from `load` by numpy dtypes and arrays that own their data.

    Args:
        value: from `load`.
        fetch: gives the bytes of a whole storage.
        file_size: bounds the memory that the arrays may take.
        swap: whether these bytes are big-endian.

    Returns:
        The value, its stand-ins replaced.
    """
    return map_leaves(value, _Builder(fetch, file_size, swap))
