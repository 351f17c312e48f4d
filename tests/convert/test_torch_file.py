"""The checkpoint reader, on files made here without torch and on real ones where present."""

import contextlib
import io
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ait_jax.convert.torch_file import TorchFileError, read_state_dict, read_torch_file
from tests.support import torch_writers as tw

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"
FORMATS = pytest.mark.parametrize("to_bytes", [tw.legacy_bytes, tw.zip_bytes])


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "net.pth"
        path.write_bytes(data)
        return path

    return write


def refusal(path, reader=read_torch_file):
    with pytest.raises(TorchFileError) as caught:
        reader(path)
    assert str(path) in str(caught.value) and "allowed" in str(caught.value)
    return str(caught.value)


@FORMATS
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Float", "f4"), ("Double", "f8"), ("Half", "f2"), ("BFloat16", ml_dtypes.bfloat16),
     ("Long", "i8"), ("Int", "i4"), ("Short", "i2"), ("Char", "i1"), ("Byte", "u1"),
     ("Bool", "?"), ("ComplexFloat", "c8")],
)  # fmt: skip
def test_every_storage_type(write, to_bytes, kind, dtype):
    expected = np.array([[0, 1, 1], [1, 0, 3]]).astype(dtype)
    got = read_torch_file(write(to_bytes({"a": tw.simple(kind, expected)})))["a"]
    assert got.dtype == expected.dtype and got.flags.c_contiguous and got.flags.owndata
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind, dtype", [("Float", "f4"), ("Long", "i8"), ("ComplexDouble", "c16")])
def test_big_endian_zip(write, kind, dtype):
    expected = (np.arange(5) * 1.5).astype(dtype)
    got = read_torch_file(write(tw.zip_bytes([tw.simple(kind, expected)], order="big")))[0]
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, expected)


@FORMATS
def test_views_of_one_storage(write, to_bytes):
    base = np.arange(12, dtype="f4")
    storage = tw.Storage("Float", base)
    as_int32 = (False, {}, tw.Global("torch", "int32"))
    state = {
        "whole": tw.Tensor(storage, (3, 4)),
        "transposed": tw.Tensor(storage, (4, 3), (1, 4)),
        "tail": tw.Tensor(storage, (2, 2), (4, 2), offset=5, rebuild="_rebuild_tensor"),
        "expanded": tw.Tensor(storage, (2, 3), (0, 1), offset=1),
        "scalar": tw.Tensor(storage, (), (), offset=7),
        "one": tw.Tensor(storage, (1, 2), (2**62, 1)),  # the stride of one element means nothing
        "empty": tw.Tensor(tw.Storage("Float", base[:0]), (0, 3)),
        "parameter": tw.Parameter(tw.Tensor(storage, (12,))),
        "retyped": tw.Call("torch._utils", "_rebuild_tensor_v3", storage, 2, (3,), (2,), *as_int32),
    }
    got = read_state_dict(write(to_bytes(state)))
    grid = base.reshape(3, 4)
    expected = {
        "whole": grid, "transposed": grid.T, "tail": [[5, 7], [9, 11]],
        "expanded": [[1, 2, 3]] * 2, "scalar": 7, "one": [[0, 1]], "empty": np.zeros((0, 3)),
        "parameter": base, "retyped": base.view("i4")[2:8:2],
    }  # fmt: skip
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert isinstance(got[name], np.ndarray) and got[name].flags.c_contiguous
        np.testing.assert_array_equal(got[name], value)
    got["whole"][:] = -1
    assert got["parameter"][3] == 3  # copies are independent


@pytest.mark.parametrize(("start", "length"), [(2, 3), (4, 3), (-1, 3)])
def test_legacy_view_of_a_storage(write, start, length):
    storage = tw.Storage("Int", np.arange(6, dtype="i4"))
    storage.view = ("view", start, length)
    path = write(tw.legacy_bytes([tw.Tensor(storage, (3,))]))
    if start == 2:
        np.testing.assert_array_equal(read_torch_file(path)[0], [2, 3, 4])
    else:
        assert "out of the bounds of storage" in refusal(path)


@FORMATS
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net", "weights"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_places(write, to_bytes, key, prefix):
    names = [f"{prefix}fc.b", f"{prefix}fc.a"]
    state = OrderedDict({**{name: tw.simple("Float", [1.0]) for name in names}, "calls": 3})
    vars(state)["_metadata"] = OrderedDict({"": {"version": 1}})  # as Module.state_dict() does
    outer = state if key is None else {"epoch": 7, "best": tw.simple("Float", [2.0]), key: state}
    assert list(read_state_dict(write(to_bytes(outer)))) == ["fc.b", "fc.a"]


