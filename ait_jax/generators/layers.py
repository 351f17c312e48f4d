"""Layers that generators share: PyTorch's initialisation, and convs without wasted work."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.cpu.narrow_conv import FEW_FEATURES, narrow_conv
from ait_jax.promotion import of_rank

__all__ = [
    "ConditionalBatchNorm",
    "TorchConv",
    "TorchDense",
    "UpsampleConv",
    "upsample_by_phases",
    "upsample_by_spreading",
    "upsample_conv",
]


def _uniform_init(fan_in: int):
    # PyTorch's default for kernels and biases alike; the generators were tuned with it.
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and bias are rows of tables, chosen (or mixed) by label.

    Attributes:
        num_classes: rows of the tables.
        epsilon: added to the variance.
        axis_name: the axis over which batch statistics are taken, if any.
    """

    num_classes: int
    epsilon: float = 0.8
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, labels: jax.Array, mixture: jax.Array | None = None
    ) -> jax.Array:
        """Normalises by the batch, scales and shifts by class.

        Args:
            x: [N, H, W, features].
            labels: int [N, M].
            mixture: weights [N, M] of the labels' rows; the first label's row alone if not given.

        Returns:
            As `x`.
        """
        shape = (self.num_classes, x.shape[-1])
        tables = (
            self.param("scale", nn.initializers.ones, shape),
            self.param("bias", nn.initializers.zeros, shape),
        )
        x = nn.BatchNorm(
            use_running_average=False,
            momentum=0.9,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            use_scale=False,
            use_bias=False,
            name="norm",
        )(x)
        if mixture is None:
            scale, bias = (table[labels[:, 0]] for table in tables)
        else:
            scale, bias = (jnp.einsum("nm,nmf->nf", mixture, table[labels]) for table in tables)
        return x * scale[:, None, None] + bias[:, None, None]


class TorchDense(nn.Module):
    """A dense layer with bias and PyTorch's default initialisation.

    Attributes:
        features: outputs.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, C] to [N, features]."""
        init = _uniform_init(x.shape[-1])
        return nn.Dense(self.features, kernel_init=init, bias_init=init, name="dense")(x)


def _conv(x: jax.Array, kernel: jax.Array, padding=((1, 1), (1, 1)), dilation=1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class TorchConv(nn.Module):
    """A conv with bias, the size of its input kept, and PyTorch's default initialisation.

    Attributes:
        features: output channels.
        size: of the kernel, odd.
        dilation: distance of its taps.
    """

    features: int
    size: int = 3
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, H, W, features]."""
        channels = x.shape[-1]
        init = _uniform_init(self.size**2 * channels)
        kernel = self.param("kernel", init, (self.size, self.size, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        if (self.size, self.dilation) == (3, 1) and self.features <= FEW_FEATURES:
            return narrow_conv(x, kernel) + of_rank(bias, x.ndim)
        pad = self.dilation * (self.size // 2)
        y = _conv(x, kernel, ((pad, pad), (pad, pad)), self.dilation)
        return y + of_rank(bias, x.ndim)


def upsample_by_phases(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_conv` as four 2x2 convs on x, one for each parity of the output position.

    Args:
        x: [N, H, W, C].
        kernel: [3, 3, C, features].
    """
    n, height, width, _ = x.shape
    k0, k1, k2 = kernel
    # Even output rows see input rows (i - 1, i, i), odd ones (i, i, i + 1); columns alike.
    by_row = (jnp.stack([k0, k1 + k2]), jnp.stack([k0 + k1, k2]))
    padding = ((1, 0), (0, 1))

    def phase(row: int, column: int) -> jax.Array:
        k0, k1, k2 = by_row[row][:, 0], by_row[row][:, 1], by_row[row][:, 2]
        folded = jnp.stack([k0, k1 + k2] if column == 0 else [k0 + k1, k2], axis=1)
        return _conv(x, folded, (padding[row], padding[column]))

    rows = [jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)]
    # [N, H, row parity, W, column parity, features]
    return jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, kernel.shape[-1])


def upsample_by_spreading(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`upsample_conv` as one transposed conv, its 4x4 kernel the sums of neighbours of the 3x3 one.

    Args:
        x: [N, H, W, C].
        kernel: [3, 3, C, features].
    """
    for axis in (0, 1):
        edge = jnp.zeros_like(jax.lax.slice_in_dim(kernel, 0, 1, axis=axis))
        kernel = jnp.concatenate([kernel, edge], axis) + jnp.concatenate([edge, kernel], axis)
    return _spread_conv(x, kernel)


@jax.custom_vjp
def _spread_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _spread_conv_fwd(x, kernel):
    return _spread_conv(x, kernel), (x, kernel)


def _spread_conv_bwd(residuals, g):
    # The data's gradient is a strided conv of g with the kernel turned round. That conv's own
    # gradient, with data and g in each other's place, is this kernel's: differentiation as usual
    # would have XLA turn the activations round instead.
    x, kernel = residuals

    def strided(turned):
        return jax.lax.conv_general_dilated(
            g, turned, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWOI", "NHWC")
        )

    dx, pull = jax.vjp(strided, kernel[::-1, ::-1])
    (turned,) = pull(x)
    return dx, turned[::-1, ::-1]


_spread_conv.defvjp(_spread_conv_fwd, _spread_conv_bwd)


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest 2x upsampling followed by a 3x3 conv, without ever making the upsampled array.

    Of the three rows (columns) that an output row sees, two are copies of one input row: 4/9 of the
    multiplications are enough. Equal to the plain formulation up to the order of float sums.

    On TPUs it is one transposed conv, elsewhere four small convs: putting their outputs between
    each other costs a TPU more than they do, by its compiler's estimate.

    Args:
        x: [N, H, W, C].
        kernel: the 3x3 kernel, [3, 3, C, features].

    Returns:
        [N, 2H, 2W, features].
    """
    return jax.lax.platform_dependent(
        x, kernel, tpu=upsample_by_spreading, default=upsample_by_phases
    )


class UpsampleConv(nn.Module):
    """Nearest 2x upsampling and a 3x3 conv with bias, for a batch norm to follow.

    The parameters are the 3x3 conv's. The batch norm takes any bias away again, so its gradient is
    zero; summing it up over the activations would give rounding errors, which Adam would scale up.

    Attributes:
        features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, 2H, 2W, features]."""
        channels = x.shape[-1]
        init = _uniform_init(9 * channels)
        kernel = self.param("kernel", init, (3, 3, channels, self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias)
        return upsample_conv(x, kernel) + of_rank(jax.lax.stop_gradient(bias), x.ndim)
