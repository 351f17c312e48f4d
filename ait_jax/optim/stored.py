"""What is stored: scaled updates and new weights, rounded as `optax.apply_updates` does."""

import jax
import jax.numpy as jnp

from ait_jax.promotion import common_dtype

__all__ = ["applied", "as_stored", "is_plain", "largest_alpha", "moved", "scaled_update"]


def is_plain(w: jax.Array, u: jax.Array) -> bool:
    """Whether a tensor and its update are both float32.

    Args:
        w: the tensor.
        u: its update.
    """
    return w.dtype == u.dtype == jnp.float32


def as_stored(w: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are rounded to their dtypes, wherever they are used.

    Args:
        w: the tensor.
        u: its update.
    """
    # Where a float32 value is rounded to bfloat16 in the same program, XLA hands the float32 one to
    # whoever computes in float32, and the rounded one to the loop of a search: the update that is
    # returned would be another than the one that was counted.
    return (w, u) if is_plain(w, u) else jax.lax.optimization_barrier((w, u))


def applied(w: jax.Array, u: jax.Array) -> jax.Array:
    """What `optax.apply_updates` will store for one tensor.

    Args:
        w: the tensor.
        u: its update.
    """
    # Without the barrier XLA drops the rounding to bfloat16 where float32 is wanted next, and what
    # is counted is not what is stored.
    wide = common_dtype(w.dtype, u.dtype)
    return jax.lax.optimization_barrier((w.astype(wide) + u.astype(wide)).astype(w.dtype))


def scaled_update(u: jax.Array, alpha: jax.Array) -> jax.Array:
    """`alpha u` in the dtype of the update.

    Args:
        u: the update of a tensor.
        alpha: float32 scalar.
    """
    # The barrier keeps the product a rounded array of its own: contracted with the addition of
    # apply_updates into one fused multiply-add here but not there (or the reverse), it would differ
    # in the last bit, and a weight that lands on a threshold would be counted on the wrong side.
    wide = common_dtype(u.dtype, jnp.float32)
    return jax.lax.optimization_barrier((alpha.astype(wide) * u.astype(wide)).astype(u.dtype))


def moved(w: jax.Array, u: jax.Array, alpha: jax.Array) -> jax.Array:
    """`applied(w, scaled_update(u, alpha))`, cheap to compute again where that is possible.

    Args:
        w: the tensor.
        u: its update.
        alpha: float32 scalar.
    """
    if not is_plain(w, u):
        return applied(w, scaled_update(u, alpha))
    product = alpha * u
    # What stands between them keeps the product from being contracted with the addition. Weights
    # that overflow are NaN instead of infinite, and no more finite.
    return w + jnp.where(jnp.abs(product) < jnp.inf, product, jnp.nan)


def largest_alpha(w: jax.Array, u: jax.Array) -> jax.Array:
    """float32 scalar: beyond it, products or weights overflow their dtype.

    Args:
        w: the tensor.
        u: its update.
    """
    limits = [float(jnp.finfo(x.dtype).max) for x in (w, u)]
    if min(limits) > 1e38:  # Those of float32, which no search reaches; bfloat16's are as large.
        return jnp.full((), jnp.inf, jnp.float32)
    w, u = (jnp.abs(x.astype(jnp.float32)) for x in (w, u))
    room = jnp.minimum(limits[0] - w, limits[1])
    return jnp.min(jnp.where(u > 0, room / jnp.where(u > 0, u, 1), jnp.inf))
