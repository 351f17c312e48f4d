"""What rounding costs, layer by layer and site by site: signal to rounding noise in decibels.

The error of a tensor is the energy of what rounding changes, relative to the tensor's own:
`sum (x - rounded)^2 / sum x^2`. Its SQNR is -10 log10 of that: one more bit adds about 6 dB.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.quant.affine import MAX_BITS
from ait_jax.quant.calls import ActivationSite
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.params import quantize_params
from ait_jax.quant.policy import QuantPolicy, named_leaves
from ait_jax.quant.weights import Grids, TensorQuantizer

__all__ = [
    "MAX_DECIBELS",
    "activation_errors",
    "activations_alone",
    "decibels",
    "relative_error",
    "weight_errors",
    "weights_alone",
    "widened_errors",
]

# What float32 itself rounds away lies near 150 dB.
MAX_DECIBELS = 150.0
_MAX_ERROR = 10 ** (MAX_DECIBELS / 10)


def relative_error(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """`sum (exact - rounded)^2 / sum exact^2`, float32 [] in 0..1e15.

    It is 0 where nothing is changed, also of a tensor of zeros or without elements.

    Args:
        exact: any shape, any float dtype.
        rounded: of the same shape.
    """
    exact, rounded = exact.astype(jnp.float32), rounded.astype(jnp.float32)
    # In units of the largest value, whose square float32 may not hold.
    unit = jnp.maximum(jnp.max(jnp.abs(exact), initial=0.0), jnp.max(jnp.abs(rounded), initial=0.0))
    unit = jnp.where(unit > 0, unit, 1.0)
    noise = jnp.sum(((exact - rounded) / unit) ** 2)
    signal = jnp.sum((exact / unit) ** 2)
    error = jnp.where(signal > 0, noise / jnp.where(signal > 0, signal, 1.0), _MAX_ERROR)
    return jnp.where(
        noise == 0, 0.0, jnp.minimum(jnp.nan_to_num(error, nan=_MAX_ERROR), _MAX_ERROR)
    )


def decibels(error: float) -> float:
    """The SQNR of a relative error, in dB: finite, from -150 to 150 (`MAX_DECIBELS`).

    It is 150 where nothing is changed, as of a layer each of whose channels is constant.
    """
    if error <= 0:
        return MAX_DECIBELS
    return float(np.clip(-10 * np.log10(error), -MAX_DECIBELS, MAX_DECIBELS))


def weights_alone(
    quantized: QuantizedModel,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    *,
    grids: Grids | None = None,
) -> jax.Array:
    """Logits with rounded weights and float activations: what the weights' rounding costs.

    Args:
        quantized: the network.
        params: float parameters.
        batch_stats: running statistics.
        images: [N, H, W, C].
        grids: the weight quantizers' states, by name; none where they have none.

    Returns:
        logits [N, classes].
    """
    rounded = quantize_params(params, quantized.policy, grids)
    return quantized.forward(rounded, batch_stats, images)


def activations_alone(
    quantized: QuantizedModel, params: Any, batch_stats: Any, images: jax.Array, ranges: Any
) -> jax.Array:
    """Logits with float weights and rounded activations: what the latter's rounding costs.

    Args:
        quantized: the network.
        params: float parameters.
        batch_stats: running statistics.
        images: [N, H, W, C].
        ranges: the activation quantizer's state.

    Returns:
        logits [N, classes].
    """
    # Kernels that have no codes per unit are multiplied as they are.
    return quantized.apply_rounded(params, {}, batch_stats, images, ranges)


def weight_errors(
    params: Any, policy: QuantPolicy, grids: Grids | None = None
) -> dict[str, jax.Array]:
    """The relative error of every quantized tensor on its grid, by name, in the order of the tree.

    Args:
        params: float parameters.
        policy: what is quantized.
        grids: states of the tensors, see `params.init_grids`.
    """
    return {
        name: relative_error(w, coder.fake_quantize(w, (grids or {}).get(name)))
        for name, w in named_leaves(params).items()
        if (coder := policy.weight_codes(name))
    }


def widened_errors(params: Any, policy: QuantPolicy) -> Callable[[str, int], float]:
    """The relative error of a tensor's weights with a number of bits, on a new grid.

    It is what `bit_budget.suggest_layer_bits` asks for. All tensors are rounded at once, with so
    many bits more than they have, the first time that one is asked for.

    Args:
        params: float parameters; a run that follows the suggestion starts with the teacher's.
        policy: what is quantized, and with how many bits so far.

    Returns:
        `error(name of the tensor, bits)`, for bits from those of the policy on.
    """
    coders = {name: coder for name, _ in policy.kernels if (coder := policy.weight_codes(name))}
    known: dict[int, dict[str, float]] = {}

    def rounded(params, more):
        found = {}
        for name, w in named_leaves(params).items():
            if name in coders and coders[name].bits + more <= MAX_BITS:
                own = coders[name]
                wider = TensorQuantizer(own.bits + more, own.channel_axis, own.quantizer)
                found[name] = relative_error(w, wider.fake_quantize(w, wider.init(w)))
        return found

    compiled = jax.jit(rounded, static_argnums=1)

    def error(name: str, bits: int) -> float:
        more = bits - coders[name].bits
        if more not in known:
            errors = jax.device_get(compiled(params, more))
            known[more] = {name: float(value) for name, value in errors.items()}
        return known[more][name]

    return error


def activation_errors(
    quantized: QuantizedModel,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    ranges: Any,
    *,
    grids: Grids | None = None,
) -> jax.Array:
    """The relative error of every activation site where the network runs rounded.

    What enters a site, whose weights and sites before it are rounded, against what leaves it.

    Args:
        quantized: the network.
        params: float parameters.
        batch_stats: running statistics.
        images: [N, H, W, C].
        ranges: the activation quantizer's state.
        grids: the weight quantizers' states, by name; none where they have none.

    Returns:
        float32 [sites], in the order of execution.
    """
    errors: list[jax.Array] = []

    def watch(site: ActivationSite, entering: jax.Array, leaving: jax.Array) -> None:
        errors.append(relative_error(entering, leaving))

    rounded = quantize_params(params, quantized.policy, grids)
    scales = quantized.kernel_scales(params, grids)
    quantized.apply_rounded(rounded, scales, batch_stats, images, ranges, watch=watch)
    return jnp.stack(errors) if errors else jnp.zeros(0, jnp.float32)
