"""A twin of the quantized network that can be differentiated twice.

The quantizer of training has a derivative of its own (custom_vjp), which says nothing of second
derivatives. The twin's is `x + stop_gradient(q(x) - x)` on grids that stay as they were: the same
logits and the same gradients at the student itself, and as its Hessian that of the network without
quantizers, at the values that these return.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from ait_jax.quant import affine
from ait_jax.quant.frozen import fold_frozen
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.ranges import ActivationRanges, range_bounds
from ait_jax.quant.sites import map_activations

__all__ = ["Grids", "freeze_grids", "twin_apply"]

_Grid = tuple[jax.Array, jax.Array]  # scale, zero_point


class Grids(NamedTuple):
    """What the twin rounds to; a pytree.

    Attributes:
        weights: grid of each quantized tensor, by name.
        ranges: of the activations.
    """

    weights: dict[str, _Grid]
    ranges: ActivationRanges


def freeze_grids(quantized: QuantizedModel, params: Any, ranges: ActivationRanges) -> Grids:
    """The grids of a student as it is.

    Args:
        quantized: its quantized apply.
        params: its float parameters.
        ranges: its activation ranges, calibrated.
    """
    grids = {}
    for path, w in jax.tree.leaves_with_path(params):
        coder = quantized.policy.weight_codes(leaf_name(path))
        if coder is not None:
            grids[leaf_name(path)] = affine.weight_params(w, coder.bits, coder.channel_axis)
    return Grids(grids, ranges)


def _rounded(x: jax.Array, grid: _Grid, bits: int) -> jax.Array:
    codes = affine.quantize(x, *grid, bits)
    return x + jax.lax.stop_gradient(affine.dequantize(codes, *grid).astype(x.dtype) - x)


def twin_apply(
    quantized: QuantizedModel, grids: Grids, params: Any, batch_stats: Any, images: jax.Array
) -> jax.Array:
    """Logits of the twin, batch norm in inference mode.

    Args:
        quantized: the student's quantized apply.
        grids: see `freeze_grids`.
        params: float parameters.
        batch_stats: running statistics.
        images: [N, H, W, C].

    Returns:
        logits [N, classes]. (Depthwise convs are XLA's own, slow on CPU: the fast form has a
        custom_vjp.)
    """
    policy = quantized.policy
    lo, hi = range_bounds(grids.ranges)

    def on_kernel(path, w):
        name = leaf_name(path)
        coder = policy.weight_codes(name)
        return w if coder is None else _rounded(w, grids.weights[name], coder.bits)

    def on_site(site, y):
        bits = policy.site_bits(site.kind)
        grid = affine.affine_params(lo[site.index], hi[site.index], bits)
        return _rounded(y, grid, bits)

    def forward(params, batch_stats, images):
        with nn.intercept_methods(fold_frozen):
            return quantized.model.apply({"params": params, "batch_stats": batch_stats}, images)

    rounded = jax.tree_util.tree_map_with_path(on_kernel, params)
    mapped = map_activations(forward, on_site, **policy.site_options)
    return mapped(rounded, batch_stats, images)