def test_prefix_of_some_names_stays(write):
    state = {name: tw.simple("Float", [1.0]) for name in ("module.a", "n_averaged")}
    assert list(read_state_dict(write(tw.zip_bytes(state)))) == ["module.a", "n_averaged"]


@FORMATS
def test_other_values(write, to_bytes):
    float64 = tw.Call("numpy", "dtype", "f8", False, True)
    scalar = tw.Call("numpy.core.multiarray", "scalar", float64, struct.pack("<d", 2.5))
    value = {
        "scalar": scalar, "size": tw.Call("torch", "Size", (2, 3)), "set": {1, 2}, "bytes": b"ab",
        "device": tw.Call("torch", "device", "cuda", 0), "dtype": tw.Global("torch", "bfloat16"),
        "nested": [(1, None), {"x": 2.0}],
    }  # fmt: skip
    expected = {**value, "scalar": 2.5, "size": (2, 3), "device": "cuda:0"}
    expected["dtype"] = np.dtype(ml_dtypes.bfloat16)
    path = write(to_bytes(value))
    assert read_torch_file(path) == expected
    assert "no named tensors" in refusal(path, read_state_dict)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols(write, protocol):
    data = tw.zip_bytes({"a": tw.simple("Float", [1.0]), "b": {1}, "c": b"ab"}, protocol=protocol)
    assert read_torch_file(write(data))["b"] == {1}


@FORMATS
@pytest.mark.parametrize("module", ["os", "posix", "builtins"])
def test_hostile_pickle_is_not_executed(write, tmp_path, to_bytes, module):
    mark = tmp_path / "executed"
    call = (module, "eval", f"open({str(mark)!r}, 'w')")
    call = call if module == "builtins" else (module, "system", f"touch {mark}")
    message = refusal(write(to_bytes({"a": tw.simple("Float", [1.0]), "x": tw.Call(*call)})))
    assert f"{module}.{call[1]}" in message and "did not execute" in message
    assert 'pip install "ait_jax[torch]"' in message and not mark.exists()
    message = refusal(write(tw.to_pickle(tw.Call(*call))[0]))  # a bare pickle
    assert f"{module}.{call[1]}" in message and not mark.exists()


