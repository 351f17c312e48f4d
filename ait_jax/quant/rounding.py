"""Rounding to a grid: scale and zero point, codes, the values that they stand for.

`affine` says what the conventions are, and exports what users need of this.
"""

import operator

import jax
import jax.numpy as jnp

from ait_jax.promotion import of_rank

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "affine_params",
    "as_stored",
    "check_bits",
    "code_limits",
    "crossing_scale",
    "dequantize",
    "float_codes",
    "quantize",
    "reciprocal",
    "values_of_steps",
]

MIN_BITS = 2
MAX_BITS = 8

# A range narrower than this is widened, so that a constant tensor has a finite scale.
_MIN_RANGE = 1e-8


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


def as_stored(x: jax.Array) -> jax.Array:
    """`x` as its dtype has it, whatever a compiler makes of it next."""
    # XLA drops a rounding to bfloat16 where float32 is computed of it next.
    return x if x.dtype.itemsize >= 4 else jax.lax.optimization_barrier(x)


def float_codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: int) -> jax.Array:
    """As `quantize`, the codes as float32.

    Args:
        x: any shape, any float dtype.
        scale: codes per unit, broadcastable to `x`.
        zero_point: offset from `affine_params`, broadcastable to `x`.
        bits: 2 to 8.
    """
    low, high = code_limits(bits)
    scale, zero_point = (of_rank(jnp.asarray(v, jnp.float32), x.ndim) for v in (scale, zero_point))
    product = scale * as_stored(x).astype(jnp.float32)
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
    return float_codes(jnp.asarray(x), scale, zero_point, bits).astype(jnp.int8)


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
    return values_of_steps(steps, scale, zero_point)


def values_of_steps(steps: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """The values `steps / scale`, the same in every program.

    Args:
        steps: `code + zero_point`, float32.
        scale: codes per unit, broadcastable to `steps`.
        zero_point: of the grid, of the shape of `scale`.
    """
    step = reciprocal(scale)
    # No value is below that of the lowest code there is. But LLVM fuses products with what is added
    # to them, or not, as the program has it.
    lowest = (zero_point + code_limits(MAX_BITS)[0]) * step
    return jnp.maximum(steps * of_rank(step, steps.ndim), of_rank(lowest, steps.ndim))


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
    position = scale * as_stored(w).astype(jnp.float32) - zero_point
    codes = float_codes(w, scale, zero_point, bits)
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
