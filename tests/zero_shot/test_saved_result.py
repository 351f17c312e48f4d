"""What is saved is what is loaded, bit for bit; whatever the weights and their containers."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ait_jax
from ait_jax.errors import UserError
from ait_jax.export.checked_files import TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.zero_shot.saved import read_saved
from tests.conftest import random_variables
from tests.support.saved_results import assert_equal, rounded_result, write_first_format
from tests.support.user_models import (
    CLASSES,
    IMAGES,
    PLAIN,
    SHAPE,
    TWIN,
    VARIABLES,
    Plain,
    quantize,
)

PIXELS = 16  # of an image


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


def listed(variables, images):
    first, (last,) = variables["params"]
    return images.reshape(len(images), -1) @ first @ last


def test_the_first_format_is_read_with_its_own_grids(tmp_path):
    saved = rounded_result(TWIN, VARIABLES, bits=3)
    write_first_format(saved, tmp_path / "old")
    loaded = ait_jax.load_result(tmp_path / "old", TWIN)
    jax.tree.map(np.testing.assert_array_equal, loaded.rounded_params, saved.rounded_params)
    np.testing.assert_allclose(loaded.logits(IMAGES), saved.logits(IMAGES), rtol=1e-5, atol=1e-5)
    # Of lists it knew the names alone.
    given = {"params": [np.ones((PIXELS, 4)), [np.ones((4, CLASSES))]]}
    write_first_format(rounded_result(listed, given), tmp_path / "lists")
    of_lists = ait_jax.load_result(tmp_path / "lists", listed, given)
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


class HardSwish(nn.Module):
    """Its ReLU6 is a gate, which was a site once."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.hard_swish(nn.Dense(6)(x.reshape(len(x), -1))))


def test_the_first_format_has_sites_at_gates(tmp_path):
    variables = random_variables(HardSwish(), SHAPE)
    saved = rounded_result(HardSwish(), variables, sites="paper", gates=True)
    assert [site.kind for site in saved.quantized.sites] == ["relu6"]
    write_first_format(saved, tmp_path / "old")
    loaded = ait_jax.load_result(tmp_path / "old", HardSwish())
    np.testing.assert_allclose(loaded.logits(IMAGES), saved.logits(IMAGES), rtol=1e-5, atol=1e-6)
    loaded.save(tmp_path / "new")
    assert_equal(ait_jax.load_result(tmp_path / "new", HardSwish()), loaded)
    assert not rounded_result(HardSwish(), variables, sites="paper").quantized.sites
