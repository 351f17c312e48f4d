"""Pytrees of every kind come back from a saved result; other models and names that meet do not."""

import collections
import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ait_jax
from ait_jax.errors import UserError
from tests.support.saved_results import assert_equal, rounded_result
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    TWIN,
    VARIABLES,
    NNXTwin,
    Plain,
    function_twin,
    nnx_twin,
)

PIXELS = 16  # of an image


PIXELS = 16  # of an image


# Containers ---------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="dense", metadata={"static": True})


def dense_of(layer):
    """The kernel and the bias of a layer, whatever holds them."""
    if isinstance(layer, (dict, flax.core.FrozenDict)):
        return tuple(layer[name] for name in sorted(layer, key=str, reverse=True))
    return tuple(layer) if isinstance(layer, (list, tuple)) else (layer.kernel, layer.bias)


def two_layers(variables, images):
    first, *rest = layers_of(variables["params"])
    kernel, bias = dense_of(first)
    x = jax.nn.relu(images.reshape(len(images), -1) @ kernel + bias)
    kernel, bias = dense_of(rest[-1])
    return x @ kernel + bias


def layers_of(params):
    mapping = isinstance(params, (dict, flax.core.FrozenDict))
    return list(params.values()) if mapping else list(params)


RNG = np.random.default_rng(0)
FIRST, LAST = (
    (RNG.normal(size=(n, m)).astype(np.float32), RNG.normal(size=m).astype(np.float32))
    for n, m in ((PIXELS, 5), (5, CLASSES))
)
WRITTEN_DOWN = {
    "lists of tuples": [FIRST, LAST],
    "tuples of lists": (list(FIRST), list(LAST)),
    "a tuple with nothing": (FIRST, None, LAST),
    "dicts": {"a": {"w": FIRST[0], "b": FIRST[1]}, "b": {"w": LAST[0], "b": LAST[1]}},
    "names with slashes": {
        "net/~/a": {"w": FIRST[0], "b": FIRST[1]},
        "net/~/b": {"w": LAST[0], "b": LAST[1]},
    },
    "integer keys": {0: {1: FIRST[0], 0: FIRST[1]}, 10: {1: LAST[0], 0: LAST[1]}},
    "ordered": collections.OrderedDict(z=list(FIRST), a=list(LAST)),
    "frozen": flax.core.freeze(
        {"a": {"w": FIRST[0], "b": FIRST[1]}, "b": {"w": LAST[0], "b": LAST[1]}}
    ),
    "names of files' parts": {
        "codes": {"w": FIRST[0], "b": FIRST[1]},
        "params": {"w": LAST[0], "scale": LAST[1]},
    },
}
CLASSES_OF_CODE = {
    "NamedTuples": (Layer(*FIRST), Layer(*LAST)),
    "dataclasses": [Dense(*FIRST), Dense(*LAST)],
    "a default dict": collections.defaultdict(list, a=list(FIRST), b=list(LAST)),
}


@pytest.mark.parametrize("what", WRITTEN_DOWN)
def test_containers_come_back(tmp_path, what):
    params = WRITTEN_DOWN[what]
    model = two_layers
    if what == "names of files' parts":  # Not sorted by it.

        def model(variables, images):
            named = variables["params"]
            layers = [tuple(layer.values()) for layer in (named["codes"], named["params"])]
            pairs = [sorted(layer, key=lambda x: -x.ndim) for layer in layers]
            return two_layers({"params": pairs}, images)

    saved = rounded_result(model, {"params": params}, sites="paper")
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", model)
    assert_equal(loaded, saved)
    assert jax.tree.structure(loaded.rounded_params) == jax.tree.structure(params)
    # The model itself takes them; what rounds its activations is missing then.
    np.testing.assert_array_equal(
        model({"params": loaded.rounded_params}, IMAGES),
        model({"params": saved.rounded_params}, IMAGES),
    )
    with_shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    assert_equal(ait_jax.load_result(tmp_path / "saved", model, {"params": with_shapes}), saved)


@pytest.mark.parametrize("what", CLASSES_OF_CODE)
def test_classes_come_back_with_their_structure(tmp_path, what):
    params = CLASSES_OF_CODE[what]
    saved = rounded_result(two_layers, {"params": params})
    saved.save(tmp_path / "saved")
    with pytest.raises(UserError, match="a class that a file cannot hold: pass variables"):
        ait_jax.load_result(tmp_path / "saved", two_layers)
    others = jax.tree.map(np.zeros_like, params)
    loaded = ait_jax.load_result(tmp_path / "saved", two_layers, {"params": others})
    assert_equal(loaded, saved)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)


