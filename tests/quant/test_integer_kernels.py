"""Codes of a student's kernels and sites: rebuilt exactly, or refused with a reason."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant.integer import IntegerError
from ait_jax.quant.params import code_tree, quantize_params
from ait_jax.quant.ranges import fixed_ranges, init_ranges
from tests.support.integer_networks import integer_model, integer_model_of, network


def test_kernels_are_rebuilt_exactly():
    _, variables, _, ranges = network("mixed", 8, "integer")
    params = variables["params"]
    for bits in (2, 5, 8):
        integer = integer_model("mixed", 8, (bits, 4), "integer")
        policy = integer.quantized.policy
        kernels = integer.from_student(params, variables["batch_stats"], ranges)
        rebuilt = integer.float_kernels(kernels)
        expected = quantize_params(params, policy)
        for name, codes in code_tree(params, policy).items():
            layer = name.removesuffix("/kernel")
            kernel = kernels.kernels[layer]
            np.testing.assert_array_equal(kernel.codes, codes)
            np.testing.assert_array_equal(rebuilt[layer], expected[layer]["kernel"])
            # And by numpy alone.
            steps = np.float32(kernel.codes) + np.float32(kernel.zero_point)
            by_numpy = steps * (1 / np.array(kernel.scale))
            np.testing.assert_array_equal(by_numpy, rebuilt[layer])


@functools.cache
def dense_layer(bits):
    return integer_model_of(nn.Dense(3), bits=bits)


def dense_student(kernel, bits=8, ranges=None):
    """Integers of a dense layer [3, 3] on images in [-1, 1]."""
    integer = dense_layer(bits)
    params = {"kernel": np.float32(kernel), "bias": np.float32([0.5, 0, -1])}
    return integer, params, integer.from_student(params, {}, ranges or fixed_ranges([-1], [1]))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_constant_channels(bits):
    rng = np.random.default_rng(0)
    values = [0.1, -0.1, 0.0, 1.0, -3.3e-4, 17.77, 1 / 3, *rng.normal(0, 0.1, 50)]
    for value in values:
        kernel = np.full((3, 3), value, np.float32)
        kernel[:, 2] = (-1, 0.2, 1)
        integer, params, variables = dense_student(kernel, bits)
        codes, scale, zero_point = variables.kernels["kernel"]
        assert (codes.dtype, scale.dtype, zero_point.dtype) == (jnp.int8, jnp.float32, jnp.int32)
        assert np.abs(np.int64(codes) + zero_point).max() < 256
        expected = quantize_params(params, integer.quantized.policy)["kernel"]
        np.testing.assert_array_equal(integer.float_kernels(variables)["kernel"], expected)
        np.testing.assert_allclose(expected[:, :2], value, rtol=1e-6)
    images = np.float32([[0.3, -0.2, 1.0], [1, 1, -1]])
    got = integer.apply(variables, images)
    np.testing.assert_allclose(got, images @ expected + params["bias"], atol=0.02)


def test_a_channel_that_is_almost_constant_is_named():
    kernel = np.float32([[1, 2, 3], [1, 3, 3 + 1e-6], [1, 2, 3]])
    with pytest.raises(IntegerError, match=r"2 of layer 'kernel' has no integers: .*\[3.0, 3.00"):
        dense_student(kernel)


def test_sums_that_could_leave_int32_are_refused():
    # 3 steps of 1e5 and 8-bit images of up to 255 / 2: below; far from zero: above.
    kernel = np.float32([[1, 2, 3], [1.001, 3, 3.003], [1.002, 2, 3]])
    dense_student(kernel)
    with pytest.raises(IntegerError, match=r"layer 'kernel' cannot run .*: its sums may reach"):
        dense_student(kernel, ranges=fixed_ranges([10.0], [10.1]))


@pytest.mark.parametrize(
    "ranges", [init_ranges(1), fixed_ranges([0.3], [0.3]), fixed_ranges([0.0], [np.inf])]
)
def test_ranges_without_a_grid_are_named(ranges):
    with pytest.raises(IntegerError, match=r"activation site 0 \(image in .*range \["):
        dense_student(np.eye(3), ranges=ranges)


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(IntegerError, match="channel 1 of layer 'kernel'"):
        dense_student(np.diag([1, np.nan, 1]))
