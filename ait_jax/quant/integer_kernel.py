"""A kernel as integers: its codes and grids, those of constant channels included."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.quant import affine
from ait_jax.quant.contraction import IntegerError
from ait_jax.quant.weights import Grid

__all__ = ["RECOVERABLE", "IntegerKernel", "integer_kernel", "rounded_kernel"]

# Below this, code + zero_point is recovered from the float32 value without doubt.
RECOVERABLE = 1 << 20


class IntegerKernel(NamedTuple):
    """A kernel's codes and grids; a weight is `(code + zero_point) / scale`.

    Attributes:
        codes: int8, of the shape of the Flax kernel (HWIO, or [*in, *out]).
        scale: float32 [*out], codes per unit.
        zero_point: int32 [*out].
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array

    def dequantized(self) -> jax.Array:
        """The float32 weights."""
        return affine.dequantize(self.codes, self.scale, self.zero_point.astype(jnp.float32))


def rounded_kernel(
    w: jax.Array, grid: Grid, bits: int, output_axes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and zero points of a kernel; traceable.

    Args:
        w: float32 [..., *out].
        grid: of the kernel, of length 1 along the other axes.
        bits: 2 to 8.
        output_axes: how many of the last axes are output channels.

    Returns:
        int8 codes of the shape of `w`, and float32 scales and zero points [*out].
    """
    out = w.shape[w.ndim - output_axes :]
    scale, zero_point = (part.reshape(out) for part in grid)
    return affine.quantize(w, *grid, bits), scale, zero_point


def integer_kernel(
    layer: str, w: np.ndarray, rounded: tuple[np.ndarray, np.ndarray, np.ndarray], bits: int
) -> IntegerKernel:
    """The kernel of rounded weights; channels that are constant get a grid on which they are exact.

    Args:
        layer: its name, for errors.
        w: float32 [..., *out].
        rounded: what `rounded_kernel` makes of them.
        bits: 2 to 8.

    Raises:
        IntegerError: naming the layer, if a channel is too narrow for its size.
    """
    shape, out = w.shape, rounded[1].shape
    w = w.reshape(*shape[: w.ndim - len(out)], -1)
    grid = [part.reshape(-1) for part in rounded[1:]]
    axes, wide = tuple(range(w.ndim - 1)), (*(1,) * (w.ndim - 1), -1)
    codes: np.ndarray = rounded[0].reshape(w.shape).copy()
    scale, zero_point = (part.copy() for part in grid)
    steps = codes + zero_point
    size = np.abs(steps).max(axes)
    constant = steps.min(axes) == steps.max(axes)
    for channel in np.flatnonzero(~(size < RECOVERABLE) | (constant & (size > 1 << bits))):
        weights = w[..., channel]
        if not constant[channel]:
            raise IntegerError(
                f"channel {channel} of layer {layer!r} has no integers: its weights lie in "
                f"[{weights.min()}, {weights.max()}], too near to one another for their size"
            )
        # In the shapes of fake quantization, on which the last bit of XLA's quotient depends.
        values = affine.dequantize(
            jnp.asarray(codes), *(jnp.asarray(part.reshape(wide)) for part in grid)
        )
        value = np.float32(values[..., channel].ravel()[0])
        scale[channel], zero_point[channel] = _constant_grid(value)
        codes[..., channel] = 0
    return IntegerKernel(
        jnp.asarray(codes.reshape(shape)),
        jnp.asarray(scale.reshape(out)),
        jnp.asarray(zero_point.reshape(out).astype(np.int32)),
    )


def _constant_grid(value: np.float32) -> tuple[np.float32, int]:
    """`(scale, n)` with n small, and n / scale and n * (1 / scale) the float32 value, not 0."""
    size = np.abs(value)
    for n in map(np.float32, range(1, 256)):
        nearest = n / size
        for scale in (nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.inf)):
            if n / scale == n * (1 / scale) == size:
                return scale, int(np.copysign(n, value))
    raise IntegerError(f"a channel whose weights are all {value} has no integers")
