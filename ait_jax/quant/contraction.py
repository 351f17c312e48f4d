"""Convs and matmuls of integer codes, their int32 sums exact on every platform.

With x = codes + zero_x and w = kernel + zero_w, and zeros beyond the edges of x (where zero has no
code in general)::

    sum x w = sum codes kernel + zero_w sum codes + zero_x (sum of w over the taps within x)

All of it is int32. An intermediate term may wrap around, the total does not, if it is below 2**31
(`integer.IntegerModel.check_sums`), since wrapping is arithmetic modulo 2**32.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.cpu.depthwise import depthwise_conv
from ait_jax.errors import UserError
from ait_jax.promotion import of_rank
from ait_jax.quant.calls import KernelCall
from ait_jax.quant.jaxprs import all_equations, inner_jaxprs

__all__ = [
    "Contraction",
    "IntegerError",
    "conv_products",
    "exact_sums",
    "float32_products",
    "tap_products",
]

# Integers up to here, and sums that never leave them, are exact in float32.
_FLOAT32_EXACT = 1 << 24


class IntegerError(UserError):
    """A network that integers cannot run; names the layer or site, and why."""


class Contraction(NamedTuple):
    """The form of a conv (features last) or a matmul with [..., *in] and [*in, *out].

    Attributes:
        strides: one for each spatial axis; a matmul has none.
        padding: zeros before and after each spatial axis.
        dilation: of the kernel.
        groups: of features.
        spread: of the data, whose places lie so far apart, zeros between them (a transposed conv).
        inputs: axes of the kernel that a matmul sums over, its first ones.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...] = ()
    inputs: int = 1

    @classmethod
    def of(cls, call: KernelCall) -> "Contraction":
        """The form of a call.

        Raises:
            IntegerError: if it has none: features elsewhere, kernel first, batched or contracted
                along other axes.
        """
        eqn = call.eqn
        if eqn.primitive.name == "dot_general":
            rank = call.operands[0].ndim
            form = tuple(tuple(map(tuple, part)) for part in eqn.params["dimension_numbers"])
            inputs = len(form[0][1])
            summed = tuple(range(rank - inputs, rank)), tuple(range(inputs))
            if call.data == 0 and inputs and form == (summed, ((), ())):
                return cls((), (), (), 1, inputs=inputs)
        else:
            params = (eqn if "window_strides" in eqn.params else _conv_within(eqn)).params
            last = len(params["window_strides"]) + 1
            data, spatial = (0, last, *range(1, last)), range(last - 1)
            usual = (
                tuple(params["dimension_numbers"]) == (data, (last, last - 1, *spatial), data)
                and params["batch_group_count"] == 1
            )
            if call.data == 0 and usual:
                return cls(
                    tuple(params["window_strides"]),
                    tuple((low, high) for low, high in params["padding"]),
                    tuple(params["rhs_dilation"]),
                    params["feature_group_count"],
                    tuple(params["lhs_dilation"]),
                )
        raise IntegerError(
            f"a {eqn.primitive.name} of {call.operands[0].shape} and {call.operands[1].shape} "
            "cannot run on integers: only convs with features last can, and matmuls of data that "
            "sum over its last and the kernel's first axes"
        )

    @classmethod
    def fits(cls, call: KernelCall) -> bool:
        """Whether a call has such a form."""
        try:
            cls.of(call)
        except IntegerError:
            return False
        return True

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial sizes after it, of those before and those of the kernel."""
        return tuple(
            ((n - 1) * apart + low + high - (k - 1) * d) // s + 1
            for n, k, s, d, apart, (low, high) in zip(
                size, kernel, self.strides, self.dilation, self.places_apart, self.padding
            )
        )

    @property
    def places_apart(self) -> tuple[int, ...]:
        """`spread`, 1 along every axis where none is given."""
        return self.spread or (1,) * len(self.strides)


def _conv_within(eqn):
    # `depthwise_conv` is a conv on one platform and something else on another.
    within = (other for inner in inner_jaxprs(eqn) for other in all_equations(inner))
    return next((e for e in within if e.primitive.name == "conv_general_dilated"), None)


def _contract(form: Contraction, x, kernel, dtype) -> jax.Array:
    if not form.strides:
        return jnp.matmul(x, kernel, preferred_element_type=dtype)
    last = len(form.strides) + 1
    data, spatial = (0, last, *range(1, last)), range(last - 1)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        form.strides,
        form.padding,
        lhs_dilation=form.places_apart,
        rhs_dilation=form.dilation,
        dimension_numbers=jax.lax.ConvDimensionNumbers(data, (last, last - 1, *spatial), data),
        feature_group_count=form.groups,
        preferred_element_type=dtype,
    )


def conv_products(form: Contraction, codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """Sums of products of codes, int32, by one int8 conv or matmul; zeros beyond the edges.

    Args:
        form: of the contraction.
        codes: int8 [N, ..., in].
        kernel: int8 [..., in / groups, out].

    Returns:
        int32 [N, ..., out].
    """
    return _contract(form, codes, kernel, jnp.int32)


def tap_products(form: Contraction, codes: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `conv_products`, by an int8 matmul for each tap: XLA has no integer convs for CUDA.

    Args:
        form: of the contraction.
        codes: as for `conv_products`.
        kernel: likewise.
    """
    size = kernel.shape[: len(form.strides)]
    padded = codes
    if size:  # Padding may be negative, in a transposed conv.
        edges = [(*pads, apart - 1) for pads, apart in zip(form.padding, form.places_apart)]
        padded = jax.lax.pad(codes, np.int8(0), [(0, 0, 0), *edges, (0, 0, 0)])
    output = form.output_size(codes.shape[1 : 1 + len(size)], size)
    groups = form.groups
    total: jax.Array | int = 0
    for tap in itertools.product(*map(range, size)):
        slices = [
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(tap, form.dilation, output, form.strides)
        ]
        x = padded[(slice(None), *slices)] if size else padded
        x = x.reshape(*x.shape[:-1], groups, -1)
        w = kernel[tap].reshape(kernel.shape[-2], groups, -1)
        total += jnp.einsum("...gi,igo->...go", x, w, preferred_element_type=jnp.int32)
    assert not isinstance(total, int)
    return total.reshape(*total.shape[:-2], -1)


