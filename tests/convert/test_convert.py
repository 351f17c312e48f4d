"""PyTorch names and layouts, safetensors, and every way in which weights do not fit."""

import copy
import logging
import re
import subprocess
import sys

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from ait_jax.config import default_config
from ait_jax.convert import WeightsError, check_weights, convert_state_dict
from ait_jax.convert.__main__ import convert_file
from ait_jax.convert.naming import rename
from ait_jax.convert.namings import namings
from ait_jax.convert.weights import fingerprint, load_variables, read_weights, save_variables
from ait_jax.data.sources import load_images
from ait_jax.models import ARCHITECTURES
from ait_jax.teacher import Preprocess, load_teacher
from tests.conftest import shared
from tests.support.weight_files import prefixed, write_torch
from tests.support.weights import ARCH, assert_equal_trees, shapes, torch_names, variables_of

CIFAR100 = {"mean": (0.50706, 0.48667, 0.44078), "std": (0.26745, 0.25569, 0.27608)}


def write_state_dict(path, state, prefix=""):
    return write_torch(path, {"state_dict": prefixed(prefix, state)})


def refusal(path, arch=ARCH, *, list_all=True, **kwargs):
    with pytest.raises(WeightsError) as caught:
        weights = read_weights(path, arch)
        check_weights(weights, shapes(arch, **kwargs), str(path), arch, list_all=list_all)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shortcut", "head", "prefix"),
    [("shortcut", "linear", "module."), ("downsample", "fc", ""), ("downsample", "linear", "")],
)
def test_names_and_layouts_of_pytorch(tmp_path, shortcut, head, prefix):
    variables = variables_of()
    path = write_state_dict(tmp_path / "net.pth", torch_names(variables, shortcut, head), prefix)
    loaded = load_variables(path, ARCH, shapes())
    assert_equal_trees(loaded, variables)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_half_precision_becomes_float32():
    state = {name: np.float16(a) for name, a in torch_names(variables_of()).items()}
    leaves = jax.tree.leaves(convert_state_dict(state, ARCH).variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


REAL = [
    ("resnet20_cifar10.th", "cifar10", "cifar_resnet20_a", 10, {}, 85),
    ("resnet32_cifar10.th", "cifar10", "cifar_resnet32_a", 10, {}, 85),
    ("resnet20_cifar100.th", "cifar100", "cifar_resnet20_a", 100, CIFAR100, 50),
]


@pytest.mark.parametrize(
    ("file", "name", "arch", "classes", "norm", "top1"), REAL, ids=[row[0] for row in REAL]
)
def test_real_weights_classify_real_images(file, name, arch, classes, norm, top1):
    weights, data = shared(f"data/weights/{file}"), shared(f"data/tfds/{name}").parent
    config = default_config()
    config.teacher.arch, config.teacher.num_classes = arch, classes
    config.teacher.update(norm)
    teacher = load_teacher(config, weights)
    parameters = {"cifar_resnet20_a": 269_722 + 65 * (classes - 10), "cifar_resnet32_a": 464_154}
    assert sum(p.size for p in jax.tree.leaves(teacher.variables["params"])) == parameters[arch]
    assert teacher.fingerprint == fingerprint(teacher.variables)

    images = load_images(name, str(data), "test[:160]")
    forward = jax.jit(lambda v, x: teacher.model.apply(v, teacher.preprocess(x)))
    predicted = np.argmax(forward(teacher.variables, images.images), axis=-1)
    assert 100 * np.mean(predicted == images.labels) > top1


# What does not fit ------------------------------------------------------------------------------


def test_all_that_is_missing_unused_or_of_another_shape(tmp_path):
    state = torch_names(variables_of())
    for name in ("layer2.0.bn1.running_var", "linear.weight", "layer3.0.shortcut.0.weight"):
        del state[name]
    state["layer1.0.se.weight"] = np.zeros((3, 2), np.float32)
    state["conv1.gamma"] = np.zeros(5, np.float32)
    state["layer1.1.conv1.weight"] = np.zeros((6, 5, 3, 2), np.float32)
    state["bn1.bias"] = np.zeros(4, np.float32)
    state["layer3.0.bn2.weight"] = np.zeros((64, 1), np.float32)
    path = write_state_dict(tmp_path / "net.th", state)
    assert refusal(path).splitlines() == [
        f"{path}: does not fit teacher.arch = 'cifar_resnet8_b': 3 tensors missing: "
        "layer2.0.bn1.running_var (batch_stats/stage2_block0/bn1/var) of shape (32,)",
        "    linear.weight or fc.weight (params/classifier/kernel) of shape (64, 10)",
        "    layer3.0.shortcut.0.weight or layer3.0.downsample.0.weight "
        "(params/stage3_block0/shortcut_conv/kernel) of shape (1, 1, 32, 64)",
        "  3 tensors unused: layer1.0.se.weight of shape (3, 2)",
        "    conv1.gamma of shape (5,)",
        "    layer1.1.conv1.weight (params/stage1_block1/conv1/kernel) of shape (3, 2, 5, 6)",
        "  2 tensors of another shape: layer3.0.bn2.weight (params/stage3_block0/bn2/scale) is "
        "(64, 1), expected (64,)",
        "    bn1.bias (params/stem_bn/bias) is (4,), expected (16,)",
        "  names that are known for it: those of pytorch_resnet_cifar10 and the like; pytorchcv",
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 300])
def test_long_lists_end_in_a_count(tmp_path, number):
    state = torch_names(variables_of())
    state |= {f"extra{i}": np.zeros(i, np.float32) for i in range(number)}
    path = write_state_dict(tmp_path / "net.th", state)
    message = refusal(path, list_all=False)
    tensors = "1 tensor" if number == 1 else f"{number} tensors"
    assert f"'cifar_resnet8_b': {tensors} unused: extra0 of shape (0,)" in message
    assert message.count("of shape") == min(number, 2)
    assert ("more" in message) == ("ait_jax.convert" in message) == (number > 2)
    assert number <= 2 or f"\n    and {number - 2} more\n" in message
    assert refusal(path).count("of shape") == number


