"""Variables of one small network, in this package's names and in PyTorch's."""

import flax.traverse_util
import jax
import numpy as np

from ait_jax.models import build_model
from tests.conftest import random_variables, variable_shapes

SHAPE = (8, 8, 1)
ARCH = "cifar_resnet8_b"


def shapes(arch=ARCH, classes=10, image_shape=SHAPE):
    return variable_shapes(build_model(arch, classes), image_shape)


def variables_of(arch=ARCH, seed=0):
    return random_variables(build_model(arch, 10), SHAPE, seed)


def torch_names(variables, shortcut="shortcut", head="linear"):
    """Variables of this package as a PyTorch state dict; the map is written from PyTorch's side."""
    blocks = {"conv1": "conv1", "bn1": "bn1", "conv2": "conv2", "bn2": "bn2"}
    blocks |= {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}
    top = {"stem_conv": "conv1", "stem_bn": "bn1", "classifier": head}
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    leaves |= {"mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *modules, leaf), value in flax.traverse_util.flatten_dict(variables).items():
        if len(modules) == 2:
            stage, block = modules[0].removeprefix("stage").split("_block")
            module = f"layer{stage}.{block}.{blocks[modules[1]]}"
        else:
            module = top[modules[0]]
        if leaf == "kernel":  # [kh, kw, in, out] -> [out, in, kh, kw]; [in, out] -> [out, in]
            value = np.moveaxis(value, (-1, -2), (0, 1))
        state[f"{module}.{leaves[leaf]}"] = value
        if leaf == "mean":
            state[f"{module}.num_batches_tracked"] = np.int64(7)
    return state


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