def float32_products(
    form: Contraction, codes: jax.Array, kernel: jax.Array, bits: tuple[int, int]
) -> jax.Array:
    """As `conv_products`, carried by float32: XLA's integer convs on CPU are slow.

    Input channels are taken in portions whose sums cannot exceed 2**24, whatever the codes, and
    are hence exact; portions are added in int32.

    Args:
        form: of the contraction.
        codes: int8 [N, ..., in].
        kernel: int8 [..., in / groups, out].
        bits: of `codes` and of `kernel`, which bound their sizes.

    Returns:
        int32 [N, ..., out].
    """
    largest = math.prod(kernel.shape[:-2]) << (bits[0] - 1 + bits[1] - 1)
    channels, portion = kernel.shape[-2], _FLOAT32_EXACT // largest
    if portion == 0 or (portion < channels and form.groups > 1):
        return tap_products(form, codes, kernel)
    x, w = codes.astype(jnp.float32), kernel.astype(jnp.float32)
    depthwise = form.groups == x.shape[-1] == w.shape[-1] > 1
    undilated = {1} == {*form.dilation, *form.places_apart}
    if depthwise and len(form.strides) == 2 and undilated:
        (first, second), (rows, columns) = form.strides, form.padding
        return _to_int32(depthwise_conv(x, w, (first, second), (rows, columns)))
    if portion >= channels:
        return _to_int32(_contract(form, x, w, jnp.float32))
    parts = [slice(i, i + portion) for i in range(0, channels, portion)]
    return sum(
        (_to_int32(_contract(form, x[..., p], w[..., p, :], jnp.float32)) for p in parts[1:]),
        start=_to_int32(_contract(form, x[..., parts[0]], w[..., parts[0], :], jnp.float32)),
    )


