"""Batch norms in inference mode: their cheaper form, and the statistics of what enters them.

A batch norm in inference mode is one multiplication and one addition for each channel. Flax
subtracts the mean first, and what it subtracted from is kept for the gradient: an array as large as
the activations, for each layer. Here the conv's output itself is what is kept.

What enters a batch norm is marked in the jaxpr, so that it is found there whatever the kind of the
model (see `taps`). A mark costs nothing in a compiled program.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.interpreters import ad, batching, mlir

from ait_jax.promotion import common_dtype, of_rank

__all__ = [
    "BatchNormStatistics",
    "apply_affine",
    "averaged_calls",
    "frozen_affine",
    "is_marked_input",
    "mark_input",
    "observed_statistics",
]


def frozen_affine(
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """`(a, b)`, float32 [features], so that the batch norm in inference mode is `a x + b`.

    Args:
        mean: running mean, [features].
        var: running (biased) variance, [features].
        scale: learned scale, [features], or None.
        bias: learned offset, [features], or None.
        epsilon: added to the variance.
    """
    a = jax.lax.rsqrt(var.astype(jnp.float32) + epsilon)
    if scale is not None:
        a *= scale.astype(jnp.float32)
    b = -mean.astype(jnp.float32) * a
    return a, b if bias is None else b + bias.astype(jnp.float32)


def apply_affine(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`a x + b`, in float32 where `x` is narrower.

    Args:
        x: [..., features].
        a: float32 [features].
        b: likewise.
    """
    x = x.astype(common_dtype(x, a))
    a, b = (of_rank(part.astype(x.dtype), x.ndim) for part in (a, b))
    return x * a + b


class BatchNormStatistics(NamedTuple):
    """Statistics of the input of one batch norm, float32 [features] each.

    Attributes:
        mean: over batch and space.
        var: biased variance over the same.
    """

    mean: jax.Array
    var: jax.Array


# A mark in the jaxpr: the first operand enters the batch norm whose running mean is the second.
_input_p = jex_core.Primitive("batch_norm_input")
_input_p.def_impl(lambda x, mean, *, vmapped: x)
_input_p.def_abstract_eval(lambda x, mean, *, vmapped: x)
mlir.register_lowering(_input_p, lambda context, x, mean, *, vmapped: [x])


def _mark_jvp(primals, tangents, *, vmapped):
    tangent = tangents[0]
    return _input_p.bind(*primals, vmapped=vmapped), tangent


def _mark_batched(args, axes, *, vmapped):
    del vmapped
    # The axis of the features may be another one from here on.
    return _input_p.bind(*args, vmapped=True), axes[0]


ad.primitive_jvps[_input_p] = _mark_jvp
batching.primitive_batchers[_input_p] = _mark_batched


def mark_input(x: jax.Array, mean: jax.Array) -> jax.Array:
    """`x`, marked as what enters a batch norm; what comes back must be used, or the mark is lost.

    Args:
        x: [N, ..., features].
        mean: the running mean [features], the very array that the variables hold: by it the batch
            norm is known.
    """
    return _input_p.bind(jnp.asarray(x), jnp.asarray(mean), vmapped=False)


def is_marked_input(eqn: Any) -> bool:
    """Whether an equation of a jaxpr is a mark; its operands are those of `mark_input`."""
    return eqn.primitive is _input_p


def averaged_calls(
    calls: Mapping[str, Sequence[BatchNormStatistics]],
) -> dict[str, BatchNormStatistics]:
    """The statistics of batch norms, each called once or more in a forward.

    The running statistics of one that is called twice are averages over both calls, of means as of
    variances; so are these.

    Args:
        calls: statistics of each call, by the name of the module.
    """
    return {
        name: BatchNormStatistics(*(sum(part) / len(part) for part in zip(*each)))
        if len(each) > 1
        else each[0]
        for name, each in calls.items()
    }


def observed_statistics(
    x: jax.Array, running_mean: jax.Array, axis_name: str | None = None
) -> BatchNormStatistics:
    """Statistics of what enters a batch norm.

    Args:
        x: [N, ..., features].
        running_mean: of the batch norm, [features].
        axis_name: the axis over which they are averaged, if any (equal batches are assumed).

    Returns:
        The mean and the biased variance of the global batch.
    """
    # The running mean as origin: one pass over the data without cancellation.
    moments = _shifted_moments(x, running_mean)
    if axis_name is not None:
        moments = jax.lax.pmean(moments, axis_name)
    mean = running_mean.astype(moments.dtype) + moments[0]
    return BatchNormStatistics(mean, moments[1] - jnp.square(moments[0]))


@jax.custom_vjp
def _shifted_moments(x: jax.Array, origin: jax.Array) -> jax.Array:
    """Means of `x - origin` and of its square over all axes but the last: float32 [2, features]."""
    shifted = x.astype(jnp.float32) - of_rank(origin.astype(jnp.float32), x.ndim)
    axes = tuple(range(x.ndim - 1))
    return jnp.stack([jnp.mean(shifted, axes), jnp.mean(jnp.square(shifted), axes)])


def _shifted_moments_fwd(x, origin):
    # By default `x - origin` would be kept for the gradient, beside `x`.
    return _shifted_moments(x, origin), (x, origin)


def _shifted_moments_bwd(residuals, g):
    x, origin = residuals
    g = g * (x.shape[-1] / x.size)
    # One multiply and add; the origin is a constant.
    slope = 2 * g[1]
    dx = apply_affine(x, slope, g[0] - slope * origin.astype(slope.dtype))
    return dx.astype(x.dtype), jnp.zeros_like(origin)


_shifted_moments.defvjp(_shifted_moments_fwd, _shifted_moments_bwd)
