"""What is quantized: which tensors, which activation sites, and how many bits each."""

import dataclasses
from typing import Any

import jax

from ait_jax.quant.affine import WeightCodes, check_bits

__all__ = ["SITES", "QuantPolicy", "leaf_name"]

# "paper": after every ReLU and ReLU6 and nowhere else (AIT, section 5.1).
SITES = ("paper",)


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a slash-separated name: `stage1_block0/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """Bits and places of quantization.

    Attributes:
        weight_bits: bits of every conv and dense kernel, 2 to 8, first and last layer included;
            one grid per output channel (the last axis of Flax's kernels, depthwise ones too).
        activation_bits: bits of every activation site, 2 to 8; one grid per tensor.
        sites: where activations are quantized; one of `SITES`.
        range_decay: decay of the moving average of activation ranges.
    """

    weight_bits: int
    activation_bits: int
    sites: str = "paper"
    range_decay: float = 0.9

    def __post_init__(self):
        """Checks every field."""
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        if self.sites not in SITES:
            raise ValueError(f"sites = {self.sites!r} is not allowed: it must be one of {SITES}")
        if not 0 <= self.range_decay < 1:
            raise ValueError(f"range_decay = {self.range_decay!r} is not allowed: [0, 1)")

    def weight_codes(self, name: str, ndim: int) -> WeightCodes | None:
        """How the tensor of that name (see `leaf_name`) is coded; None if it stays float."""
        if name.rsplit("/", 1)[-1] == "kernel" and ndim >= 2:
            return WeightCodes(self.weight_bits, channel_axis=-1)
        return None

    def quantizes_activation(self, primitive: str) -> bool:
        """Whether the output of a site of that kind (see `sites.find_sites`) is quantized."""
        return primitive in ("relu", "relu6")
