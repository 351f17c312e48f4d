"""Linen models in inference mode, their batch norms and depthwise convs in cheaper forms."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.cpu.depthwise import shift_depthwise
from ait_jax.promotion import promoting
from ait_jax.quant.batch_norm import apply_affine, frozen_affine, mark_input

__all__ = ["apply_frozen", "fold_frozen"]


def _folds(module: nn.BatchNorm, args: Any, kwargs: Any) -> bool:
    """Whether a batch norm's call is in inference mode, over the last axis."""
    called = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    frozen = module.use_running_average if called is None else called
    return bool(frozen) and module.axis in (-1, args[0].ndim - 1)


def fold_frozen(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor for `nn.intercept_methods`: frozen batch norms as one multiply and add.

    Equal to Flax's up to float error. What enters a batch norm is marked (see
    `batch_norm.mark_input`); everything else is left alone.

    Args:
        next_fun: what is intercepted.
        args: of the call.
        kwargs: of the call.
        context: of the call: module and method.

    Returns:
        What the call returns.
    """
    module = context.module
    if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or not args:
        return next_fun(*args, **kwargs)
    mean: Any = module.get_variable("batch_stats", "mean")
    if mean is None or not isinstance(module.axis, int):
        return next_fun(*args, **kwargs)
    x = jnp.moveaxis(mark_input(jnp.moveaxis(args[0], module.axis, -1), mean), -1, module.axis)
    if not _folds(module, args, kwargs):
        return next_fun(x, *args[1:], **kwargs)
    scale = module.get_variable("params", "scale") if module.use_scale else None
    bias = module.get_variable("params", "bias") if module.use_bias else None
    var: Any = module.get_variable("batch_stats", "var")
    a, b = frozen_affine(mean, var, scale, bias, module.epsilon)
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
        model: a Linen module, or a network with its `apply`.
        variables: its variables, `params` and `batch_stats`.
        images: [N, H, W, C].

    Returns:
        logits [N, classes].
    """
    with nn.intercept_methods(_cheaper):
        logits: Any = model.apply(variables, images)
    return logits