def test_two_names_of_one_tensor(tmp_path):
    state = torch_names(variables_of())
    state["fc.bias"] = state["linear.bias"] + 1
    message = refusal(write_state_dict(tmp_path / "net.th", state))
    assert "1 tensor unused: fc.bias of shape (10,)" in message


def test_a_file_without_the_tensor_that_tells_namings_apart(tmp_path):
    path = write_state_dict(tmp_path / "net.th", {"features.init_block.bn.bias": np.zeros(16, "f")})
    message = refusal(path)
    assert "features.init_block.conv.weight (params/stem_conv/kernel)" in message
    assert "features.stage1.unit1.body.conv1.bn.running_mean (batch_stats/stage1_block" in message
    assert "unused" not in message


@pytest.mark.parametrize("ndim", [0, 1, 3, 5])
@pytest.mark.parametrize(
    ("arch", "name"),
    [(ARCH, "conv1.weight"), (ARCH, "linear.weight"), ("vgg16_bn", "classifier.0.weight")],
)
def test_tensors_of_unheard_of_shapes(tmp_path, arch, name, ndim):
    path = write_state_dict(tmp_path / "net.th", {name: np.zeros((2,) * ndim, np.float32)})
    assert "1 tensor of another shape: " + name in refusal(path, arch, image_shape=(32, 32, 3))
    with pytest.raises(WeightsError, match="of another shape"):
        convert_file(arch, path, tmp_path / "out.safetensors")


def test_counters_of_batch_norms_are_counted(tmp_path, caplog):
    path = write_state_dict(tmp_path / "net.th", torch_names(variables_of()))
    with caplog.at_level(logging.INFO):
        load_variables(path, ARCH, shapes())
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: 9 tensors num_batches_tracked are left out"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_there_and_back(arch):
    """What a missing tensor is said to be called is what would be taken for it."""
    size = 32 if "cifar" in arch else 64
    wanted = flax.traverse_util.flatten_dict(shapes(arch, image_shape=(size, size, 3)), sep="/")
    for naming in namings(arch):
        for name in wanted:
            sources = naming.source_names(name)
            assert sources and len(set(sources)) == len(sources)
            for source in sources:
                renamed = rename({source: np.zeros((1, 1, 1, 1), np.float32)}, naming)
                assert renamed[1:] == ({name: source}, {})
        for unknown in ("params/stem_conv/scale", "params/no_such/kernel"):
            assert naming.source_names(unknown) == []


@pytest.mark.parametrize(
    ("arch", "kwargs", "expected"),
    [
        (ARCH, {"classes": 7}, "{linear.bias (}params/classifier/bias{)} is (10,), expected (7,)"),
        (
            ARCH,
            {"image_shape": (8, 8, 3)},
            "1 tensor of another shape: {conv1.weight (}params/stem_conv/kernel{)} "
            "is (3, 3, 1, 16), expected (3, 3, 3, 16)",
        ),
        (
            "cifar_resnet20_b",
            {},
            "60 tensors missing: {layer1.1.bn1.running_mean (}"
            "batch_stats/stage1_block1/bn1/mean{)} of shape (16,)",
        ),
        (
            "cifar_resnet8_a",
            {},
            "10 tensors unused: {layer2.0.shortcut.1.running_mean (}"
            "batch_stats/stage2_block0/shortcut_bn/mean{)} of shape (32,)",
        ),
    ],
    ids=["classes", "channels", "depth", "shortcut"],
)
@pytest.mark.parametrize("suffix", ["th", "safetensors"])
def test_other_architecture(tmp_path, arch, kwargs, expected, suffix):
    path = tmp_path / f"net.{suffix}"
    if suffix == "th":
        write_state_dict(path, torch_names(variables_of()))
    else:
        save_variables(variables_of(), path)
    message = refusal(path, arch, **kwargs)
    # A file of this package's names knows no others.
    expected = re.sub("[{}]" if suffix == "th" else "{.*?}", "", expected)
    assert expected in message and f"teacher.arch = {arch!r}" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    variables = variables_of()
    variables["params"]["stage1_block0"]["conv2"]["kernel"][1, 2, 3, 4] = value
    save_variables(variables, tmp_path / "net.safetensors")
    message = refusal(tmp_path / "net.safetensors")
    assert "params/stage1_block0/conv2/kernel holds NaN or infinite" in message


