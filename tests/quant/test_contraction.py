"""Sums of integer codes, on every carrier, against numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant import affine
from ait_jax.quant.contraction import (
    Contraction,
    conv_products,
    exact_sums,
    float32_products,
    tap_products,
)
from tests.support.fast_jit import fast_jit
from tests.support.integer_sums import products_by_hand

FORMS = {
    # Form, sizes of data, kernel.
    "3x3": (Contraction((1, 1), ((1, 1),) * 2, (1, 1), 1), (5, 6, 7), (3, 3, 7, 8)),
    "strided": (Contraction((2, 2), ((0, 1),) * 2, (1, 1), 1), (8, 6, 3), (3, 3, 3, 4)),
    "valid, dilated": (Contraction((2, 1), ((0, 0),) * 2, (2, 1), 1), (9, 6, 3), (3, 2, 3, 4)),
    "projection": (Contraction((2, 2), ((0, 0),) * 2, (1, 1), 1), (6, 6, 5), (1, 1, 5, 6)),
    "depthwise": (Contraction((2, 1), ((2, 2), (1, 2)), (1, 1), 6), (7, 5, 6), (5, 5, 1, 6)),
    "two outputs each": (Contraction((1, 1), ((1, 1),) * 2, (1, 1), 3), (4, 4, 3), (3, 3, 1, 6)),
    "grouped": (Contraction((1, 1), ((1, 1),) * 2, (1, 1), 2), (4, 4, 6), (3, 3, 3, 8)),
    "dilated depthwise": (Contraction((1, 1), ((2, 2),) * 2, (2, 2), 4), (6, 6, 4), (3, 3, 1, 4)),
    "transposed": (Contraction((1, 1), ((2, 1),) * 2, (1, 1), 1, (2, 2)), (4, 3, 5), (3, 3, 5, 4)),
    "transposed, cut, by taps": (
        Contraction((1, 2), ((-1, 2), (1, -1)), (2, 1), 2, (3, 2)), (4, 5, 6), (3, 2, 3, 4)),
    "one axis": (Contraction((2,), ((1, 1),), (1,), 1), (9, 3), (3, 3, 4)),
    "dense": (Contraction((), (), (), 1), (12,), (12, 5)),
    "dense on sequences": (Contraction((), (), (), 1), (3, 12), (12, 5)),
    # Too large a sum for float32, were it not for portions; and, grouped, for those too.
    "portions": (Contraction((1, 1), ((0, 0),) * 2, (1, 1), 1), (2, 2, 2500), (1, 1, 2500, 3)),
    "portions, dense": (Contraction((), (), (), 1), (2049,), (2049, 2)),
    "large groups": (Contraction((), (), (), 1)._replace(
        strides=(1,), padding=((0, 0),), dilation=(1,), groups=2), (1, 3000), (1, 1500, 4)),
}  # fmt: skip


def random_codes(rng, shape, bits):
    low, high = affine.code_limits(bits)
    codes = rng.integers(low, high, shape, endpoint=True)
    # A channel at the end of its range is where sums are largest.
    codes[..., 0] = low
    return codes.astype(np.int8)


@functools.partial(fast_jit, static_argnames=("form", "bits"))
def sums(codes, zero_x, kernel, zero_w, form, bits):
    """Of every carrier, and those of steps."""
    carriers = {
        "float32": float32_products(form, codes, kernel, bits),
        "conv": conv_products(form, codes, kernel),
        "taps": tap_products(form, codes, kernel),
    }
    return carriers, exact_sums(form, codes, zero_x, kernel, zero_w, bits)


@pytest.mark.parametrize("name", FORMS)
def test_sums_are_exact(name):
    form, size, kernel_shape = FORMS[name]
    rng = np.random.default_rng(0)
    for bits in ((8, 8), (4, 2)):
        codes = random_codes(rng, (2, *size), bits[0])
        codes[0] = affine.code_limits(bits[0])[0]
        kernel = random_codes(rng, kernel_shape, bits[1])
        zero_x, zero_w = np.int32(37), rng.integers(-900, 900, kernel_shape[-1], dtype=np.int32)
        expected = products_by_hand(form, codes, kernel)
        carriers, got = sums(codes, zero_x, kernel, zero_w, form=form, bits=bits)
        for carrier, products in carriers.items():
            assert products.dtype == jnp.int32, carrier
            np.testing.assert_array_equal(products, expected, err_msg=carrier)
        assert got.dtype == jnp.int32
        n_x, n_w = codes.astype(int) + zero_x, kernel.astype(int) + zero_w
        np.testing.assert_array_equal(got, products_by_hand(form, n_x, n_w))


@pytest.mark.parametrize(
    ("size", "kernel_shape", "inputs"),
    [((3, 12), (12, 2, 5), 1), ((3, 2, 5), (2, 5, 4), 2), ((2, 5), (2, 5, 3, 2), 2)],
)
def test_matmuls_of_several_axes(size, kernel_shape, inputs):
    rng = np.random.default_rng(1)
    codes, kernel = random_codes(rng, (2, *size), 8), random_codes(rng, kernel_shape, 4)
    zero_w = rng.integers(-900, 900, kernel_shape[inputs:], dtype=np.int32)
    form = Contraction((), (), (), 1, inputs=inputs)
    got = exact_sums(form, codes, np.int32(37), kernel, zero_w, (8, 4))
    expected = np.tensordot(codes.astype(int) + 37, kernel.astype(int) + zero_w, inputs)
    np.testing.assert_array_equal(got, expected)


def test_portions_are_needed():
    form = Contraction((), (), (), 1)
    codes = np.full((1, 2049), -127, np.int8)
    kernel = np.full((2049, 1), -127, np.int8)
    plain = jnp.matmul(codes.astype(np.float32), kernel.astype(np.float32))
    assert int(plain[0, 0]) != 2049 * 127**2
    assert int(float32_products(form, codes, kernel, (8, 8))[0, 0]) == 2049 * 127**2


def test_terms_may_wrap_around_where_the_sum_does_not():
    # zero_w * (sum of codes) alone is beyond int32.
    codes = np.full((1, 300), -128, np.int8)
    kernel = np.full((300, 1), 100, np.int8)
    arguments = codes, np.int32(129), kernel, np.int32([100_000]), (8, 8)
    assert int(exact_sums(Contraction((), (), (), 1), *arguments)[0, 0]) == 300 * 100_100
