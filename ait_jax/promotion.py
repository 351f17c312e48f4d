"""Operands made alike by hand, for programs that forbid jax to do so by itself.

`jax_numpy_dtype_promotion = "strict"` and `jax_numpy_rank_promotion = "raise"` are for finding
mistakes. What these functions make is what jax.numpy would make without the flags, operation by
operation: programs stay the same.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

__all__ = ["cast_floating", "common_dtype", "of_rank", "promoting"]

_F = TypeVar("_F", bound=Callable[..., Any])


def promoting(fn: _F) -> _F:
    """`fn` with jax's usual promotion of dtypes, for code of others that needs it.

    optax's Adam and schedules mix an integer count with floats, Flax's batch norms float32
    statistics with bfloat16 activations.

    Args:
        fn: any function.
    """

    @functools.wraps(fn)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return fn(*args, **kwargs)

    return run  # type: ignore[return-value]


def common_dtype(*operands: Any) -> Any:
    """The dtype of `a + b + ...`, whatever the flags.

    Args:
        *operands: arrays or dtypes.
    """
    return promoting(jnp.result_type)(*operands)


def of_rank(x: Any, rank: int) -> jax.Array:
    """An array with axes of length 1 in front, so that it has `rank` axes; scalars as they are.

    Args:
        x: of that rank at most.
        rank: of what it is to be broadcast with.
    """
    return x if jnp.ndim(x) == 0 else jax.lax.broadcast_to_rank(jnp.asarray(x), rank)


def cast_floating(tree: Any, dtype: Any = None) -> Any:
    """Floating arrays of a tree in another dtype; None: as they are."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return tree if dtype is None else jax.tree.map(cast, tree)