def test_files_that_cannot_be_read(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.th")
    other = tmp_path / "net.npz"
    other.write_bytes(b"PK")
    assert "truncated or damaged" in refusal(other)
    other.write_bytes(b"PL")
    message = refusal(other)
    kinds = (".th", ".pth", ".bin", ".ckpt", ".npz", "safetensors", "Orbax")
    assert all(kind in message for kind in kinds)
    text = tmp_path / "net.pt"
    text.write_text("no checkpoint")
    assert "starts with b'no checkpoint'" in refusal(text)


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    save_variables(variables_of(), path)
    data = path.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("name", ["params", "params/classifier/bias/x"])
def test_safetensors_names_that_clash(tmp_path, name):
    flat = flax.traverse_util.flatten_dict(variables_of(), sep="/")
    path = tmp_path / "net.safetensors"
    safetensors.numpy.save_file(flat | {name: np.zeros(3, np.float32)}, path)
    assert name in refusal(path)


# What is kept -----------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(tmp_path):
    variables = variables_of()
    path = tmp_path / "teacher.safetensors"
    path.write_text("an older one")
    save_variables(jax.tree.map(jax.numpy.asarray, variables), path)
    loaded = load_variables(path, ARCH, shapes())
    assert_equal_trees(loaded, variables)
    assert fingerprint(loaded) == fingerprint(variables)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_fingerprint_sees_every_bit_name_and_shape():
    variables = variables_of()
    original = fingerprint(variables)
    assert len(original) == 64 and fingerprint(copy.deepcopy(variables)) == original
    seen = {original}
    for collection, leaf in (("params", "scale"), ("batch_stats", "var")):
        changed = copy.deepcopy(variables)
        changed[collection]["stage3_block0"]["bn2"][leaf].view(np.int32)[5] ^= 1
        seen.add(fingerprint(changed))
    params = variables["params"]
    renamed = {**variables, "params": {**params, "head": params["classifier"]}}
    del renamed["params"]["classifier"]
    flat_kernel = {**params["classifier"], "kernel": params["classifier"]["kernel"].reshape(-1)}
    reshaped = {**variables, "params": {**params, "classifier": flat_kernel}}
    as_bits = {**params["classifier"], "bias": params["classifier"]["bias"].view(np.int32)}
    retyped = {**variables, "params": {**params, "classifier": as_bits}}
    seen |= {fingerprint(v) for v in (renamed, reshaped, retyped)}
    assert len(seen) == 6
    backwards = {key: variables[key] for key in reversed(variables)}
    assert fingerprint(backwards) == original


def test_preprocess_and_back():
    preprocess = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = np.arange(256 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    normalised = preprocess(images)
    assert normalised.dtype == np.float32 and normalised.shape == images.shape
    for channel, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std)):
        expected = (images[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(normalised[..., channel], expected, atol=1e-6)
    back = preprocess.invert(normalised)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, images)
    far = preprocess.invert(np.float32([[[[-99, 99, 0]]]]))
    np.testing.assert_array_equal(far[0, 0, 0], [0, 255, round(0.406 * 255)])


# The program --------------------------------------------------------------------------------------


def convert(*arguments):
    command = [sys.executable, "-m", "ait_jax.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_converts_a_state_dict_in_safetensors(tmp_path):
    state_dict = {
        name: np.ascontiguousarray(value) for name, value in torch_names(variables_of()).items()
    }
    safetensors.numpy.save_file(state_dict, tmp_path / "torch.safetensors")
    out = tmp_path / "flax.safetensors"
    done = convert(
        "--arch=cifar_resnet8_b", f"--weights={tmp_path}/torch.safetensors", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    assert "classes 10" in done.stdout
    again = convert("--arch=cifar_resnet8_b", f"--weights={out}", f"--out={tmp_path}/b.safetensors")
    assert again.returncode == 0
    assert again.stdout.splitlines()[1] == done.stdout.splitlines()[1]  # classes to fingerprint
    wrong = convert(
        "--arch=cifar_resnet20_b", f"--weights={out}", f"--out={tmp_path}/c.safetensors"
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith(f"error: {out}: does not fit")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize(
    ("out", "message"), [("net.th", "must end in .safetensors"), ("no/net.safetensors", "no such")]
)
def test_the_program_says_where_it_cannot_write(tmp_path, out, message):
    done = convert("--arch=cifar_resnet8_b", "--weights=x.th", f"--out={tmp_path / out}")
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
