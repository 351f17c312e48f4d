"""Depthwise convs, in a form that XLA on CPU runs fast.

XLA has no fast depthwise conv on CPU: one of [16, 56, 56, 144] with a 3x3 kernel takes 200 to
400 ms on two cores, and its gradients 600 ms. As a sum of shifted products (one for each tap, all
in one fused loop) it takes 10 ms, and its gradients 32. Elsewhere the conv stays a conv.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.promotion import common_dtype, of_rank

__all__ = ["depthwise_conv", "is_depthwise_call", "shift_depthwise"]

Padding = tuple[tuple[int, int], tuple[int, int]]


def _conv(x, kernel, *, strides, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _taps(x, size, strides, padding) -> Iterator[jax.Array]:
    """What each tap of a kernel sees, [N, H', W', C], row by row."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    last = [n - k for n, k in zip(padded.shape[1:3], size)]
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i, i + last[0] + 1, strides[0])
            yield padded[:, rows, j : j + last[1] + 1 : strides[1]]


def _shifted(x, kernel, *, strides, padding):
    """The conv as a sum of shifted products, in float32."""
    wide = common_dtype(jnp.float32, kernel)
    rows = kernel.reshape(-1, kernel.shape[-1]).astype(wide)
    taps = _taps(x.astype(jnp.float32).astype(wide), kernel.shape[:2], strides, padding)
    total: Any = sum(tap * of_rank(row, tap.ndim) for tap, row in zip(taps, rows))
    return total.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """A depthwise conv (multiplier 1), equal to XLA's up to the order of float sums.

    Args:
        x: [N, H, W, C].
        kernel: [h, w, 1, C], of the dtype of `x`.
        strides: of rows and columns.
        padding: zeros before and after rows, and columns.

    Returns:
        [N, H', W', C].
    """
    form = {"strides": strides, "padding": padding}
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted, **form),
        default=functools.partial(_conv, **form),
    )


def _forward(x, kernel, strides, padding):
    return depthwise_conv(x, kernel, strides, padding), (x, kernel)


def _shifted_gradients(x, kernel, g, *, strides, padding):
    g = g.astype(jnp.float32)
    # The input's: a depthwise conv of the spread-out gradient with the kernel turned around.
    edges = [(0, 0, 0)]
    for size, k, (before, _), n, stride in zip(
        x.shape[1:3], kernel.shape, padding, g.shape[1:3], strides
    ):
        low = k - 1 - before
        spread = (n - 1) * stride + 1
        edges.append((low, size + k - 1 - low - spread, stride - 1))
    spread_out = jax.lax.pad(g, jnp.zeros((), g.dtype), (*edges, (0, 0, 0)))
    turned = kernel[::-1, ::-1]
    dx = _shifted(spread_out, turned, strides=(1, 1), padding=((0, 0), (0, 0)))
    # The kernel's: all its sums in one pass over the data.
    products = [t * g for t in _taps(x.astype(g.dtype), kernel.shape[:2], strides, padding)]
    zeros = [jnp.zeros((), g.dtype)] * len(products)
    sums = jax.lax.reduce(
        products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], dimensions=(0, 1, 2)
    )
    return dx.astype(x.dtype), jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _conv_gradients(x, kernel, g, **form):
    return jax.vjp(functools.partial(_conv, **form), x, kernel)[1](g)


def _backward(strides, padding, residuals, g):
    form = {"strides": strides, "padding": padding}
    return jax.lax.platform_dependent(
        *residuals,
        g,
        cpu=functools.partial(_shifted_gradients, **form),
        default=functools.partial(_conv_gradients, **form),
    )


depthwise_conv.defvjp(_forward, _backward)


def is_depthwise_call(eqn: Any) -> bool:
    """Whether an equation of a jaxpr is a call of `depthwise_conv`."""
    if eqn.primitive.name != "custom_vjp_call":
        return False
    return eqn.params["call_jaxpr"].jaxpr.debug_info.func_name == "depthwise_conv"


def _pair(value: int | Sequence[int] | None) -> tuple[int, int]:
    first, second = (value or 1,) * 2 if value is None or isinstance(value, int) else value
    return first, second


def _explicit_padding(module: nn.Conv, shape: tuple[int, ...]) -> Padding | None:
    """Zeros around [N, H, W, C] of that shape; None for a padding that adds something else."""
    padding, strides = module.padding, _pair(module.strides)
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "SAME":
        size = _pair(module.kernel_size)
        totals = [
            max((math.ceil(n / s) - 1) * s + k - n, 0) for n, s, k in zip(shape[1:3], strides, size)
        ]
        first, second = ((total // 2, total - total // 2) for total in totals)
        return first, second
    if isinstance(padding, str):
        return None
    sides = (padding, padding) if isinstance(padding, int) else padding
    first, second = ((p, p) if isinstance(p, int) else (p[0], p[1]) for p in sides)
    return first, second


def shift_depthwise(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Interceptor for `nn.intercept_methods`: `nn.Conv`s that are depthwise as `depthwise_conv`.

    Everything else is left alone, and so are convs with dilation, masks, or input features that
    have several outputs each.

    Args:
        next_fun: what is intercepted.
        args: of the call.
        kwargs: of the call.
        context: of the call: module and method.

    Returns:
        What the call returns.
    """
    module = context.module
    if type(module) is not nn.Conv or context.method_name != "__call__" or kwargs:
        return next_fun(*args, **kwargs)
    x = args[0]
    plain = (
        x.ndim == 4
        and not isinstance(module.kernel_size, int)
        and len(module.kernel_size) == 2
        and x.shape[-1] == module.features == module.feature_group_count > 1
        and {*_pair(module.kernel_dilation), *_pair(module.input_dilation)} == {1}
        and module.mask is None
        and not module.is_initializing()
    )
    padding = _explicit_padding(module, x.shape) if plain else None
    if padding is None:
        return next_fun(*args)
    kernel: Any = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = depthwise_conv(x, kernel, _pair(module.strides), padding)
    return y if bias is None else y + of_rank(bias, y.ndim)
