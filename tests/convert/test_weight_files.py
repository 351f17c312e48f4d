"""Files of weights by their content, every dtype in them, and values that no network has."""

import gzip
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from ait_jax.convert import WeightsError, check_weights, convert_state_dict
from ait_jax.convert.files import read_tensors
from ait_jax.convert.torch_file import TorchFileError, read_torch_file
from ait_jax.convert.values import negative_variance
from ait_jax.convert.weights import load_variables
from ait_jax.zero_shot.bring import bring
from ait_jax.zero_shot.networks import NetworkError
from tests.conftest import random_variables
from tests.support import torch_writers as tw
from tests.support.weight_files import pickled
from tests.support.weights import ARCH, assert_equal_trees, shapes, torch_names, variables_of

VARIABLES = variables_of()
STATE = {name: np.ascontiguousarray(value) for name, value in torch_names(VARIABLES).items()}
FLAT = flax.traverse_util.flatten_dict(VARIABLES, sep="/")
NUMBERS = [0.0, -1.5, 0.0078125, 448.0, 2.0, -0.25]  # Every dtype here has them.


def savez(tensors):
    file = io.BytesIO()
    np.savez(file, **tensors)
    return file.getvalue()


CONTENTS = {
    "zip": lambda: tw.zip_bytes({"state_dict": pickled(STATE)}),
    "legacy": lambda: tw.legacy_bytes({"state_dict": pickled(STATE)}),
    "safetensors of Flax": lambda: safetensors.numpy.save(FLAT),
    "safetensors of PyTorch": lambda: safetensors.numpy.save(STATE),
    "npz of Flax": lambda: savez(FLAT),
    "npz of PyTorch": lambda: savez(STATE),
    "msgpack": lambda: flax.serialization.to_bytes(VARIABLES),
    "msgpack of PyTorch": lambda: flax.serialization.msgpack_serialize({"model": STATE}),
}


def load(path):
    return load_variables(path, ARCH, shapes())


