"""Angles and curvature on functions whose values are known in closed form; the student's twin."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ait_jax.methods import losses
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.params import quantize_params
from ait_jax.quant.ranges import fixed_ranges
from experiments.analyses import geometry
from experiments.analyses.differentiable_student import freeze_grids, twin_apply
from tests.conftest import random_variables
from tests.support.policies import policy_for


def symmetric(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return (basis * np.asarray(eigenvalues)) @ basis.T


# Angles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0, 30, 90, 135, 180])
def test_the_cosine_of_a_known_angle(degrees):
    angle = math.radians(degrees)
    a = {"x": jnp.asarray([3.0]), "y": jnp.asarray([[0.0]])}
    b = {"x": jnp.asarray([5 * math.cos(angle)]), "y": jnp.asarray([[5 * math.sin(angle)]])}
    products = (geometry.dot(a, b), geometry.dot(a, a), geometry.dot(b, b))
    np.testing.assert_allclose(geometry.cosine(*map(float, products)), math.cos(angle), atol=1e-6)


def test_a_zero_vector_has_no_angle():
    assert math.isnan(geometry.cosine(0.0, 0.0, 4.0))


def test_rounding_does_not_leave_the_range_of_a_cosine():
    assert geometry.cosine(1.0000001, 1.0, 1.0) == 1.0


# Hessians -----------------------------------------------------------------------------------------


def cubic(params, scale):
    """sum a^3 + a b: the Hessian is [[6 a, 1], [1, 0]] times scale."""
    return scale * jnp.sum(params["a"] ** 3 + params["a"] * params["b"])


def test_products_with_a_known_hessian():
    params = {"a": jnp.asarray([2.0, -1.0]), "b": jnp.asarray([5.0, 7.0])}
    v = {"a": jnp.asarray([1.0, 3.0]), "b": jnp.asarray([4.0, 0.5])}
    product = geometry.hvp(cubic, params, v, 0.5)
    np.testing.assert_allclose(product["a"], 0.5 * (6 * params["a"] * v["a"] + v["b"]))
    np.testing.assert_allclose(product["b"], 0.5 * v["a"])
    along = geometry.curvature_along(cubic, params, v, 0.5)
    np.testing.assert_allclose(along, geometry.dot(v, product), rtol=1e-6)


def test_curvature_of_several_outputs_at_once():
    def several(x):
        return jnp.stack([jnp.sum(x**2), jnp.sum(x**4), jnp.sum(x)])

    x, v = jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, -1.0])
    found = geometry.curvature_along(several, x, v)
    np.testing.assert_allclose(found, [4, 12 * (1 + 4), 0], rtol=1e-6)


def test_rademacher_probes_of_a_diagonal_give_the_trace_each():
    diagonal = {"a": jnp.asarray([1.0, -2.0, 5.0]), "b": jnp.asarray([[0.5]])}

    def quadratic(v):
        return sum(jnp.sum(d * x**2) for d, x in zip(diagonal.values(), v.values()))

    samples = geometry.hutchinson(quadratic, diagonal, 5, jax.random.key(0))
    np.testing.assert_allclose(samples, 4.5)
    assert geometry.estimate(samples) == (4.5, 0.0)


def test_the_trace_lies_within_its_error_and_the_error_is_the_known_one():
    matrix = symmetric(np.linspace(-1, 4, 30))
    probes = 200

    def quadratic(v):
        return v @ matrix @ v

    samples = geometry.hutchinson(quadratic, jnp.zeros(30), probes, jax.random.key(1))
    found = geometry.estimate(samples)
    off_diagonal = np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)
    np.testing.assert_allclose(
        found.standard_error, math.sqrt(2 * off_diagonal / probes), rtol=0.25
    )
    assert abs(found.mean - np.trace(matrix)) < 4 * found.standard_error
    few = geometry.estimate(samples[:20])
    np.testing.assert_allclose(few.standard_error / found.standard_error, 10**0.5, rtol=0.5)


def test_one_sample_has_no_error():
    found = geometry.estimate(np.asarray([2.0]))
    assert found.mean == 2.0 and math.isnan(found.standard_error)


def test_probes_are_repeatable_and_differ():
    def sums(v):
        return jnp.stack([jnp.sum(v["a"]), jnp.sum(v["a"] * jnp.arange(50))])

    like = {"a": jnp.zeros(50)}
    first, again = (geometry.hutchinson(sums, like, 4, jax.random.key(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first[:, 1])) == 4 and first.shape == (4, 2)


@pytest.mark.parametrize("eigenvalues", [[3.0, 1.0, -9.0, 0.0, 2.9], [-5.0, -2.0, -1.0, -3.0]])
def test_lanczos_finds_the_largest_and_not_the_one_largest_in_size(eigenvalues):
    matrix = symmetric(eigenvalues)
    size = len(eigenvalues)
    found = geometry.lanczos(
        lambda v: matrix @ v, size, jax.random.key(0), max_iterations=size, tolerance=1e-9
    )
    np.testing.assert_allclose(found.value, max(eigenvalues), atol=1e-6)
    np.testing.assert_allclose(found.smallest, min(eigenvalues), atol=1e-6)
    assert found.iterations <= size


def test_lanczos_stops_early_and_its_residual_holds():
    eigenvalues = np.concatenate([np.linspace(0, 1, 299), [20.0]])
    matrix = symmetric(eigenvalues)

    def find(iterations):
        return geometry.lanczos(
            lambda v: matrix @ v, 300, jax.random.key(0), max_iterations=iterations
        )

    found = find(50)
    assert found.iterations < 20 and abs(found.value - 20) <= found.residual <= 0.02
    short = find(2)
    assert short.iterations == 2 and abs(short.value - 20) <= short.residual > 0.02


def test_lanczos_of_a_multiple_of_the_identity_ends_at_once():
    found = geometry.lanczos(lambda v: 7 * v, 5, jax.random.key(0), max_iterations=5)
    assert found.iterations == 1
    np.testing.assert_allclose(found.value, 7)


def test_no_probes_and_no_iterations_are_refused():
    with pytest.raises(ValueError, match="probes = 0 is not allowed"):
        geometry.hutchinson(jnp.sum, jnp.zeros(2), 0, jax.random.key(0))
    with pytest.raises(ValueError, match="max_iterations = 0 is not allowed"):
        geometry.lanczos(lambda v: v, 2, jax.random.key(0), max_iterations=0)


# Directions ---------------------------------------------------------------------------------------


def test_filters_of_a_direction_are_as_long_as_the_networks():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (5, 3), "bias": (4,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    params["conv"] = params["conv"].at[..., 1].set(0)  # A filter that is zero stays where it is.
    drawn = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    scaled = geometry.filter_normalise(drawn, params)
    for name, axes in (("conv", (0, 1, 2)), ("dense", (0,))):
        norms = [
            np.linalg.norm(np.asarray(x[name]).reshape(-1, x[name].shape[-1]), axis=0)
            for x in (scaled, params)
        ]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        length = np.sum(np.asarray(scaled[name] * drawn[name]), axis=axes)
        wanted = norms[1] * np.sqrt(np.sum(np.asarray(drawn[name]) ** 2, axis=axes))
        np.testing.assert_allclose(length, wanted, rtol=1e-5)  # Directions of filters are kept.
    np.testing.assert_array_equal(scaled["bias"], 0)
    np.testing.assert_array_equal(scaled["conv"][..., 1], 0)


def test_a_direction_that_is_zero_stays_zero():
    params = {"kernel": jnp.ones((2, 2))}
    scaled = geometry.filter_normalise({"kernel": jnp.zeros((2, 2))}, params)
    np.testing.assert_array_equal(scaled["kernel"], 0)


# The twin -----------------------------------------------------------------------------------------


class Small(nn.Module):
    """A conv, a batch norm, an activation, a classifier."""

    activation: bool = True

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(3, (3, 3), use_bias=False, name="conv")(images)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = nn.relu(x) if self.activation else x
        return nn.Dense(4, name="classifier")(x.mean((1, 2)))


def student(model, bits, shape=(5, 5, 2)):
    """`(quantized, variables, ranges, images, labels)`."""
    variables = jax.tree.map(jnp.asarray, random_variables(model, shape))
    quantized = QuantizedModel(
        model, policy_for(model, variables, shape, bits, bits), variables, shape
    )
    images = jnp.asarray(np.random.default_rng(1).normal(size=(6, *shape)), jnp.float32)
    sites = len(quantized.sites)
    ranges = fixed_ranges(np.zeros(sites), np.full(sites, 5.0))
    return quantized, variables, ranges, images, jnp.arange(6) % 4


def hessian(fn, params):
    flat, restore = ravel_pytree(params)

    def column(v):
        return ravel_pytree(geometry.hvp(fn, params, restore(v)))[0]

    return np.asarray(jax.jit(jax.vmap(column))(jnp.eye(flat.size)))


def twin_loss(quantized, variables, ranges, images, labels):
    grids = freeze_grids(quantized, variables["params"], ranges)

    def loss(params):
        logits = twin_apply(quantized, grids, params, variables["batch_stats"], images)
        return losses.cross_entropy(logits, labels)

    return loss


def plain_loss(quantized, variables, images, labels):
    def loss(params):
        logits = apply_frozen(quantized.model, {**variables, "params": params}, images)
        return losses.cross_entropy(logits, labels)

    return loss


def test_the_twin_has_the_students_logits_and_gradients():
    quantized, variables, ranges, images, labels = student(Small(), 3)
    params, stats = variables["params"], variables["batch_stats"]

    def of_student(p):
        logits = quantized.apply(p, stats, images, ranges)[0]
        return losses.cross_entropy(logits, labels)

    twins = twin_loss(quantized, variables, ranges, images, labels)
    wanted, got = (jax.jit(jax.value_and_grad(f))(params) for f in (of_student, twins))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


def test_the_quantizer_of_training_has_no_forward_derivative_and_the_twin_has_its_curvature():
    quantized, variables, ranges, images, labels = student(Small(), 3)
    params, stats = variables["params"], variables["batch_stats"]
    v = jax.tree.map(jnp.ones_like, params)

    def of_student(p):
        return losses.cross_entropy(quantized.apply(p, stats, images, ranges)[0], labels)

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda p: geometry.hvp(of_student, p, v)).lower(params)
    twins = twin_loss(quantized, variables, ranges, images, labels)
    product = jax.jit(lambda p: geometry.hvp(twins, p, v))(params)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(product)) > 1e-3
    # Twice in reverse goes through the quantizer's own rule, twice: slower, and the same.
    slope = jax.grad(lambda p: geometry.dot(jax.grad(of_student)(p), v))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        product,
        jax.jit(slope)(params),
    )


def test_without_activations_the_twins_hessian_is_the_plain_networks_at_the_rounded_weights():
    quantized, variables, ranges, images, labels = student(Small(activation=False), 2)
    assert not quantized.sites
    got = hessian(twin_loss(quantized, variables, ranges, images, labels), variables["params"])
    rounded = quantize_params(variables["params"], quantized.policy)
    plain = hessian(plain_loss(quantized, variables, images, labels), rounded)
    np.testing.assert_allclose(got, plain, atol=1e-5)
    here = hessian(plain_loss(quantized, variables, images, labels), variables["params"])
    assert np.abs(got - here).max() > 0.01 * np.abs(here).max()  # Two bits are seen.


def test_with_many_bits_the_twins_hessian_is_that_of_the_plain_network():
    def distance(bits):
        quantized, variables, ranges, images, labels = student(Small(), bits)
        assert len(quantized.sites) == 1
        got = hessian(twin_loss(quantized, variables, ranges, images, labels), variables["params"])
        plain = hessian(plain_loss(quantized, variables, images, labels), variables["params"])
        np.testing.assert_allclose(got, got.T, atol=1e-5)
        return np.linalg.norm(got - plain) / np.linalg.norm(plain)

    # Not in every element: a ReLU that rounding takes across zero is seen in some of them.
    fine, coarse = distance(8), distance(3)
    assert fine < 0.06 and coarse > 4 * fine


class Unusual(nn.Module):
    """What has derivatives of its own: a depthwise conv, ReLU6, max pooling."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(images)
        x = nn.max_pool(nn.relu6(x), (2, 2), (2, 2))
        return nn.Dense(4, name="classifier")(x.reshape(len(x), -1))


def test_the_twin_of_an_unusual_network_can_be_differentiated_twice():
    shape = (6, 6, 4)
    model = Unusual()
    params = jax.tree.map(jnp.asarray, random_variables(model, shape))["params"]
    policy = policy_for(model, {"params": params}, shape, 8, 8, sites="integer")
    quantized = QuantizedModel(model, policy, {"params": params}, shape)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
    ranges = fixed_ranges(np.full(len(quantized.sites), -4), np.full(len(quantized.sites), 4))
    grids = freeze_grids(quantized, params, ranges)

    def loss(p):
        logits = twin_apply(quantized, grids, p, {}, images)
        return losses.cross_entropy(logits, jnp.arange(3))

    @jax.jit
    def curved(p):
        product = geometry.hvp(loss, p, p)
        return geometry.dot(p, product), geometry.curvature_along(loss, p, p)

    product, along = curved(params)
    assert abs(float(along)) > 1e-2
    np.testing.assert_allclose(product, along, rtol=1e-4)
