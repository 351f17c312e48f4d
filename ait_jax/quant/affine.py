"""The asymmetric uniform quantizer: grid, codes and straight-through fake quantization.

Conventions (pinned; they are those of the published AIT code):

    scale      = (2**bits - 1) / max(hi - lo, 1e-8)              codes per unit
    zero_point = round(scale * lo) + 2**(bits - 1)
    code       = clip(round(scale * x - zero_point), -2**(bits - 1), 2**(bits - 1) - 1)
    dequant    = (code + zero_point) / scale

Rounding is half-to-even. Zero is *not* forced into the range. All arithmetic is float32, whatever
the dtype of the input, so that bfloat16 tensors fall on the same grid; results of fake
quantization come back in the input's dtype. This module depends on jax alone.

Codes are the same however a program is compiled. Gradient Inundation leaves weights on the very
edge of a rounding threshold, and a compiler may fuse `scale * x - zero_point` into one operation
that rounds once, or may not: a code would differ between training, evaluation and export.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ait_jax.cpu.computed_once import computed_once
from ait_jax.promotion import of_rank
from ait_jax.quant.rounding import (
    MAX_BITS,
    MIN_BITS,
    affine_params,
    as_stored,
    check_bits,
    code_limits,
    crossing_scale,
    dequantize,
    float_codes,
    quantize,
    reciprocal,
    values_of_steps,
)

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "WeightCodes",
    "affine_params",
    "check_bits",
    "code_limits",
    "crossing_scale",
    "dequantize",
    "fake_quant",
    "fake_quant_on_grid",
    "fake_quant_steps",
    "fake_quant_weight",
    "grid_shape",
    "quantize",
    "reciprocal",
    "steps",
    "weight_codes",
    "weight_params",
]

ChannelAxis = int | tuple[int, ...] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(
    x: jax.Array, lo: jax.Array, hi: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    scale, zero_point = affine_params(lo, hi, bits)
    codes = float_codes(x, scale, zero_point, bits)
    steps = computed_once(codes + of_rank(zero_point, x.ndim))
    return values_of_steps(steps, scale, zero_point).astype(x.dtype), steps


def _fake_quant_fwd(x, lo, hi, bits):
    return _fake_quant(x, lo, hi, bits), (lo, hi)


def _fake_quant_bwd(bits, residuals, gradients):
    del bits
    lo, hi = residuals
    # Straight-through for x, clipped values included (the method has no clip mask); the range is
    # a statistic, not a parameter. Steps are integers, and have no gradient.
    return gradients[0], jnp.zeros_like(lo), jnp.zeros_like(hi)


_fake_quant.defvjp(_fake_quant_fwd, _fake_quant_bwd)


def fake_quant(x: jax.Array, lo: jax.Array, hi: jax.Array, bits: int) -> jax.Array:
    """Rounds `x` to the grid of `[lo, hi]`; its gradient is the identity for `x`.

    The range gets no gradient, and there is no clip mask (AIT, section 3; the straight-through
    estimator of the published code).

    Args:
        x: any shape, any float dtype.
        lo: lower end of the range, broadcastable to `x`.
        hi: upper end of the range, broadcastable to `x`.
        bits: 2 to 8.

    Returns:
        `dequantize(quantize(x))`, of the shape and dtype of `x`.

    Raises:
        ValueError: if `bits` is not in 2..8.
    """
    return fake_quant_steps(x, lo, hi, bits)[0]


def fake_quant_steps(
    x: jax.Array, lo: jax.Array, hi: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    """`fake_quant`, and its values' `steps`, which need not be found again.

    Args:
        x: as for `fake_quant`.
        lo: likewise.
        hi: likewise.
        bits: likewise.

    Returns:
        The values, of the dtype of `x`, and their steps, float32 and without a gradient; both of
        the shape of `x`.

    Raises:
        ValueError: if `bits` is not in 2..8.
    """
    x = jnp.asarray(x)
    return _fake_quant(
        x, jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32), check_bits(bits)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _on_grid(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    codes = float_codes(x, scale, zero_point, bits)
    return dequantize(codes, scale, zero_point).astype(x.dtype)


def _on_grid_fwd(x, scale, zero_point, bits):
    return _on_grid(x, scale, zero_point, bits), (scale, zero_point)


def _on_grid_bwd(bits, grid, gradient):
    del bits
    return gradient, *map(jnp.zeros_like, grid)


_on_grid.defvjp(_on_grid_fwd, _on_grid_bwd)


def fake_quant_on_grid(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int
) -> jax.Array:
    """Rounds `x` to a given grid; its gradient is the identity for `x`, and the grid gets none.

    Args:
        x: any shape, any float dtype.
        scale: codes per unit, float32, broadcastable to `x`.
        zero_point: offset from `affine_params`, float32, of the shape of `scale`.
        bits: 2 to 8.

    Returns:
        `dequantize(quantize(x))`, of the shape and dtype of `x`.
    """
    return _on_grid(jnp.asarray(x), scale, zero_point, check_bits(bits))


def steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The integers that values on a grid are multiples of its step by: `code + zero_point`.

    Args:
        x: float32 values of `fake_quant` or `dequantize`, any shape.
        scale: steps per unit, broadcastable to `x`.

    Returns:
        float32, of the shape of `x`; not differentiable.
    """
    return jnp.round(x.astype(jnp.float32) * of_rank(scale, x.ndim))


