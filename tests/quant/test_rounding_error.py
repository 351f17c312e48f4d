"""What rounding costs: errors of tensors and sites, and networks of which one part is rounded."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.params import init_grids
from ait_jax.quant.ranges import fixed_ranges
from ait_jax.quant.rounding_error import (
    MAX_DECIBELS,
    activation_errors,
    activations_alone,
    decibels,
    relative_error,
    weight_errors,
    weights_alone,
    widened_errors,
)
from ait_jax.quant.weight_grids import SearchedGrids
from ait_jax.quant.weights import MinMax
from tests.support.fast_jit import fast_jit
from tests.support.policies import policy_for

SHAPE = (1, 2, 1)


class Two(nn.Module):
    """relu(x A) B."""

    @nn.compact
    def __call__(self, images, train=False):
        """Logits [N, 2]."""
        x = nn.relu(nn.Dense(2, use_bias=False, name="a")(images.reshape(len(images), -1)))
        return nn.Dense(2, use_bias=False, name="b")(x)


class Linear(nn.Module):
    """No activation."""

    @nn.compact
    def __call__(self, images, train=False):
        """Logits [N, 2]."""
        return nn.Dense(2, use_bias=False, name="a")(images.reshape(len(images), -1))


def two(a, b, **options):
    variables = {"params": {"a": {"kernel": a}, "b": {"kernel": b}}}
    policy = policy_for(Two(), variables, SHAPE, **options)
    return QuantizedModel(Two(), policy, variables, SHAPE), variables["params"]


def on_grid(x, lo, hi, bits):
    """The paper's quantizer, in NumPy."""
    scale = (2**bits - 1) / (hi - lo)
    zero_point = np.round(scale * lo) + 2 ** (bits - 1)
    codes = np.clip(np.round(scale * x - zero_point), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes + zero_point) / scale


def columns_on_grid(w, bits):
    return on_grid(w, w.min(0, keepdims=True), w.max(0, keepdims=True), bits)


def test_relative_error_by_hand():
    assert relative_error(jnp.float32([3, 4]), jnp.float32([3, 3])) == np.float32(1 / 25)
    assert decibels(1 / 25) == pytest.approx(13.979, abs=1e-3)
    assert decibels(4) == pytest.approx(-6.021, abs=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_sizes_whose_squares_float32_does_not_hold(unit):
    exact = np.float32([3, 4]) * np.float32(unit)
    error = relative_error(exact, exact * np.float32([1, 0.75]))
    np.testing.assert_allclose(error, 1 / 25, rtol=1e-5)


@pytest.mark.parametrize(
    ("exact", "rounded", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], MAX_DECIBELS),
        ([2.5, 2.5], [2.5, 2.5], MAX_DECIBELS),
        ([], [], MAX_DECIBELS),
        ([0.0, 0.0], [0.0, 1e-6], -MAX_DECIBELS),
        ([1.0, np.nan], [1.0, 0.0], -MAX_DECIBELS),
    ],
)
def test_decibels_are_finite(exact, rounded, expected):
    error = relative_error(jnp.float32(exact), jnp.float32(rounded))
    assert error.dtype == jnp.float32 and decibels(float(error)) == pytest.approx(expected)


def test_errors_of_weights_by_hand():
    w = np.float32([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.2, 5.0]])
    policy = policy_for(nn.Dense(2, use_bias=False), {"params": {"kernel": w}}, (4,), weight_bits=2)
    errors = weight_errors({"kernel": w}, policy)
    # Steps of 3.2 / 3; the other channel is constant, and exact.
    expected = ((3.2 / 3 - 1) ** 2 + (6.4 / 3 - 2) ** 2) / (1 + 4 + 3.2**2 + 4 * 25)
    assert list(errors) == ["kernel"]
    np.testing.assert_allclose(errors["kernel"], expected, rtol=1e-4)
    constant = weight_errors({"kernel": np.full_like(w, 0.3)}, policy)["kernel"]
    assert decibels(float(constant)) > 120