def refusal(path):
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize("kind", CONTENTS)
def test_content_counts_and_endings_do_not(tmp_path, kind):
    content = CONTENTS[kind]()
    for name in ("net.pth.tar", "pytorch_model.bin", "last.ckpt", "net", "net.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert_equal_trees(load(tmp_path / name), VARIABLES)


def tar(name="net.pth"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def zipped(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text")
    return file.getvalue()


OTHERS = {
    "empty": (b"", "is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", "Git LFS"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
    "json": (b'{"weight_map": {"conv1.weight": "a.safetensors"}}', "JSON"),
    "gzip": (gzip.compress(b"abc" * 99), "gzip: unpack"),
    "tar": (tar(), "tar archive"),
    "pickle": (pickle.dumps({"a": 1}), "torch.save did not write"),
    "document": (zipped("word/document.xml"), "word/document.xml"),
    "npy": (b"\x93NUMPY\x01\0v\0{'descr': '<f4'}", "single NumPy array"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5"),
    "text": (b"once upon a time", "starts with b'once upon"),
    "seven bytes": (b"\7\0\0\0\0\0\0", "starts with"),
    "no dict": (tw.zip_bytes([tw.simple("Float", [1.0])]), "no named tensors"),
    "no tensors": (tw.zip_bytes({"epoch": 3, "lr": 0.1}), "no named tensors (its keys: ['epoch', "),
    "objects": (savez({"a": np.array([{}, 1], object)}), "cannot be read"),
    "msgpack": (b"\x83\xa1a\x01\xa1", "cannot be read"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net"])
def test_other_files_are_said_to_be_what_they_are(tmp_path, kind, name):
    content, expected = OTHERS[kind]
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(tmp_path / name)


@pytest.mark.parametrize("kind", CONTENTS)
def test_truncated_files_of_every_kind(tmp_path, kind):
    content, path = CONTENTS[kind](), tmp_path / "net"
    for length in (1, 9, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        refusal(path)


def test_the_program_ends_with_2(tmp_path):
    (tmp_path / "net.pth").write_bytes(b"<html>")
    command = [sys.executable, "-m", "ait_jax.convert", f"--arch={ARCH}"]
    command += [f"--weights={tmp_path}/net.pth", f"--out={tmp_path}/x.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "web page" in done.stderr


# Dtypes -------------------------------------------------------------------------------------------

FLOATS = [
    np.float16,
    np.float32,
    np.float64,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "torch"])
def test_floats_of_every_width_are_exact(tmp_path, dtype, kind):
    state = {name: value for name, value in STATE.items() if value.dtype == np.float32}
    values = np.resize(np.array(NUMBERS), 16).astype(dtype)
    narrow = state | {"bn1.bias": values}
    path = tmp_path / "net.bin"
    if kind == "safetensors":
        arrays = {name: jnp.asarray(value) for name, value in narrow.items()}
        if dtype == np.float64:  # Which jax makes float32 of.
            path.write_bytes(safetensors.numpy.save(narrow))
        else:
            safetensors.flax.save_file(arrays, path)
    elif kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(narrow))
    else:
        tensors = pickled(state)
        # As torch writes dtypes that have no storage of their own.
        raw = tw.Storage("Untyped", values.view(np.uint8))
        options = (False, {}, tw.Global("torch", np.dtype(dtype).name))
        tensors["bn1.bias"] = tw.Call(
            "torch._utils", "_rebuild_tensor_v3", raw, 0, (16,), (1,), *options
        )
        path.write_bytes(tw.zip_bytes(tensors))
    got = load(path)["params"]["stem_bn"]["bias"]
    assert got.dtype == np.float32
    wanted = [float(value) for value in values]
    assert got.tolist() == wanted and wanted[:3] == NUMBERS[:3]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool", "complex64"])
@pytest.mark.parametrize("flax_names", [False, True])
def test_integers_are_no_weights(tmp_path, dtype, flax_names):
    ours, theirs = "params/stem_conv/kernel", "conv1.weight"
    tensors = dict(FLAT if flax_names else STATE)
    name = ours if flax_names else theirs
    tensors[name] = np.ascontiguousarray(tensors[name].astype(dtype))
    (tmp_path / "net").write_bytes(savez(tensors))
    message = refusal(tmp_path / "net")
    assert name in message and ours in message and dtype in message and "quantized" in message


def safetensors_of(dtype, nbytes, shape):
    header = json.dumps({"a.b": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}})
    return struct.pack("<Q", len(header)) + header.encode() + b"\0" * nbytes


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 4), ("F128", 128), ("BF17", 16)])
def test_dtypes_that_nobody_knows(tmp_path, dtype, nbytes):
    (tmp_path / "net").write_bytes(safetensors_of(dtype, nbytes, [8]))
    assert dtype in refusal(tmp_path / "net")


def test_names_of_dtypes_in_safetensors(tmp_path):
    """Against those that the library itself writes."""
    for dtype in (*FLOATS, ml_dtypes.float8_e8m0fnu, np.int16, np.uint64, np.bool_):
        if np.dtype(dtype).kind in "iub" or dtype in (np.float16, np.float32, np.float64):
            data = safetensors.numpy.save({"a.b": np.ones(3, dtype)})
        else:
            names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
            names["float8_e8m0fnu"] = "F8_E8M0"
            data = safetensors_of(names[np.dtype(dtype).name], 3 * np.dtype(dtype).itemsize, [3])
        (tmp_path / "net").write_bytes(data)
        got = read_tensors(tmp_path / "net")["a.b"]
        assert got.dtype == dtype and got.shape == (3,)


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("torch._utils", "_rebuild_qtensor", "quantized tensors"),
        ("torch._utils", "_rebuild_sparse_tensor", "sparse tensors"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage", "without values"),
    ],
)
def test_tensors_that_are_not_dense_floats(tmp_path, module, name, expected):
    path = tmp_path / "net.pth"
    path.write_bytes(tw.zip_bytes({"a": tw.Call(module, name, 1, 2)}))
    message = refusal(path)
    assert expected in message and name in message


@pytest.mark.parametrize("kind", ["QInt8", "QUInt8", "QInt32"])
def test_quantized_storages(tmp_path, kind):
    (tmp_path / "net").write_bytes(tw.zip_bytes({"a": tw.simple(kind, [1.0])}))
    assert f"quantized tensors, which tensor.dequantize() makes floats of (torch.{kind}" in refusal(
        tmp_path / "net"
    )


def test_what_torch_itself_writes(tmp_path):
    torch = pytest.importorskip("torch")
    values = torch.tensor(NUMBERS)
    path = tmp_path / "net.ckpt"
    for dtype in ("bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"):
        for zipped in (True, False):
            tensor = values.to(getattr(torch, dtype))
            torch.save({"a": tensor}, path, _use_new_zipfile_serialization=zipped)
            got = read_torch_file(path)["a"]
            assert got.dtype.name == dtype
            assert got.astype(np.float64).tolist() == tensor.double().tolist()
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with pytest.raises(TorchFileError, match="sparse tensors"):
        read_torch_file(path)


def test_settings_of_a_training_script_are_passed_over(tmp_path, monkeypatch):
    """timm puts its arguments next to the weights."""
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = tw.Call("argparse", "Namespace")
    tree = {"args": arguments, "out": tw.Call("pathlib", "PosixPath", "/", "tmp"), "n": 1}
    path = tmp_path / "net.pth"
    path.write_bytes(tw.zip_bytes(tree | {"state_dict": pickled(STATE)}))
    assert read_torch_file(path)["args"] is read_torch_file(path)["out"] is None
    assert_equal_trees(load(path), VARIABLES)
    # BUILD with a state that would set attributes: of the thing, and of what stands for its class.
    for state in (
        b"cargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sb.",
        b"cargparse\nNamespace\n}b.",
    ):
        body = tw.zip_bytes({}, extra=[("data.pkl", b"\x80\x02" + state)])
        path.write_bytes(body)
        assert read_torch_file(path) is None


# Values -------------------------------------------------------------------------------------------


def with_variance(value):
    flat = {name: np.array(array) for name, array in FLAT.items()}
    flat["batch_stats/stage2_block0/bn1/var"][3] = value
    return flax.traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("value", [-1.0, -1e-4, -2e-6, np.nan, np.inf])
def test_a_bad_variance_is_named(tmp_path, value):
    variables = with_variance(value)
    state = {name: np.ascontiguousarray(x) for name, x in torch_names(variables).items()}
    (tmp_path / "flax").write_bytes(
        safetensors.numpy.save(flax.traverse_util.flatten_dict(variables, sep="/"))
    )
    (tmp_path / "torch").write_bytes(tw.zip_bytes({"model": pickled(state)}))
    said = "NaN or infinite values" if not np.isfinite(value) else "1 negative values of 32"
    message = refusal(tmp_path / "flax")
    assert "tensor batch_stats/stage2_block0/bn1/var holds" in message and said in message
    message = refusal(tmp_path / "torch")
    assert "layer2.0.bn1.running_var (batch_stats/stage2_block0/bn1/var)" in message
    assert said in message


@pytest.mark.parametrize("value", [0.0, -1e-11, -9e-7, 1e-30])
def test_variances_of_about_zero_are_kept(value):
    """Those of real networks are sometimes a rounding error below zero."""
    variables = with_variance(value)
    weights = convert_state_dict(torch_names(variables), ARCH)
    got = check_weights(weights, shapes(), "net.pth", ARCH)
    assert got["batch_stats"]["stage2_block0"]["bn1"]["var"][3] == np.float32(value)


@pytest.mark.parametrize(
    ("name", "is_variance"),
    [
        ("batch_stats/bn/var", True),
        ("batch_stats/bn/running_var", True),
        ("batch_stats/layer.1.moving_variance", True),
        ("batch_stats/net/~/bn/~/var_ema/average", True),
        ("batch_stats/bn/mean", False),
        ("batch_stats/variant/mean", False),
        ("params/var", False),
        ("batch_stats/var/mean", False),
    ],
)
def test_names_of_variances(name, is_variance):
    assert bool(negative_variance(name, np.array([1, -0.5], "f"))) == is_variance
    assert negative_variance(name, np.array([1, 0.5], "f")) == ""
    assert negative_variance(name, np.array([], "f")) == ""


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def test_negative_variance_of_a_model_that_is_brought():
    net = Net()
    variables = random_variables(net, (8, 8, 3))

    def brought(value):
        variables["batch_stats"]["norm"]["var"][1] = value
        return bring(net, variables, (8, 8, 3), 3, {}, "")

    for value, said in ((-0.5, "1 negative values of 4, down to -0.5"), (-2e-6, "down to -2e-06")):
        with pytest.raises(NetworkError) as caught:
            brought(value)
        assert "batch_stats/norm/var holds" in str(caught.value) and said in str(caught.value)
    assert brought(-1e-11).variables["batch_stats"]["norm"]["var"][1] == np.float32(-1e-11)


def test_float64_beyond_float32_is_said_to_be_infinite(tmp_path):
    state = STATE | {"linear.bias": np.full(10, 1e300)}
    (tmp_path / "net").write_bytes(savez(state))
    assert "linear.bias (params/classifier/bias) holds NaN or infinite" in refusal(tmp_path / "net")
