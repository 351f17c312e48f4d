"""GDFQ's generator: its layers, its random numbers, and one batch split over devices."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.cpu.narrow_conv import narrow_conv
from ait_jax.errors import UserError
from ait_jax.generators import GENERATORS
from ait_jax.generators.gdfq import GDFQ, GDFQNetwork
from ait_jax.generators.layers import (
    upsample_by_phases,
    upsample_by_spreading,
    upsample_conv,
)
from tests.conftest import filled

SHAPES = [(8, 8, 1), (32, 32, 3), (12, 20, 4)]
KEY = jax.random.key(3)
IDS = np.arange(12, dtype=np.int32)


@functools.cache
def small():
    """A small generator, its variables, and a batch."""
    generator = GDFQ((8, 8, 1), num_classes=10, latent_size=16)
    variables = filled(jax.eval_shape(generator.init, KEY))
    return generator, variables, sampler(generator)(KEY, 5, IDS)


@functools.cache
def sampler(generator):
    return jax.jit(generator.sample)


def largest(x):
    return float(np.abs(x).max())


def conv(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers
    )


def upsampled_conv(x, kernel):
    n, height, width, channels = x.shape
    return conv(jax.image.resize(x, (n, 2 * height, 2 * width, channels), "nearest"), kernel)


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (upsample_conv, upsampled_conv),
        (upsample_by_phases, upsampled_conv),
        (upsample_by_spreading, upsampled_conv),
        (narrow_conv, conv),
    ],
    ids=["up", "phases", "spreading", "narrow"],
)
@pytest.mark.parametrize(
    ("size", "channels", "features"),
    [((8, 8), 16, 8), ((1, 1), 3, 2), ((5, 2), 4, 3), ((16, 16), 64, 3)],
)
def test_convs_equal_the_plain_formulation(fast, plain, size, channels, features):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, *size, channels)).astype(np.float32)
    kernel = rng.normal(0, 0.3, (3, 3, channels, features)).astype(np.float32)
    weights = rng.normal(0, 1, jax.eval_shape(plain, x, kernel).shape).astype(np.float32)

    def with_gradients(fn):
        def loss(x, kernel):
            images = fn(x, kernel)
            return jnp.sum(images * weights), images

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, kernel)

    (_, images), gradients = with_gradients(fast)
    (_, expected), expected_gradients = with_gradients(plain)
    assert images.shape == expected.shape == weights.shape
    np.testing.assert_allclose(images, expected, atol=1e-5 * largest(expected))
    for got, gradient in zip(gradients, expected_gradients):
        assert largest(gradient) > 0
        np.testing.assert_allclose(got, gradient, atol=1e-4 * largest(gradient))


@pytest.mark.parametrize("image_shape", SHAPES)
def test_shapes(image_shape):
    generator = GENERATORS["gdfq"](image_shape=image_shape, num_classes=7, latent_size=100)
    variables = jax.eval_shape(generator.init, jax.random.key(0))
    height, width, channels = image_shape
    params = variables["params"]
    assert params["embedding"]["embedding"].shape == (7, 100)
    assert params["stem"]["dense"]["kernel"].shape == (100, height // 4 * (width // 4) * 128)
    assert params["up1"]["kernel"].shape == (3, 3, 128, 128)
    assert params["up2"]["kernel"].shape == (3, 3, 128, 64)
    assert params["to_image"]["kernel"].shape == (3, 3, 64, channels)
    assert set(variables["batch_stats"]) == {"stem_bn", "bn1", "bn2", "image_bn"}
    assert "image_bn" not in params
    batch = jax.eval_shape(generator.sample, KEY, jnp.int32(0), IDS)
    images, stats = jax.eval_shape(generator.apply, variables, batch)
    assert images.shape == (12, *image_shape) and images.dtype == jnp.float32
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


@pytest.mark.parametrize("image_shape", [(30, 32, 3), (32, 33, 3), (2, 2, 1)])
def test_sizes_that_cannot_be_made(image_shape):
    with pytest.raises(UserError, match="divisible by 4") as caught:
        GENERATORS["gdfq"](image_shape=image_shape, num_classes=10, latent_size=100)
    assert f"teacher.image_shape = {image_shape}" in str(caught.value)


def test_unknown_generator_lists_the_known():
    with pytest.raises(ValueError, match=r"generator\.name = 'gan' is not allowed") as caught:
        GENERATORS["gan"](image_shape=(8, 8, 1), num_classes=10, latent_size=100)
    assert all(name in str(caught.value) for name in GENERATORS)


# Random numbers -----------------------------------------------------------------------------------


def test_an_example_is_the_same_wherever_it_is_made():
    generator, _, whole = small()
    for ids in (IDS[::-1], IDS[:3], IDS[7:10]):
        part = sampler(generator)(KEY, 5, ids)
        np.testing.assert_array_equal(part.latent, whole.latent[ids])
        np.testing.assert_array_equal(part.labels, whole.labels[ids])
    np.testing.assert_array_equal(generator.targets(whole), whole.labels)


def test_steps_examples_and_keys_differ():
    generator, _, whole = small()
    others = [sampler(generator)(KEY, 6, IDS), sampler(generator)(jax.random.key(4), 5, IDS)]
    rows = np.concatenate([batch.latent for batch in (whole, *others)])
    assert len(np.unique(rows[:, 0])) == len(rows)
    assert all(np.any(batch.labels != whole.labels) for batch in others)


def test_distributions():
    generator = GDFQ((8, 8, 1), num_classes=7, latent_size=50)
    batch = sampler(generator)(KEY, 1, np.arange(2000, dtype=np.int32))
    assert batch.latent.shape == (2000, 50) and batch.latent.dtype == jnp.float32
    assert batch.labels.shape == (2000,) and batch.labels.dtype == jnp.int32
    counts = np.bincount(batch.labels, minlength=7)
    assert len(counts) == 7 and counts.min() > 2000 / 7 - 80 and counts.max() < 2000 / 7 + 80
    latent = np.asarray(batch.latent)
    assert abs(latent.mean()) < 0.02 and abs(latent.std() - 1) < 0.02
    assert abs((latent**4).mean() - 3) < 0.15
    # Neither coordinates nor examples are copies of each other, nor follow the label.
    assert np.abs(np.corrcoef(latent.T) - np.eye(50)).max() < 0.15
    assert abs(np.corrcoef(latent[:, 0], batch.labels)[0, 1]) < 0.1


def test_initialisation_is_pytorchs():
    # rbg compiles four times faster than the default, and the bounds are the same.
    generator = small()[0]
    init = jax.jit(generator.init)
    variables, again = (init(jax.random.key(seed, impl="rbg")) for seed in (0, 1))
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    fan_in = {"stem/dense": 16, "up1": 9 * 128, "up2": 9 * 128, "to_image": 9 * 64}
    for module, inputs in fan_in.items():
        bound = inputs**-0.5
        for leaf in ("kernel", "bias"):
            values = np.asarray(flat.pop(f"{module}/{leaf}"))
            assert largest(values) <= bound
            if values.size > 60:  # uniform to the very ends
                assert values.max() > 0.9 * bound and values.min() < -0.9 * bound
                assert abs(values.std() * 3**0.5 / bound - 1) < 0.2
    embedding = np.asarray(flat.pop("embedding/embedding"))
    assert abs(embedding.mean()) < 0.3 and abs(embedding.std() - 1) < 0.2
    scales = {name: value for name, value in flat.items() if name.endswith("/scale")}
    assert all(np.all(np.asarray(value) == 1) for value in scales.values())
    assert not any(np.any(value) for name, value in flat.items() if name not in scales)
    assert len(flat) == 6
    assert np.any(again["params"]["up1"]["kernel"] != variables["params"]["up1"]["kernel"])


# The network --------------------------------------------------------------------------------------


def test_batch_norms_and_label_embedding():
    generator, variables, batch = small()
    network = GDFQNetwork(generator.image_shape, generator.num_classes)
    apply = functools.partial(
        network.apply, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    images, updated = jax.jit(apply)(variables, batch)
    seen = {name: calls["__call__"][0] for name, calls in updated["intermediates"].items()
            if name != "__call__"}  # fmt: skip
    embedding = np.asarray(variables["params"]["embedding"]["embedding"])
    np.testing.assert_array_equal(seen["embedding"], embedding[batch.labels])
    dense = variables["params"]["stem"]["dense"]
    expected = (embedding[batch.labels] * batch.latent) @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(seen["stem"], expected, atol=1e-4)
    entering = {"bn1": "up1", "bn2": "up2", "stem_bn": "stem", "image_bn": "to_image"}
    for norm, layer in entering.items():
        x = np.asarray(seen[layer], np.float64).reshape(seen[norm].shape)
        x = np.tanh(x) if norm == "image_bn" else x
        eps = 0.8 if norm in ("bn1", "bn2") else 1e-5
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        affine = variables["params"].get(norm, {"scale": 1.0, "bias": 0.0})
        expected = (x - mean) / np.sqrt(var + eps) * affine["scale"] + affine["bias"]
        np.testing.assert_allclose(seen[norm], expected, atol=2e-3)
        before, after = variables["batch_stats"][norm], updated["batch_stats"][norm]
        np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, atol=1e-5)
        np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, atol=1e-5)
    np.testing.assert_array_equal(images, seen["image_bn"])


@pytest.mark.parametrize(
    "latent_size, millions",  # of ResNet-18, MobileNetV2, ResNet-50: algorithm.md
    [(512, 206), (1280, 514), (2048, 822)],
)
def test_qimera_at_224_pixels_is_one_dense_layer(latent_size, millions):
    generator = GENERATORS["qimera"](
        image_shape=(224, 224, 3), num_classes=1000, latent_size=latent_size
    )
    shapes = jax.eval_shape(generator.init, jax.random.key(0))
    largest = max(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(largest / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", GENERATORS)
def test_remat_changes_no_number_and_computes_again(name):
    settings = {"image_shape": (8, 8, 1), "num_classes": 5, "latent_size": 12}
    plain, remat = (GENERATORS[name](**settings, remat=remat) for remat in (False, True))
    shapes = jax.eval_shape(plain.init, jax.random.key(0))
    assert shapes == jax.eval_shape(remat.init, jax.random.key(0))
    variables = filled(shapes)
    batch = jax.jit(plain.sample)(jax.random.key(1), jnp.int32(0), jnp.arange(4))

    def gradient(generator):
        def loss(params, batch):
            stats = variables["batch_stats"]
            images, stats = generator.apply({"params": params, "batch_stats": stats}, batch)
            return jnp.sum(jnp.sin(images)), stats

        return jax.grad(loss, has_aux=True)

    fast = {"xla_backend_optimization_level": 0}  # to compile
    expected, got = (
        jax.jit(gradient(generator), compiler_options=fast)(variables["params"], batch)
        for generator in (plain, remat)
    )
    for plainly, again in zip(expected, got, strict=True):  # gradients, batch statistics
        # Of all tensors: gradients that batch norms make zero are float noise alone.
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plainly))
        for a, b in zip(jax.tree.leaves(plainly), jax.tree.leaves(again), strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * largest
    kept, again = (
        str(jax.make_jaxpr(gradient(generator))(variables["params"], batch))
        for generator in (plain, remat)
    )
    assert "remat" in again and "remat" not in kept