@pytest.mark.parametrize("quantizer", [MinMax(), SearchedGrids()])
def test_errors_are_those_of_the_policys_grids(quantizer):
    w = np.random.default_rng(0).normal(0, 1, (50, 2)).astype(np.float32)
    w[0] = 9  # Far out, so that grids which do not hold it have a smaller error.
    shapes = {"params": {"kernel": w}}
    policy = policy_for(nn.Dense(2, use_bias=False), shapes, (50,), weights=quantizer)
    coder = policy.weight_codes("kernel")
    # Whatever the weights were when the state was made.
    grids = init_grids({"kernel": 2 * w}, policy)
    rounded = coder.fake_quantize(w, grids.get("kernel"))
    expected = np.sum((w - rounded) ** 2) / np.sum(w**2)
    found = weight_errors({"kernel": w}, policy, grids)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    error = widened_errors({"kernel": w}, policy)
    fresh = coder.fake_quantize(w, coder.init(w))
    np.testing.assert_allclose(
        error("kernel", 4), np.sum((w - fresh) ** 2) / np.sum(w**2), rtol=1e-4
    )
    assert error("kernel", 4) > error("kernel", 5) > error("kernel", 8) > 0


def test_networks_of_which_one_part_is_rounded():
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (5, *SHAPE)).astype(np.float32)
    a, b = (rng.normal(0, 1, (2, 2)).astype(np.float32) for _ in range(2))
    quantized, params = two(a, b, weight_bits=2, activation_bits=3)
    ranges = fixed_ranges(np.zeros(1), np.ones(1))
    x = images.reshape(5, 2)
    rounded_a, rounded_b = columns_on_grid(a, 2), columns_on_grid(b, 2)

    alone = fast_jit(functools.partial(weights_alone, quantized))(params, {}, images)
    expected = np.maximum(x @ rounded_a, 0) @ rounded_b
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)

    alone = fast_jit(functools.partial(activations_alone, quantized))(params, {}, images, ranges)
    expected = on_grid(np.maximum(x @ a, 0), 0.0, 1.0, 3) @ b
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)

    both, _ = fast_jit(quantized.apply)(params, {}, images, ranges)
    entering = np.maximum(x @ rounded_a, 0)
    leaving = on_grid(entering, 0.0, 1.0, 3)
    np.testing.assert_allclose(both, leaving @ rounded_b, rtol=1e-5, atol=1e-6)

    # What enters the site is that of rounded weights, too large for its range among it.
    errors = activation_errors(quantized, params, {}, images, ranges)
    expected = np.sum((entering - leaving) ** 2) / np.sum(entering**2)
    assert errors.shape == (1,) and expected > 1e-4
    np.testing.assert_allclose(errors[0], expected, rtol=1e-4)


def test_a_network_without_sites():
    params = {"a": {"kernel": np.float32([[0.0, 1.0], [1.0, 0.4]])}}
    policy = policy_for(Linear(), {"params": params}, SHAPE, weight_bits=2)
    quantized = QuantizedModel(Linear(), policy, {"params": params}, SHAPE)
    images = np.float32([[[[1.0], [2.0]]]])
    ranges = quantized.init_ranges()
    assert activation_errors(quantized, params, {}, images, ranges).shape == (0,)
    alone = activations_alone(quantized, params, {}, images, ranges)
    np.testing.assert_allclose(alone, [[2.0, 1.8]], rtol=1e-6)


def test_without_a_signal_a_site_loses_nothing():
    quantized, params = two(*np.zeros((2, 2, 2), np.float32))
    ranges = fixed_ranges(np.zeros(1), np.ones(1))
    errors = activation_errors(quantized, params, {}, np.ones((3, *SHAPE), np.float32), ranges)
    assert errors.tolist() == [0.0]
