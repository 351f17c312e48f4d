"""Linen models in inference mode: their cheaper forms, and what enters their batch norms.

A batch norm in inference mode is one multiplication and one addition for each channel. Flax
subtracts the mean first, and what it subtracted from is kept for the gradient: an array as large as
the activations, for each layer. Here the conv's output itself is what is kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.cpu.depthwise import shift_depthwise
from ait_jax.promotion import common_dtype, of_rank, promoting
from ait_jax.quant.policy import leaf_name

__all__ = [
    "BatchNormStatistics",
    "apply_affine",
    "apply_frozen",
    "apply_observed",
    "averaged_calls",
    "fold_frozen",
    "frozen_affine",
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


def _is_frozen(context, args, kwargs) -> bool:
    module = context.module
    if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
        return False
    called = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    frozen = module.use_running_average if called is None else called
    return bool(frozen) and module.axis in (-1, args[0].ndim - 1)


def fold_frozen(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor for `nn.intercept_methods`: frozen batch norms as one multiply and add.

    Equal to Flax's up to float error; everything else is left alone.

    Args:
        next_fun: what is intercepted.
        args: of the call.
        kwargs: of the call.
        context: of the call: module and method.

    Returns:
        What the call returns.
    """
    if not _is_frozen(context, args, kwargs):
        return next_fun(*args, **kwargs)
    module, x = context.module, args[0]
    scale = module.get_variable("params", "scale") if module.use_scale else None
    bias = module.get_variable("params", "bias") if module.use_bias else None
    a, b = frozen_affine(
        module.get_variable("batch_stats", "mean"),
        module.get_variable("batch_stats", "var"),
        scale,
        bias,
        module.epsilon,
    )
    learned = [p for p in (scale, bias) if p is not None]
    dtype = promoting(nn.dtypes.canonicalize_dtype)(x, *learned, dtype=module.dtype)
    return apply_affine(x, a, b).astype(dtype)


def _cheaper(next_fun, args, kwargs, context):
    def otherwise(*args, **kwargs):
        return shift_depthwise(next_fun, args, kwargs, context)

    return fold_frozen(otherwise, args, kwargs, context)


def apply_frozen(model: Any, variables: Any, images: jax.Array) -> jax.Array:
    """Runs a model in inference mode, batch norms and depthwise convs in their cheaper forms.

    Args:
        model: a Linen module.
        variables: its variables, `params` and `batch_stats`.
        images: [N, H, W, C].

    Returns:
        logits [N, classes].
    """
    with nn.intercept_methods(_cheaper):
        logits: Any = model.apply(variables, images)
    return logits


class BatchNormStatistics(NamedTuple):
    """Statistics of the input of one batch norm, float32 [features] each.

    Attributes:
        mean: over batch and space.
        var: biased variance over the same.
    """

    mean: jax.Array
    var: jax.Array


_OBSERVED = "observed_batch_norms"


def apply_observed(
    model: Any, variables: Any, images: jax.Array, *, axis_name: str | None = None
) -> tuple[jax.Array, dict[str, BatchNormStatistics]]:
    """Runs a model in inference mode and observes what enters each of its batch norms.

    Args:
        model: a Linen module.
        variables: its variables, `params` and `batch_stats`.
        images: [N, H, W, C].
        axis_name: the axis over which statistics are averaged, if any (equal batches are assumed).

    Returns:
        logits [N, classes], and the statistics of the global batch by the name of the module in
        `batch_stats` (`stage1_block0/bn1`).
    """
    if hasattr(model, "apply_observed"):  # Not Linen: it knows its own batch norms.
        return model.apply_observed(variables, images, axis_name=axis_name)

    def observe(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            module = context.module
            running_mean: jax.Array = module.get_variable("batch_stats", "mean")
            x = jnp.moveaxis(args[0], module.axis, -1)
            statistics = observed_statistics(x, running_mean, axis_name)
            module.sow(_OBSERVED, "input", statistics)
        return _cheaper(next_fun, args, kwargs, context)

    with nn.intercept_methods(observe):
        logits, sown = model.apply(variables, images, mutable=[_OBSERVED])
    leaves = jax.tree.leaves_with_path(
        sown.get(_OBSERVED, {}), is_leaf=lambda x: isinstance(x, BatchNormStatistics)
    )
    calls: dict[str, list[BatchNormStatistics]] = {}
    for path, statistics in leaves:
        # It ends in the name "input" and the position in sow's tuple.
        calls.setdefault(leaf_name(path[:-2]), []).append(statistics)
    return logits, averaged_calls(calls)


def averaged_calls(
    calls: Mapping[str, list[BatchNormStatistics]],
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
