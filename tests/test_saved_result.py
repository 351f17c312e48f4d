"""What is saved is what is loaded, bit for bit; whatever the weights and their containers."""

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ait_jax
from ait_jax.errors import UserError
from ait_jax.export.checked_files import TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.export.packing import pack_codes
from ait_jax.zero_shot.saved import read_saved
from tests.brought import (
    CLASSES,
    IMAGES,
    PLAIN,
    TWIN,
    VARIABLES,
    NNXTwin,
    Plain,
    function_twin,
    nnx_twin,
    quantize,
)
from tests.saved_results import rounded_result

PIXELS = 16  # of an image


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_equal(loaded, saved):
    """Every number of two results is the same, and what is computed of them."""
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        for ours, theirs in zip(loaded.tensors[name], tensor):
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype
            np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, loaded.rounded_params, saved.rounded_params)
    jax.tree.map(np.testing.assert_array_equal, loaded.batch_stats, saved.batch_stats)
    assert loaded.activations == saved.activations
    np.testing.assert_array_equal(loaded.logits(IMAGES), saved.logits(IMAGES))


# Grids --------------------------------------------------------------------------------------------

# Output axes of a kernel, and what multiplies it over the other.
EINSUMS = {(-1,): "ni,io->no", (0,): "ni,oi->no", (1, 2): "ni,ihk->nhk"}


def shape_of(axes, width):
    return {(-1,): (PIXELS, width), (0,): (width, PIXELS), (1, 2): (PIXELS, 2, width)}[axes]


def one_kernel(axes):
    def model(variables, images):
        params = variables["params"]
        x = jnp.einsum(EINSUMS[axes], images.reshape(-1, PIXELS), params["kernel"])
        return x.reshape(len(images), -1) @ params["head"]

    return model


def kernels(axes, width, rng, kind):
    """Weights of a kind, [in, ..., out], and the grids of some channels as hard as they come."""
    shape = shape_of(axes, width)
    w = rng.normal(size=shape)
    if kind == "constant":  # Channels that hold one value, of any size.
        w = np.broadcast_to(10 ** rng.uniform(-6, 4, shape[-1:]) * rng.choice([-1, 1]), shape)
    elif kind == "tied":  # The ends of a range lie between two codes, and one of them is unused.
        w = rng.choice([-0.5, 1.0, 2.0, 2.5], size=shape)
    elif kind == "far":  # A narrow range far from zero.
        w = 1e3 + 1e-3 * w
    elif kind == "sparse":
        w = w * (rng.random(shape) < 0.2)
    return np.array(w, np.float32)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.integers(2, 8),
    axes=st.sampled_from(list(EINSUMS)),
    width=st.integers(1, 5),
    kind=st.sampled_from(["normal", "constant", "tied", "far", "sparse"]),
    seed=st.integers(0, 1000),
)
def test_any_grid_is_loaded_as_it_was_saved(tmp_path_factory, bits, axes, width, kind, seed):
    rng = np.random.default_rng(seed)
    kernel = kernels(axes, width, rng, kind)
    features = kernel.size // PIXELS
    params = {"kernel": kernel, "head": rng.normal(size=(features, CLASSES))}
    saved = rounded_result(one_kernel(axes), {"params": params}, bits=bits)
    tensor = saved.tensors["kernel"]
    folder = tmp_path_factory.mktemp("results") / "saved"
    saved.save(folder)
    assert_equal(ait_jax.load_result(folder, one_kernel(axes)), saved)
    # One grid for each output channel; and a weight is no further from its value than a step.
    channels = tuple(axis % kernel.ndim for axis in axes)
    assert [n for n in tensor.scale.shape if n > 1] == [
        n for axis in channels if (n := kernel.shape[axis]) > 1
    ]
    step = np.maximum(1 / tensor.scale, 4 * np.spacing(np.abs(kernel).max()))
    assert (np.abs(saved.rounded_params["kernel"] - kernel) <= step).all()
    if kind == "constant":
        np.testing.assert_allclose(saved.rounded_params["kernel"], kernel, rtol=1e-6, atol=1e-8)


