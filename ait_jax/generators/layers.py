"""Layers that generators share: PyTorch's initialisation, and upsampling fused into its conv."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["TorchConv", "TorchDense", "UpsampleConv", "upsample_conv"]


def _uniform_init(fan_in: int):
    # PyTorch's default for kernels and biases alike; the generators were tuned with it.
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class TorchDense(nn.Module):
    """A dense layer with bias and PyTorch's default initialisation."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, C] to [N, features]."""
        init = _uniform_init(x.shape[-1])
        return nn.Dense(self.features, kernel_init=init, bias_init=init, name="dense")(x)


class TorchConv(nn.Module):
    """A 3x3 conv with bias, padding 1 and PyTorch's default initialisation."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H, W, features]."""
        init = _uniform_init(9 * x.shape[-1])
        return nn.Conv(
            self.features, (3, 3), padding=1, kernel_init=init, bias_init=init, name="conv"
        )(x)


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest 2x upsampling followed by a 3x3 conv, without ever making the upsampled array.

    Of the three rows (columns) that an output row sees, two are copies of one input row, so the
    conv is four 2x2 convs on the low-resolution input, one for each parity of the output position:
    4/9 of the multiplications. Equal to the plain formulation up to the order of float sums.

    Args:
        x: [N, H, W, C].
        kernel: the 3x3 kernel, [3, 3, C, features].

    Returns:
        [N, 2H, 2W, features].
    """
    n, height, width, _ = x.shape
    k0, k1, k2 = kernel
    # Even output rows see input rows (i - 1, i, i), odd ones (i, i, i + 1); columns alike.
    by_row = (jnp.stack([k0, k1 + k2]), jnp.stack([k0 + k1, k2]))
    padding = ((1, 0), (0, 1))

    def phase(row: int, column: int) -> jax.Array:
        k0, k1, k2 = by_row[row][:, 0], by_row[row][:, 1], by_row[row][:, 2]
        folded = jnp.stack([k0, k1 + k2] if column == 0 else [k0 + k1, k2], axis=1)
        return jax.lax.conv_general_dilated(
            x,
            folded,
            (1, 1),
            (padding[row], padding[column]),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    # [N, H, row parity, W, column parity, features]
    return jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, kernel.shape[-1])


class UpsampleConv(nn.Module):
    """Nearest 2x upsampling and a 3x3 conv with bias; the parameters are the 3x3 conv's."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, 2H, 2W, features]."""
        channels = x.shape[-1]
        init = _uniform_init(9 * channels)
        kernel = self.param("kernel", init, (3, 3, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        return upsample_conv(x, kernel) + bias
