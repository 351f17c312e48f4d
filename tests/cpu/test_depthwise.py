"""Depthwise convs as sums of shifted products: equal to XLA's, where they apply, and only there."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.cpu.depthwise import depthwise_conv, shift_depthwise
from ait_jax.models import build_model
from ait_jax.quant.frozen import apply_frozen
from tests.conftest import random_variables


def plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(
    "shape, size, strides, padding",
    [
        ((2, 7, 7, 4), (3, 3), (1, 1), ((1, 1), (1, 1))),
        ((2, 8, 7, 4), (3, 3), (2, 2), ((0, 1), (1, 1))),
        ((1, 9, 9, 2), (5, 5), (2, 2), ((1, 2), (2, 2))),  # a last row that no tap sees
        ((3, 6, 5, 3), (3, 5), (2, 1), ((0, 0), (4, 0))),
        ((1, 5, 5, 2), (1, 1), (2, 2), ((0, 0), (0, 0))),
        ((2, 3, 3, 2), (3, 3), (1, 1), ((0, 0), (0, 0))),  # one output
    ],
)
def test_output_and_gradients_are_those_of_the_conv(shape, size, strides, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*size, 1, shape[-1])), jnp.float32)

    def both(conv):
        y, pull = jax.vjp(lambda x, kernel: conv(x, kernel, strides, padding), x, kernel)
        return y, *pull(jnp.cos(y))  # A cotangent without symmetry.

    for ours, wanted in zip(both(depthwise_conv), both(plain)):
        assert ours.shape == wanted.shape
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8, 3)), jnp.bfloat16)
    kernel = jnp.ones((3, 3, 1, 3), jnp.bfloat16)
    form = ((1, 1), ((1, 1), (1, 1)))
    y = depthwise_conv(x, kernel, *form)
    exact = plain(x.astype(jnp.float32), kernel.astype(jnp.float32), *form)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


def convolutions(model, variables, images):
    """How many convs the model's program for this machine holds, by groups: plain, grouped."""
    text = jax.jit(lambda v, x: apply_frozen(model, v, x)).lower(variables, images).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    grouped = sum("feature_group_count = 1 " not in line for line in lines)
    return len(lines) - grouped, grouped


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_lite0"])
def test_networks_give_the_same_logits_without_a_grouped_conv(arch):
    model = build_model(arch, 10)
    variables = random_variables(model, (32, 32, 3))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    wanted = jax.jit(model.apply)(variables, images)
    logits = jax.jit(lambda v, x: apply_frozen(model, v, x))(variables, images)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))
    if jax.default_backend() == "cpu":
        assert convolutions(model, variables, images)[1] == 0


class OneConv(nn.Module):
    options: dict

    @nn.compact
    def __call__(self, x):
        return nn.Conv(**self.options)(x)


LEFT_ALONE = {
    "grouped": {"features": 4, "feature_group_count": 2},
    "several outputs": {"features": 8, "feature_group_count": 4},
    "dilated": {"features": 4, "feature_group_count": 4, "kernel_dilation": 2},
    "circular": {"features": 4, "feature_group_count": 4, "padding": "CIRCULAR"},
    "plain": {"features": 4},
}
TAKEN = {
    "same": {"padding": "SAME", "strides": 2},
    "valid, without bias": {"padding": "VALID", "use_bias": False},
    "one number": {"padding": 2, "strides": (2, 1)},
    "numbers": {"padding": (1, (0, 2))},
}


@pytest.mark.parametrize("name", [*LEFT_ALONE, *TAKEN])
def test_what_is_depthwise_is_taken_and_the_rest_left_alone(name):
    taken = name in TAKEN
    depthwise = {"features": 4, "feature_group_count": 4}
    options = depthwise | TAKEN[name] if taken else LEFT_ALONE[name]
    model = OneConv({"kernel_size": (3, 3)} | options)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 7, 4)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    with nn.intercept_methods(shift_depthwise):
        y = model.apply(variables, x)
        text = str(jax.make_jaxpr(model.apply)(variables, x))
    assert ("custom_vjp" in text) == taken
    np.testing.assert_allclose(y, model.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_initialisation_is_flax_own():
    model = OneConv({"features": 4, "feature_group_count": 4, "kernel_size": (3, 3)})
    x = jnp.zeros((1, 5, 5, 4))
    with nn.intercept_methods(shift_depthwise):
        ours = model.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours, model.init(jax.random.key(0), x))
