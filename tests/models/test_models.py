"""CIFAR ResNets against numbers and loops written by hand."""

import ast
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ait_jax.models
from ait_jax.models import ARCHITECTURES, build_model
from ait_jax.models.resnet_cifar import BasicBlock
from tests.conftest import random_variables, variable_shapes

# Option A, RGB, 10 classes; B adds the projections of stages 2 and 3.
PARAMETERS = {8: 75_290, 20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018}
PROJECTIONS = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def normal(seed, shape):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("depth", PARAMETERS)
@pytest.mark.parametrize("kind", ["a", "b"])
def test_parameter_counts(depth, kind):
    extra = PROJECTIONS if kind == "b" else 0
    variables = variable_shapes(build_model(f"cifar_resnet{depth}_{kind}", 10), (32, 32, 3))
    assert count(variables["params"]) == PARAMETERS[depth] + extra
    # Mean and variance of each conv's batch norm.
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * (
        depth - 1 + (2 if kind == "b" else 0)
    )


def test_every_architecture_is_counted():
    # tests/models/test_networks.py counts the others.
    ours = {name for name in ARCHITECTURES if name.startswith("cifar_resnet")}
    assert ours == {f"cifar_resnet{d}_{k}" for d in PARAMETERS for k in "ab"}


@pytest.mark.parametrize("kind", ["a", "b"])
@pytest.mark.parametrize(
    ("image_shape", "classes"), [((32, 32, 3), 100), ((8, 8, 1), 10), ((7, 10, 4), 3)]
)
def test_output_shape_and_what_training_changes(kind, image_shape, classes):
    model = build_model(f"cifar_resnet8_{kind}", classes)
    variables = variable_shapes(model, image_shape)
    assert variables["params"]["stem_conv"]["kernel"].shape == (3, 3, image_shape[-1], 16)
    images = jax.ShapeDtypeStruct((5, *image_shape), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (5, classes)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = jax.eval_shape(train, variables, images)
    assert logits.shape == (5, classes)
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="cifar_resnet21_a") as caught:
        build_model("cifar_resnet21_a", 10)
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def padded_conv3(x, kernel, stride):
    """PyTorch's Conv2d(3, stride, padding=1): output i sees inputs stride * i - 1 .. + 1."""
    n, height, width, channels = x.shape
    padded = np.zeros((n, height + 2, width + 2, channels))
    padded[:, 1:-1, 1:-1] = x
    rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = np.zeros((n, rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
            out[:, i, j] = np.einsum("nhwc,hwco->no", patch, kernel)
    return out


@pytest.mark.parametrize("size", [(4, 4), (5, 6)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convs_are_aligned_as_in_pytorch(size, stride):
    block = BasicBlock(features=4, stride=stride, shortcut="A")
    x = normal(0, (2, *size, 2))
    variables = random_variables(block, x.shape[1:])
    apply = jax.jit(functools.partial(block.apply, capture_intermediates=True))
    _, seen = apply(variables, x)
    conv1, conv2, bn1 = (
        np.asarray(seen["intermediates"][name]["__call__"][0]) for name in ("conv1", "conv2", "bn1")
    )
    kernels = variables["params"]
    expected = padded_conv3(x, np.asarray(kernels["conv1"]["kernel"]), stride)
    np.testing.assert_allclose(conv1, expected, atol=1e-5)
    hidden = np.maximum(bn1, 0)
    expected = padded_conv3(hidden, np.asarray(kernels["conv2"]["kernel"]), 1)
    np.testing.assert_allclose(conv2, expected, atol=1e-5)


def shortcut_alone(block, x):
    """The block with silent convs: what remains is relu(shortcut(x))."""
    variables = random_variables(block, x.shape[1:])
    for norm in ("bn2", "shortcut_bn"):
        if norm in variables["params"]:  # the identity, but for eps
            variables["params"][norm] = {"scale": np.ones(block.features, np.float32)}
            variables["params"][norm]["bias"] = np.zeros(block.features, np.float32)
            variables["batch_stats"][norm] = {"mean": np.zeros(block.features, np.float32)}
            variables["batch_stats"][norm]["var"] = np.ones(block.features, np.float32)
    variables["params"]["conv2"]["kernel"] *= 0
    return np.asarray(jax.jit(block.apply)(variables, x)), variables


@pytest.mark.parametrize(
    ("channels", "features", "stride"), [(2, 4, 2), (3, 6, 2), (2, 5, 1), (4, 4, 2)]
)
def test_option_a_subsamples_and_pads_with_zeros(channels, features, stride):
    x = normal(2, (2, 5, 4, channels))
    got, variables = shortcut_alone(BasicBlock(features, stride, "A"), x)
    assert set(variables["params"]) == {"conv1", "bn1", "conv2", "bn2"}
    expected = np.zeros((2, -(-5 // stride), -(-4 // stride), features), np.float32)
    before = (features - channels) // 2
    for i in range(expected.shape[1]):
        for j in range(expected.shape[2]):
            for c in range(channels):
                expected[:, i, j, before + c] = np.maximum(x[:, stride * i, stride * j, c], 0)
    np.testing.assert_array_equal(got, expected)


def test_option_b_projects():
    x = normal(3, (2, 5, 4, 2))
    got, variables = shortcut_alone(BasicBlock(4, 2, "B"), x)
    kernel = np.asarray(variables["params"]["shortcut_conv"]["kernel"])
    assert kernel.shape == (1, 1, 2, 4)
    expected = np.maximum(x[:, ::2, ::2] @ kernel[0, 0] / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["A", "B"])
def test_equal_shapes_keep_the_identity(kind):
    x = normal(4, (2, 3, 3, 4))
    got, variables = shortcut_alone(BasicBlock(4, 1, kind), x)
    np.testing.assert_array_equal(got, np.maximum(x, 0))
    assert "shortcut_conv" not in variables["params"]


def test_logits_are_a_dense_layer_on_the_mean_over_space():
    model = build_model("cifar_resnet8_a", 3)
    x = normal(5, (2, 8, 8, 1))
    variables = random_variables(model, (8, 8, 1))
    logits, seen = jax.jit(functools.partial(model.apply, capture_intermediates=True))(variables, x)
    last = np.asarray(seen["intermediates"]["stage3_block0"]["__call__"][0])
    assert last.shape == (2, 2, 2, 64)
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(logits, last.mean((1, 2)) @ head["kernel"] + head["bias"], atol=1e-5)


def test_models_know_nothing_of_quantization():
    folder = Path(ait_jax.models.__file__).parent
    imported = set()
    for path in folder.glob("*.py"):
        if path.name == "__main__.py":  # The program that lists them.
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    ours = {name for name in imported if name.startswith("ait_jax")}
    assert ours and all(name.startswith("ait_jax.models") for name in ours)