def test_equinox_modules_come_back(tmp_path):
    eqx = pytest.importorskip("equinox")
    layers = eqx.nn.MLP(PIXELS, CLASSES, 6, 1, key=jax.random.key(0))
    params, static = eqx.partition(layers, eqx.is_array)

    def model(variables, images):
        return jax.vmap(eqx.combine(variables["params"], static))(images.reshape(-1, PIXELS))

    saved = rounded_result(model, {"params": params})
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", model, {"params": params})
    assert_equal(loaded, saved)
    assert isinstance(loaded.rounded_params, eqx.nn.MLP)
    np.testing.assert_array_equal(loaded.rounded_params.layers[1].bias, params.layers[1].bias)


def test_a_bare_array_comes_back(tmp_path):
    def model(variables, images):
        return images.reshape(len(images), -1) @ variables["params"]

    saved = rounded_result(model, {"params": RNG.normal(size=(PIXELS, CLASSES))})
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", model)
    assert_equal(loaded, saved)
    assert loaded.rounded_params.shape == (PIXELS, CLASSES)


def test_statistics_of_a_function_come_back(tmp_path):
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]["norm"]
    pairs = ("conv", "kernel", "bias"), ("norm", "scale", "bias"), ("head", "kernel", "bias")
    leaves = [tuple(params[layer][name] for name in names) for layer, *names in pairs]
    variables = {"params": leaves, "batch_stats": {"norm": flax.core.freeze(stats)}}
    saved = rounded_result(function_twin, variables)
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", function_twin)
    assert_equal(loaded, saved)
    assert jax.tree.structure(loaded.batch_stats) == jax.tree.structure(variables["batch_stats"])


def test_modules_come_back(tmp_path):
    rounded_result(TWIN, VARIABLES).save(tmp_path / "linen")
    of_nnx = rounded_result(nnx_twin())
    of_nnx.save(tmp_path / "nnx")
    other = NNXTwin(nnx.Rngs(1))
    assert_equal(ait_jax.load_result(tmp_path / "nnx", other), of_nnx)
    # A twin has the same names.
    assert_equal(ait_jax.load_result(tmp_path / "linen", other), of_nnx)


def wider():
    layers = [(np.ones((PIXELS, 6)), np.zeros(6)), (np.ones((6, CLASSES)), np.zeros(CLASSES))]
    return two_layers, {"params": layers}


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: (Plain(), None), "no network of this model"),
        (lambda: (nnx_twin(), None), "only the file has params/0/0"),
        (wider, r"params/0/0 has the shape \(16, 5\) there, and the model's \(16, 6\)"),
        (lambda: (two_layers, {"params": [FIRST]}), "only the file has params/1/0"),
        (lambda: (two_layers, {"params": [FIRST, LAST, LAST]}), "only the model has params/2/0"),
        (lambda: (two_layers, [FIRST, LAST]), "variables has no 'params'"),
        (lambda: (lambda variables, images: images, None), "no network of this model"),
    ],
)
def test_another_model_is_refused(tmp_path, load, message):
    model, variables = load()
    rounded_result(two_layers, {"params": [FIRST, LAST]}).save(tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        ait_jax.load_result(tmp_path / "saved", model, variables)


@pytest.mark.parametrize(
    "params",
    [
        {"a/b": {"w": FIRST[0]}, "a": {"b": {"w": LAST[0]}}},
        {"a/b": FIRST[0], "a": {"b": LAST[0]}},
        {"a/b": FIRST[0], "a": LAST[0]},
        {"a": [FIRST[0]], "a/0": LAST[0]},
    ],
)
def test_names_that_meet_are_refused(params):
    def model(variables, images):
        first, last = sorted(jax.tree.leaves(variables["params"]), key=lambda x: -len(x))
        return images.reshape(len(images), -1) @ first @ last

    with pytest.raises(UserError, match=r"'a.*rename a key that has a slash in it"):
        rounded_result(model, {"params": params})
    renamed = {name.replace("/", "."): value for name, value in params.items()}
    assert len(rounded_result(model, {"params": renamed}).tensors) == 2


class Slashed(nn.Module):
    """A Linen module with parameters whose names have slashes."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w/kernel", nn.initializers.normal(), (PIXELS, CLASSES))
        return x.reshape(len(x), -1) @ w


def test_slashes_in_names_of_modules(tmp_path):
    variables = Slashed().init(jax.random.key(0), IMAGES)
    saved = rounded_result(Slashed(), variables)
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", Slashed())
    assert_equal(loaded, saved)
    assert list(loaded.rounded_params) == ["w/kernel"]
