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
import operator

import jax
import jax.numpy as jnp

from ait_jax.cpu.computed_once import computed_once
from ait_jax.promotion import of_rank

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

MIN_BITS = 2
MAX_BITS = 8

# A range narrower than this is widened, so that a constant tensor has a finite scale.
_MIN_RANGE = 1e-8

ChannelAxis = int | tuple[int, ...] | None


def check_bits(bits: int, name: str = "bits") -> int:
    """`bits` as an int.

    Raises:
        ValueError: naming `name`, unless it is an integer in 2..8.
    """
    try:
        value = operator.index(bits)
    except TypeError:
        value = None
    if value is None or not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(
            f"{name} = {bits!r} is not allowed: it must be an integer in {MIN_BITS}..{MAX_BITS}"
        )
    return value


def code_limits(bits: int) -> tuple[int, int]:
    """The smallest and the largest code of `bits` bits, `(-2**(bits-1), 2**(bits-1) - 1)`."""
    half = 1 << (check_bits(bits) - 1)
    return -half, half - 1


def affine_params(lo: jax.Array, hi: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The grid that covers `[lo, hi]` with `2**bits` codes.

    Args:
        lo: lower ends of the ranges, any shape, any float dtype.
        hi: upper ends, same shape as `lo`.
        bits: 2 to 8.

    Returns:
        `(scale, zero_point)`, float32, of the shape of `lo`: codes per unit, and the (integral)
        offset that includes `2**(bits - 1)`.

    Raises:
        ValueError: if `bits` is not in 2..8.
    """
    low, high = code_limits(bits)
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    scale = (high - low) / jnp.maximum(hi - lo, _MIN_RANGE)
    zero_point = jnp.round(scale * lo) - low
    # Else XLA puts the quotient into what is done with it, and last bits depend on the program.
    return jax.lax.optimization_barrier((scale, zero_point))


def _as_stored(x: jax.Array) -> jax.Array:
    # XLA drops a rounding to bfloat16 where float32 is computed of it next.
    return x if x.dtype.itemsize >= 4 else jax.lax.optimization_barrier(x)


def _float_codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    low, high = code_limits(bits)
    scale, zero_point = (of_rank(jnp.asarray(v, jnp.float32), x.ndim) for v in (scale, zero_point))
    product = scale * _as_stored(x).astype(jnp.float32)
    # `round(product - zero_point)`, with nothing but comparisons between the product and the
    # integers: there is no sum for it to be fused into.
    below = jnp.floor(product)
    middle = below + 0.5
    code = below - zero_point
    is_odd = jnp.floor(0.5 * code) != 0.5 * code
    upwards = (product > middle) | ((product == middle) & is_odd)
    return jnp.clip(code + upwards.astype(jnp.float32), low, high)


def quantize(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """Integer codes of `x` on a given grid.

    Args:
        x: any shape, any float dtype.
        scale: codes per unit, broadcastable to `x`.
        zero_point: offset from `affine_params`, broadcastable to `x`.
        bits: 2 to 8.

    Returns:
        int8 codes in `[-2**(bits-1), 2**(bits-1) - 1]`, of the shape of `x`. (A NaN in `x` gives
        an unspecified code.)

    Raises:
        ValueError: if `bits` is not in 2..8.
    """
    return _float_codes(jnp.asarray(x), scale, zero_point, bits).astype(jnp.int8)


def reciprocal(scale: jax.Array) -> jax.Array:
    """`1 / scale`: XLA makes products of some quotients; with it, all are, in every program."""
    return jax.lax.optimization_barrier(1 / scale)


def dequantize(codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """The float32 values `(codes + zero_point) * (1 / scale)` that codes stand for on a grid.

    Args:
        codes: of any integer or float dtype.
        scale: from `affine_params`, broadcastable to `codes`.
        zero_point: likewise.
    """
    scale, zero_point = (jnp.asarray(v, jnp.float32) for v in (scale, zero_point))
    steps = codes.astype(jnp.float32) + of_rank(zero_point, codes.ndim)
    return _values(steps, scale, zero_point)


def _values(steps: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    step = reciprocal(scale)
    # No value is below that of the lowest code there is. But LLVM fuses products with what is added
    # to them, or not, as the program has it.
    lowest = (zero_point + code_limits(MAX_BITS)[0]) * step
    return jnp.maximum(steps * of_rank(step, steps.ndim), of_rank(lowest, steps.ndim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(
    x: jax.Array, lo: jax.Array, hi: jax.Array, bits: int
) -> tuple[jax.Array, jax.Array]:
    scale, zero_point = affine_params(lo, hi, bits)
    codes = _float_codes(x, scale, zero_point, bits)
    steps = computed_once(codes + of_rank(zero_point, x.ndim))
    return _values(steps, scale, zero_point).astype(x.dtype), steps


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
    codes = _float_codes(x, scale, zero_point, bits)
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
    w = _as_stored(jax.lax.stop_gradient(w))
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


def crossing_scale(
    w: jax.Array, u: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int
) -> jax.Array:
    """As `WeightCodes.crossing_scale`, on a given grid.

    Args:
        w: weights, any shape.
        u: direction of movement, same shape.
        scale: codes per unit, broadcastable to `w`.
        zero_point: offset from `affine_params`, broadcastable to `w`.
        bits: 2 to 8.

    Returns:
        float32, of the shape of `w`.
    """
    low, high = code_limits(bits)
    position = scale * _as_stored(w).astype(jnp.float32) - zero_point
    codes = _float_codes(w, scale, zero_point, bits)
    u = u.astype(jnp.float32)
    upwards = u > 0
    distance = jnp.where(upwards, codes + 0.5 - position, position - codes + 0.5)
    eps = jnp.finfo(jnp.float32).eps
    overshoot = 2 * eps * (jnp.abs(position + zero_point) + jnp.abs(zero_point) + 1)
    speed = scale * jnp.abs(u)
    can_cross = jnp.where(upwards, codes < high, codes > low) & (speed > 0) & jnp.isfinite(u)
    # A position beyond the last threshold it rounds to (a tie) crosses at once.
    alpha = (jnp.maximum(distance, 0) + overshoot) / jnp.where(can_cross, speed, 1)
    return jnp.where(can_cross, alpha, jnp.inf)