def test_a_result_that_was_loaded_is_saved_as_the_same_files(tmp_path):
    saved = rounded_result(TWIN, VARIABLES, layer_bits=(("conv", 3),))
    saved.save(tmp_path / "a")
    ait_jax.load_result(tmp_path / "a", TWIN).save(tmp_path / "b")
    for name in (MANIFEST, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert {tensor.bits for tensor in saved.tensors.values()} == {3, 4}


def test_a_trained_student_is_loaded_as_it_was_measured(tmp_path):
    saved = quantize(TWIN, VARIABLES)
    measured, _ = saved.quantized.apply(saved.params, saved.batch_stats, IMAGES, saved.ranges)
    np.testing.assert_allclose(saved.logits(IMAGES), measured, rtol=1e-5, atol=1e-6)
    saved.save(tmp_path / "saved")
    loaded = ait_jax.load_result(tmp_path / "saved", TWIN)
    assert_equal(loaded, saved)
    assert (loaded.step, loaded.summary) == (saved.step, saved.summary)


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


# Folders ------------------------------------------------------------------------------------------


def test_what_is_there_stays(tmp_path):
    saved = rounded_result(Plain(), PLAIN)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="must be empty, or not exist"):
        saved.save(tmp_path / "file")
    with pytest.raises(UserError, match="must be empty, or not exist"):
        saved.save(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        saved.save(tmp_path / "file" / "inside")
    (tmp_path / "empty").mkdir()
    saved.save(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be read"):
        ait_jax.load_result(tmp_path / "nothing", Plain())


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rounded_result(Plain(), PLAIN).save("~/saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert ait_jax.load_result("~/saved", Plain()).step == 7


# The first format ---------------------------------------------------------------------------------


def write_first_format(result, folder):
    """As the version before wrote a folder."""
    arrays, policy = {}, result.quantized.policy
    for name, tensor in result.tensors.items():
        arrays[f"{name}/codes"] = pack_codes(tensor.codes, tensor.bits)
        arrays[f"{name}/scale"] = tensor.scale
        whole = np.clip(tensor.zero_point.astype(np.float64), -(2**31), 2**31 - 1)
        arrays[f"{name}/zero_point"] = whole.astype(np.int32)
    for collection in ("params", "batch_stats"):
        for path, leaf in jax.tree.leaves_with_path(getattr(result, collection)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in result.tensors:
                arrays[f"{collection}/{name}"] = np.asarray(leaf)
    lo, hi = (result.ranges.lo / result.ranges.weight, result.ranges.hi / result.ranges.weight)
    arrays |= {"sites/lo": lo, "sites/hi": hi}
    manifest = {
        "format": "ait_jax zero_shot 1",
        "image_shape": list(result.quantized.image_shape),
        "mean": [0.5],
        "std": [0.25],
        "weight_bits": policy.weight_bits,
        "activation_bits": policy.activation_bits,
        "sites": policy.sites,
        "layer_bits": policy.layer_bits,
        "tensors": [
            {
                "name": name,
                "channel_axis": axis,
                "bits": result.tensors[name].bits,
                "shape": result.tensors[name].codes.shape,
            }
            for name, axis in policy.kernels
        ],
        "step": result.step,
        "summary": result.summary,
    }
    folder.mkdir()
    safetensors.numpy.save_file(arrays, folder / TENSORS)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_first_format_is_read_with_its_own_grids(tmp_path):
    saved = rounded_result(TWIN, VARIABLES, bits=3)
    write_first_format(saved, tmp_path / "old")
    loaded = ait_jax.load_result(tmp_path / "old", TWIN)
    jax.tree.map(np.testing.assert_array_equal, loaded.rounded_params, saved.rounded_params)
    np.testing.assert_allclose(loaded.logits(IMAGES), saved.logits(IMAGES), rtol=1e-5, atol=1e-5)
    # Of lists it knew the names alone.
    write_first_format(rounded_result(two_layers, {"params": [FIRST, LAST]}), tmp_path / "lists")
    given = {"params": [FIRST, LAST]}
    of_lists = ait_jax.load_result(tmp_path / "lists", two_layers, given)
    assert jax.tree.structure(of_lists.params) == jax.tree.structure(given["params"])


def test_the_first_format_lost_channels_of_one_value(tmp_path):
    kernel = np.broadcast_to(np.float32([2.5, -3.0, 0.7]), (PIXELS, 3))
    saved = rounded_result(one_kernel((-1,)), {"params": {"kernel": kernel, "head": np.eye(3)}})
    write_first_format(saved, tmp_path / "old")
    with pytest.raises(UserError, match=r"channel of 'kernel' holds one value.*weights are lost"):
        ait_jax.load_result(tmp_path / "old", one_kernel((-1,)))


@pytest.mark.parametrize("found", ["ait_jax zero_shot 3", None, 2, ["x"]])
def test_another_format_is_named(tmp_path, found):
    rounded_result(Plain(), PLAIN).save(tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    manifest["format"] = found
    (tmp_path / "saved" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"has the format .*this version reads 'ait_jax zero_shot 2'"
    ):
        read_saved(tmp_path / "saved")