def _reduced_axes(ndim: int, channel_axis: ChannelAxis) -> tuple[int, ...]:
    if channel_axis is None:
        return tuple(range(ndim))
    axes = (channel_axis,) if isinstance(channel_axis, int) else tuple(channel_axis)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"channel_axis = {channel_axis!r} is not allowed for a tensor of rank {ndim}: "
                f"each axis must be in {-ndim}..{ndim - 1}"
            )
    kept = {axis % ndim for axis in axes}
    return tuple(axis for axis in range(ndim) if axis not in kept)


def grid_shape(shape: tuple[int, ...], channel_axis: ChannelAxis = -1) -> tuple[int, ...]:
    """The shape of a weight tensor's grids: 1 along every axis that has none of its own."""
    reduced = _reduced_axes(len(shape), channel_axis)
    return tuple(1 if axis in reduced else n for axis, n in enumerate(shape))


def _weight_range(w: jax.Array, channel_axis: ChannelAxis) -> tuple[jax.Array, jax.Array]:
    axes = _reduced_axes(w.ndim, channel_axis)
    w = as_stored(jax.lax.stop_gradient(w))
    return jnp.min(w, axis=axes, keepdims=True), jnp.max(w, axis=axes, keepdims=True)


def weight_params(
    w: jax.Array, bits: int, channel_axis: ChannelAxis = -1
) -> tuple[jax.Array, jax.Array]:
    """The grid of a weight tensor: its own min and max per channel.

    Args:
        w: weights, any shape; the last axis is the output channel in Flax's layouts.
        bits: 2 to 8.
        channel_axis: axis (or axes) along which every index has a grid of its own; None for one
            grid per tensor.

    Returns:
        `(scale, zero_point)`, float32, with reduced axes kept at size 1.

    Raises:
        ValueError: if `bits` is not in 2..8 or `channel_axis` is not an axis of `w`.
    """
    lo, hi = _weight_range(w, channel_axis)
    return affine_params(lo, hi, bits)


def weight_codes(w: jax.Array, bits: int, channel_axis: ChannelAxis = -1) -> jax.Array:
    """int8 codes of a weight tensor on its own grid.

    The code of a constant channel, whose grid is about 1e-9 wide, is what rounding makes of it;
    only the value that it stands for is meaningful, and exact.

    Args:
        w: weights, any shape, any float dtype.
        bits: 2 to 8.
        channel_axis: as for `weight_params`.
    """
    return quantize(w, *weight_params(w, bits, channel_axis), bits)


def fake_quant_weight(w: jax.Array, bits: int, channel_axis: ChannelAxis = -1) -> jax.Array:
    """A weight tensor rounded to its own grid, straight-through; same shape and dtype.

    Args:
        w: weights, any shape, any float dtype.
        bits: 2 to 8.
        channel_axis: as for `weight_params`.
    """
    lo, hi = _weight_range(w, channel_axis)
    return fake_quant(w, lo, hi, bits)


@dataclasses.dataclass(frozen=True)
class WeightCodes:
    """The map from a weight tensor to its integer codes, as Gradient Inundation wants it.

    Attributes:
        bits: 2 to 8.
        channel_axis: int, tuple, or None for one grid per tensor; as for `weight_params`.

    Examples:
        >>> import jax.numpy as jnp
        >>> w = jnp.asarray([[0.0], [0.3], [0.7], [1.0]])
        >>> codes = WeightCodes(bits=2)
        >>> codes(w)[:, 0].tolist()
        [-2, -1, 0, 1]
        >>> alphas = codes.crossing_scale(w, jnp.full_like(w, 0.1))[:, 0]
        >>> [round(float(alpha), 2) for alpha in alphas]
        [1.67, 2.0, 1.33, inf]
    """

    bits: int
    channel_axis: ChannelAxis = -1

    def __post_init__(self):
        """Checks `bits` at construction."""
        check_bits(self.bits)

    def __call__(self, w: jax.Array) -> jax.Array:
        """int8 codes of `w` on its own grid."""
        return weight_codes(w, self.bits, self.channel_axis)

    def can_change(self, shape: tuple[int, ...]) -> bool:
        """Whether codes of a tensor of that shape can change: each grid holds several values."""
        size = math.prod(shape)
        return size > 1 and size > math.prod(grid_shape(shape, self.channel_axis))

    def crossing_scale(self, w: jax.Array, u: jax.Array) -> jax.Array:
        """The smallest alpha > 0 at which each code changes on w's own grid along `w + alpha u`.

        The threshold is overshot by a few float32 roundings of the code, so that a weight moved by
        the returned alpha in float32 really has another code.

        Args:
            w: weights, any shape.
            u: direction of movement, same shape.

        Returns:
            float32, of the shape of `w`; inf where the code never changes: no movement, movement
            out of the range from the first or last code, or a direction that is not finite.
        """
        return crossing_scale(w, u, *weight_params(w, self.bits, self.channel_axis), self.bits)
