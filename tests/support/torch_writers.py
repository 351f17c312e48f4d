"""In place of torch: writers of checkpoints, sound and hostile, and a fake of its loader."""

import io
import pickle
import struct
import types
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


class Storage:
    """Stands for a torch storage: its pickled type name and its elements."""

    view: Any = None

    def __init__(self, kind, array):
        self.kind, self.array = kind, np.ascontiguousarray(array).reshape(-1)


class Tensor:
    """Stands for a torch tensor: a strided view of a storage, in elements."""

    def __init__(self, storage, shape, strides=None, offset=0, rebuild="_rebuild_tensor_v2"):
        if strides is None:
            strides = np.empty(shape, np.int8).strides  # of one byte: counts elements
        self.args: list[Any] = [storage, offset, tuple(shape), tuple(strides)]
        if rebuild == "_rebuild_tensor_v2":
            self.args += [False, OrderedDict()]
        self.rebuild = ("torch._utils", rebuild)


class Parameter:
    def __init__(self, tensor):
        self.args: tuple[Any, ...] = (tensor, True, OrderedDict())
        self.rebuild = ("torch._utils", "_rebuild_parameter")


class Call:
    """Pickles as a call of any global, known or hostile."""

    def __init__(self, module, name, *args):
        self.rebuild, self.args = (module, name), args


class Global:
    def __init__(self, module, name):
        self.rebuild = (module, name)


def simple(kind, array):
    array = np.asarray(array, None if isinstance(array, np.ndarray) else "f4")
    return Tensor(Storage(kind, array), array.shape)


PythonPickler: Any = pickle._Pickler  # unlike the C one it can write a global by name alone


class Pickler(PythonPickler):
    def __init__(self, file, legacy, protocol):
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, {}

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        key = next((k for k, s in self.storages.items() if s is obj), str(len(self.storages)))
        self.storages[key] = obj
        pid = ("storage", Global("torch", f"{obj.kind}Storage"), key, "cpu", obj.array.size)
        return (*pid, obj.view) if self.legacy else pid

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.rebuild).encode())
        elif isinstance(obj, (Tensor, Parameter, Call)):
            self.save(Global(*obj.rebuild))
            self.save(tuple(obj.args))
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def to_pickle(obj, legacy=False, protocol=2):
    file = io.BytesIO()
    pickler = Pickler(file, legacy, protocol)
    pickler.dump(obj)
    return file.getvalue(), pickler.storages


def legacy_bytes(obj):
    body, storages = to_pickle(obj, legacy=True)
    parts = [pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True})]
    parts += [body, pickle.dumps(sorted(storages), 2)]
    for key in sorted(storages):
        array = storages[key].array
        parts += [struct.pack("<q", array.size), array.tobytes()]
    return b"".join(parts)


def zip_bytes(obj, order="little", extra=(), protocol=2):
    body, storages = to_pickle(obj, protocol=protocol)
    entries = {"data.pkl": body, "byteorder": order.encode(), **dict(extra)}
    for key, storage in storages.items():
        array = storage.array.byteswap() if order == "big" else storage.array
        entries[f"data/{key}"] = array.tobytes()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"net/{name}", data)
    return file.getvalue()


def fake_torch(load):
    """As much of torch as the fallback touches, with numpy arrays inside."""

    class FakeTensor:
        def __init__(self, array, dtype):
            self.array, self.dtype = array, f"torch.{dtype}"

        def same(self, *_):
            return self

        detach = cpu = resolve_conj = resolve_neg = contiguous = view = same

        def numpy(self):
            return self.array

    torch: Any = types.ModuleType("torch")
    torch.Tensor, torch.Size, torch.load = FakeTensor, type("Size", (tuple,), {}), load
    torch.int16 = "int16"
    return torch