def _to_int32(sums: jax.Array) -> jax.Array:
    # Rounded, in case a platform's conv (Winograd's) is not exact to the last bit.
    return jnp.round(sums).astype(jnp.int32)


def _products(form, codes, kernel, bits) -> jax.Array:
    return jax.lax.platform_dependent(
        codes,
        kernel,
        cpu=lambda codes, kernel: float32_products(form, codes, kernel, bits),
        tpu=lambda codes, kernel: conv_products(form, codes, kernel),
        default=lambda codes, kernel: tap_products(form, codes, kernel),
    )


def _window_sums(form, codes, kernel_shape, bits) -> jax.Array:
    """Sum of the codes in each window, int32 [N, ..., groups or 1]."""
    size, channels = kernel_shape[: len(form.strides)], kernel_shape[-2]
    if channels == 1 and size:
        ones = jnp.ones((*size, 1, form.groups), jnp.int8)
        return _products(form, codes, ones, (bits, 2))
    grouped = codes.reshape(*codes.shape[:-1], form.groups, channels)
    sums = jnp.sum(grouped, axis=-1, dtype=jnp.int32)
    if not size:
        return sums
    return jax.lax.reduce_window(
        sums,
        np.int32(0),
        jax.lax.add,
        (1, *size, 1),
        (1, *form.strides, 1),
        ((0, 0), *form.padding, (0, 0)),
        base_dilation=(1, *form.places_apart, 1),
        window_dilation=(1, *form.dilation, 1),
    )


def _sums_within(form, kernel, zero_point, size) -> jax.Array:
    """Sum of kernel + zero_point over the taps that lie within the data, int32 [..., out]."""
    sums = jnp.sum(kernel.astype(jnp.int32) + of_rank(zero_point, kernel.ndim), axis=-2)
    output = form.output_size(size, kernel.shape)
    for axis, (n, m, s, d) in enumerate(zip(size, output, form.strides, form.dilation)):
        apart = form.places_apart[axis]
        at = np.arange(m)[:, None] * s + np.arange(kernel.shape[axis]) * d
        at -= form.padding[axis][0]
        within = ((at >= 0) & (at < (n - 1) * apart + 1) & (at % apart == 0)).astype(np.int32)
        sums = jnp.moveaxis(jnp.tensordot(within, sums, axes=(1, axis)), 0, axis)
    return sums


def exact_sums(
    form: Contraction,
    codes: jax.Array,
    zero_x: jax.Array,
    kernel: jax.Array,
    zero_w: jax.Array,
    bits: tuple[int, int],
) -> jax.Array:
    """Sums of (codes + zero_x) (kernel + zero_w), with true zeros beyond the edges.

    Args:
        form: of the contraction.
        codes: int8 [N, ..., *in].
        zero_x: int32 scalar.
        kernel: int8 [..., in / groups, out], or, of a matmul, [*in, *out].
        zero_w: int32 [*out].
        bits: of `codes` and of `kernel`.

    Returns:
        int32 [N, ..., *out], exact if below 2**31.
    """
    if not form.strides and (form.inputs, kernel.ndim) != (1, 2):
        # Several axes in or out: a matmul of the same numbers.
        batch, out = codes.shape[: codes.ndim - form.inputs], kernel.shape[form.inputs :]
        matrix = kernel.reshape(-1, math.prod(out))
        flat = codes.reshape(*batch, -1), zero_x, matrix, zero_w.reshape(-1)
        return exact_sums(form._replace(inputs=1), *flat, bits).reshape(*batch, *out)
    windows = _window_sums(form, codes, kernel.shape, bits[0])
    windows = jnp.repeat(windows, kernel.shape[-1] // windows.shape[-1], axis=-1)
    size = codes.shape[1 : 1 + len(form.strides)]
    within = _sums_within(form, kernel, zero_w, size)
    rank = windows.ndim
    products = _products(form, codes, kernel, bits)
    return products + of_rank(zero_w, rank) * windows + of_rank(zero_x * within, rank)
