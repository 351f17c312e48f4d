"""What is quantized: which tensors, which activation sites, and how many bits each."""

import dataclasses
from typing import Any

import jax

from ait_jax.quant.affine import WeightCodes, check_bits

__all__ = ["SITES", "QuantPolicy", "kernel_layer", "leaf_name"]

# "paper": after every ReLU and ReLU6 and nowhere else (AIT, section 5.1). "integer": whatever else
# enters a conv or a matmul as well, which hardware without floating point needs.
SITES = ("paper", "integer")

# An image has 8 bits to begin with.
_IMAGE_BITS = 8


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a slash-separated name: `stage1_block0/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def kernel_layer(name: str, ndim: int) -> str | None:
    """The layer whose kernel a tensor is: `stage1_block0/conv1`; None of any other tensor.

    Args:
        name: of the tensor, see `leaf_name`.
        ndim: its rank.
    """
    layer, _, kind = name.rpartition("/")
    return layer if kind == "kernel" and ndim >= 2 else None


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """Bits and places of quantization.

    Attributes:
        weight_bits: bits of every conv and dense kernel, 2 to 8, first and last layer included but
            for `layer_bits`; one grid per output channel (the last axis of Flax's kernels,
            depthwise ones too).
        activation_bits: bits of every activation site, 2 to 8; one grid per tensor. The
            image, where it is a site, has 8.
        sites: where activations are quantized; one of `SITES`.
        range_decay: decay of the moving average of activation ranges.
        layer_bits: `(layer, bits)` for each layer whose kernel has other bits than `weight_bits`
            (see `layers.resolve_layer_bits`); none in the paper.
    """

    weight_bits: int
    activation_bits: int
    sites: str = "paper"
    range_decay: float = 0.9
    layer_bits: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        """Checks every field."""
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        for layer, bits in self.layer_bits:
            check_bits(bits, f"layer_bits of {layer}")
        if self.sites not in SITES:
            raise ValueError(f"sites = {self.sites!r} is not allowed: it must be one of {SITES}")
        if not 0 <= self.range_decay < 1:
            raise ValueError(f"range_decay = {self.range_decay!r} is not allowed: [0, 1)")

    def weight_codes(self, name: str, ndim: int) -> WeightCodes | None:
        """How the tensor of that name (see `leaf_name`) is coded; None if it stays float."""
        layer = kernel_layer(name, ndim)
        if layer is None:
            return None
        return WeightCodes(dict(self.layer_bits).get(layer, self.weight_bits), channel_axis=-1)

    @property
    def quantizes_kernel_inputs(self) -> bool:
        """Whether what enters a kernel is a site (see `sites.find_sites`) as well."""
        return self.sites == "integer"

    def site_bits(self, kind: str) -> int:
        """Bits of the activation sites of a kind (see `sites.ActivationSite`)."""
        return _IMAGE_BITS if kind == "image" else self.activation_bits
