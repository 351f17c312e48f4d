"""3x3 convs to few features, in a form that XLA on CPU runs fast.

XLA's conv on CPU is a matmul over patches, of which three columns leave most of the vector unit
idle. Here, one matmul gives the products of every pixel with all nine taps, and what belongs to one
output is summed, rows first, then columns: a third of the time, forward and backward.
"""

import jax
import jax.numpy as jnp

__all__ = ["FEW_FEATURES", "narrow_conv"]

FEW_FEATURES = 4  # Up to this many, `narrow_conv` is the faster one.


def _conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        rhs_dilation=(1, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _conv_by_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    features = kernel.shape[-1]
    products = x.reshape(-1, channels) @ kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
    products = products.reshape(n, height, width, 3, 3 * features)
    high = jnp.pad(products, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    rows = high[:, :height, :, 0] + high[:, 1:-1, :, 1] + high[:, 2:, :, 2]
    wide = jnp.pad(rows, ((0, 0), (0, 0), (1, 1), (0, 0)))
    wide = wide.reshape(n, height, width + 2, 3, features)
    return wide[:, :, :width, 0] + wide[:, :, 1:-1, 1] + wide[:, :, 2:, 2]


def narrow_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 conv, padding 1, to few features; equal to XLA's up to the order of float sums.

    Args:
        x: [N, H, W, C].
        kernel: [3, 3, C, features].

    Returns:
        [N, H, W, features].
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_conv_by_matmul, default=_conv)