NESTED = pickle.PROTO + b"\x02})" + b"\x85" * 100_000 + b"Ns."
HOSTILE = [
    (NESTED, "nested tuples"),  # as a dict key, its hash would overflow the C stack
    (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index"),  # would allocate 16 GiB
    (b"\x80\x02\x82\x01.", "EXT1"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor\n}X\x01\x00\x00\x00aNsb.", "Error"),  # BUILD
    (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", "a function"),
]


@pytest.mark.parametrize(("body", "found"), HOSTILE, ids=["hash", "memo", "ext", "build", "bare"])
def test_hostile_opcodes(write, body, found):
    assert found in refusal(write(tw.zip_bytes({}, extra=[("data.pkl", body)])))


@FORMATS
@pytest.mark.parametrize(
    ("shape", "strides", "offset", "found"),
    [
        ((2, 2), (2, 1), 1, "out of the bounds"),
        ((4,), (2,), 0, "out of the bounds"),
        ((2,), (-1,), 3, "negative"),
        ((2,), (1,), -1, "negative"),
        ((-2,), (1,), 0, "negative"),
        ((2, 2), (1,), 0, "ValueError"),
        ((2.0,), (1,), 0, "TypeError"),
        ((2**40,), (0,), 0, "expand far beyond"),
        ((1,) * 70, (1,) * 70, 0, "ValueError"),
    ],
)
def test_impossible_tensors(write, to_bytes, shape, strides, offset, found):
    tensor = tw.Tensor(tw.Storage("Float", np.ones(4, "f4")), shape, strides, offset)
    assert found in refusal(write(to_bytes([tensor])))


def test_storage_longer_than_the_file(write):
    data = tw.legacy_bytes([tw.simple("Float", [1.0, 2.0])])
    for numel in (3, 2**40, 2**63):
        lying = data[:-16] + struct.pack("<Q", numel) + data[-8:]
        assert f"its header says {numel}" in refusal(write(lying))
    body, _ = tw.to_pickle([tw.simple("Float", [1.0, 2.0])])
    short = tw.zip_bytes([tw.simple("Float", [1.0])], extra=[("data.pkl", body)])
    assert "has 4 bytes where 8 are due" in refusal(write(short))
    none = tw.zip_bytes({}, extra=[("data.pkl", body)])
    assert "net/data/0" in refusal(write(none))


@FORMATS
def test_truncation_at_every_byte(write, to_bytes):
    state = {"a": tw.simple("Float", [1.0, 2.0]), "b": tw.simple("Half", [])}
    data = to_bytes({"state_dict": state})
    for length in range(len(data)):
        refusal(write(data[:length]))


@FORMATS
def test_random_changes_never_end_otherwise(write, to_bytes):
    rng = random.Random(0)
    size = tw.Call("torch", "Size", (2,))
    data = to_bytes({"a": tw.simple("Float", [1.0, 2.0]), "e": 3, "s": size})
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(TorchFileError):
            read_torch_file(write(bytes(changed)))


@pytest.mark.parametrize("head", [b"", b"PK", b"PK\3\4", b"\x80\2", pickle.dumps(tw.MAGIC, 2)])
def test_random_bytes(write, head):
    rng = random.Random(1)
    for size in range(1, 150, 2):
        refusal(write(head + rng.randbytes(size)))


def test_files_of_other_kinds(write, tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.pth")
    assert "directory" in refusal(tmp_path)
    assert "empty" in refusal(write(b""))
    assert "not a PyTorch file, it is a Git LFS" in refusal(write(b"version https://git-lfs"))
    assert "not a PyTorch file" in refusal(write(pickle.dumps({"a": 1})))
    assert "tar format" in refusal(write(b"\0" * 257 + b"ustar" + b"\0" * 300))
    script = tw.zip_bytes({}, extra=[("constants.pkl", b""), ("code/net.py", b"")])
    assert "TorchScript" in refusal(write(script))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert "word/document.xml" in refusal(write(file.getvalue()))


@FORMATS
def test_unknown_parts_of_a_tensor(write, to_bytes):
    assert "torch.QInt8Storage" in refusal(write(to_bytes([tw.simple("QInt8", [1.0])])))
    assert "torch.QuaternionStorage" in refusal(write(to_bytes([tw.simple("Quaternion", [1.0])])))
    negated = tw.simple("Float", [1.0])
    negated.args.append({"neg": True})
    assert "the metadata {'neg': True}" in refusal(write(to_bytes([negated])))


def test_torch_reads_what_is_unknown_here(write, monkeypatch):
    calls = []

    def load(path, **options):
        calls.append((path, options))
        bits = np.array([0x3F80], np.int16)
        state = {"a": torch.Tensor(np.ones(2), "float64"), "b": torch.Tensor(bits, "bfloat16")}
        return {"state_dict": state, "epoch": 1}

    torch = tw.fake_torch(load)
    monkeypatch.setitem(sys.modules, "torch", torch)
    path = write(tw.zip_bytes([tw.Call("some.module", "Class")]))
    got = read_state_dict(path)
    assert calls == [(str(path), {"map_location": "cpu", "weights_only": True})]
    np.testing.assert_array_equal(got["a"], [1, 1])
    assert got["b"].dtype == ml_dtypes.bfloat16 and got["b"][0] == 1


def test_torch_refuses_too(write, monkeypatch):
    def load(*_, **__):
        raise pickle.UnpicklingError("Weights only load failed\nand more")

    monkeypatch.setitem(sys.modules, "torch", tw.fake_torch(load))
    message = refusal(write(tw.zip_bytes([tw.Call("some.module", "Class")])))
    assert "some.module.Class" in message and "Weights only load failed;" in message


@pytest.mark.parametrize(
    ("name", "arrays", "classes"),
    [("resnet20_cifar10", 97, 10), ("resnet32_cifar10", 157, 10), ("resnet20_cifar100", 116, 100)],
)
def test_real_files(name, arrays, classes):
    if not WEIGHTS.is_dir():
        pytest.skip(f"no folder {WEIGHTS}")
    state = read_state_dict(WEIGHTS / f"{name}.th")
    assert len(state) == arrays and next(iter(state)) == "conv1.weight"
    assert state["conv1.weight"].shape == (16, 3, 3, 3)
    assert state["linear.weight"].shape == (classes, 64)
    assert all(np.isfinite(a).all() for a in state.values())
    assert all((a > 0).all() for key, a in state.items() if key.endswith("running_var"))
