"""The quantized apply of Linen models.

The models know nothing of quantization. Weights are rounded by a pure map over the parameter tree;
activations are found in the jaxpr (`sites`).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.quant import affine
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.quant.ranges import ActivationRanges, init_ranges, range_bounds, updated_bounds
from ait_jax.quant.sites import ActivationSite, find_sites, map_activations

__all__ = [
    "QuantizedModel",
    "code_tree",
    "kernel_mask",
    "quantize_params",
]


def _map_kernels(fn, params, policy: QuantPolicy, *, otherwise):
    def visit(path, leaf):
        coder = policy.weight_codes(leaf_name(path), leaf.ndim)
        return otherwise(leaf) if coder is None else fn(coder, leaf)

    return jax.tree_util.tree_map_with_path(visit, params)


def kernel_mask(params: Any, policy: QuantPolicy, bits: int | None = None) -> Any:
    """A tree of bools, shaped like `params`: True for the tensors that the policy quantizes.

    Args:
        params: parameters, or their shapes.
        policy: what is quantized.
        bits: if given, True only for those of so many bits.
    """
    return _map_kernels(
        lambda coder, w: bits is None or coder.bits == bits,
        params,
        policy,
        otherwise=lambda w: False,
    )


def quantize_params(params: Any, policy: QuantPolicy) -> Any:
    """Fake-quantized parameters (straight-through gradients), same tree, shapes and dtypes."""
    return _map_kernels(
        lambda coder, w: affine.fake_quant_weight(w, coder.bits, coder.channel_axis),
        params,
        policy,
        otherwise=lambda w: w,
    )


def code_tree(params: Any, policy: QuantPolicy) -> dict[str, jax.Array]:
    """int8 codes of every quantized tensor, by name, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    coders = [
        (leaf_name(path), w, policy.weight_codes(leaf_name(path), w.ndim)) for path, w in leaves
    ]
    return {name: coder(w) for name, w, coder in coders if coder is not None}


class QuantizedModel:
    """A Linen model's quantized apply.

    Attributes:
        model: the Linen module; its `__call__` takes images [N, H, W, C] and returns logits.
        policy: what is quantized.
        sites: the quantized activation sites in the order of execution.
    """

    def __init__(self, model: nn.Module, policy: QuantPolicy, variables: Any, image_shape):
        """Finds the sites of `model`.

        Args:
            model: the Linen module.
            policy: what is quantized.
            variables: its variables, or their shapes.
            image_shape: (H, W, C) of one image.

        Raises:
            ValueError: if an activation sits where it cannot be quantized.
        """
        self.model = model
        self.policy = policy
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        self.sites: list[ActivationSite] = find_sites(
            functools.partial(apply_frozen, model),
            variables,
            image,
            kernel_inputs=policy.quantizes_kernel_inputs,
        )

    def init_ranges(self) -> ActivationRanges:
        """Ranges of all sites, before calibration."""
        return init_ranges(len(self.sites))

    def apply(
        self,
        params: Any,
        batch_stats: Any,
        images: jax.Array,
        ranges: ActivationRanges,
        *,
        calibrate: bool = False,
        axis_name: str | None = None,
    ) -> tuple[jax.Array, ActivationRanges]:
        """Logits of the quantized network, batch norm in inference mode.

        Args:
            params: float parameters.
            batch_stats: running statistics.
            images: [N, H, W, C].
            ranges: activation ranges.
            calibrate: whether each site first updates its range with the batch it sees (and then
                quantizes with the new range, so that later sites see quantized inputs).
            axis_name: the axis over which batch minima and maxima are taken, if any.

        Returns:
            logits [N, classes] and the (updated) ranges.
        """
        quantized = self.apply_quantized_params(
            quantize_params(params, self.policy),
            batch_stats,
            images,
            ranges,
            calibrate=calibrate,
            axis_name=axis_name,
        )
        return quantized

    def apply_quantized_params(
        self, params, batch_stats, images, ranges, *, calibrate=False, axis_name=None
    ) -> tuple[jax.Array, ActivationRanges]:
        """As `apply`, with parameters that `quantize_params` has already rounded."""
        updated: list[ActivationRanges] = []

        def on_site(site, y):
            i = site.index
            state = ActivationRanges(ranges.lo[i], ranges.hi[i], ranges.weight)
            if calibrate:
                lo, hi = _batch_range(y, axis_name)
                state = updated_bounds(state, lo, hi, self.policy.range_decay)
            updated.append(state)
            bits = self.policy.site_bits(site.kind)
            return affine.fake_quant(y, *range_bounds(state), bits)

        def forward(params, batch_stats, images):
            return apply_frozen(self.model, {"params": params, "batch_stats": batch_stats}, images)

        kernel_inputs = self.policy.quantizes_kernel_inputs
        mapped = map_activations(forward, on_site, kernel_inputs=kernel_inputs)
        logits = mapped(params, batch_stats, images)
        if calibrate and updated:
            ranges = ActivationRanges(
                lo=jnp.stack([s.lo for s in updated]),
                hi=jnp.stack([s.hi for s in updated]),
                weight=updated[0].weight,
            )
        return logits, ranges


def _batch_range(y: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    y = jax.lax.stop_gradient(y).astype(jnp.float32)
    lo, hi = jnp.min(y), jnp.max(y)
    if axis_name is None:
        return lo, hi
    return jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)
