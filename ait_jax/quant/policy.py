"""What is quantized: which tensors, which activation sites, and how many bits each."""

import dataclasses
import itertools
from typing import Any

import jax

from ait_jax.errors import UserError
from ait_jax.quant.activations import ActivationQuantizer
from ait_jax.quant.affine import ChannelAxis, check_bits
from ait_jax.quant.ranges import MovingAverage
from ait_jax.quant.weights import MinMax, TensorQuantizer, WeightQuantizer

__all__ = [
    "SITES",
    "Kernels",
    "QuantPolicy",
    "leaf_name",
    "named_leaves",
    "tensor_layer",
]

# "paper": after every ReLU and ReLU6 and nowhere else (AIT, section 5.1). "integer": whatever else
# enters a conv or a matmul as well, which hardware without floating point needs.
SITES = ("paper", "integer")

# An image has 8 bits to begin with.
_IMAGE_BITS = 8


# `(name of a tensor, axes of its output channels)` for each quantized tensor of a network.
Kernels = tuple[tuple[str, ChannelAxis], ...]


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as a slash-separated name: `stage1_block0/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name (see `leaf_name`), in the order of the tree.

    Args:
        tree: any pytree.

    Raises:
        UserError: if two leaves have one name, as those of `{"a/b": x, "a": {"b": y}}` do, or if
            the name of one is that of a branch, as in `{"a/b": x, "a": y}`.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = leaf_name(path)
        if name in leaves:
            raise UserError(
                f"two parameters have the name {name!r}, which joins the keys on their way with "
                "slashes: rename a key that has a slash in it"
            )
        leaves[name] = leaf
    for name in leaves:
        parents = itertools.accumulate(name.split("/")[:-1], lambda a, b: f"{a}/{b}")
        branch = next((parent for parent in parents if parent in leaves), None)
        if branch is not None:
            raise UserError(
                f"the parameter {branch!r} has a name that also begins that of {name!r}: rename a "
                "key that has a slash in it"
            )
    return leaves


def tensor_layer(name: str) -> str:
    """The layer of a quantized tensor: its name without `/kernel` or `/embedding`.

    That of `stage1_block0/conv1/kernel` is `stage1_block0/conv1`.
    """
    layer, _, kind = name.rpartition("/")
    return layer if layer and kind in ("kernel", "embedding") else name


@dataclasses.dataclass(frozen=True)
class QuantPolicy:
    """Bits and places of quantization.

    Attributes:
        weight_bits: bits of every quantized tensor, 2 to 8, first and last layer included but for
            `layer_bits`; one grid per output channel.
        activation_bits: bits of every activation site, 2 to 8; one grid per tensor. The
            image, where it is a site, has 8.
        kernels: the quantized tensors in the order of execution, and the axes of their output
            channels, as `kernels.find_kernels` returns them.
        sites: where activations are quantized; one of `SITES`.
        layer_bits: `(layer, bits)` for each layer whose kernel has other bits than `weight_bits`
            (see `layers.resolve_layer_bits`); none in the paper.
        gates: whether ReLUs that are only multiplied by other data are sites too: those of results
            that were saved before they were told apart.
        activations: the quantizer of activations.
        weights: the quantizer of weights.
    """

    weight_bits: int
    activation_bits: int
    kernels: Kernels
    sites: str = "paper"
    layer_bits: tuple[tuple[str, int], ...] = ()
    gates: bool = False
    activations: ActivationQuantizer = dataclasses.field(default_factory=MovingAverage)
    weights: WeightQuantizer = dataclasses.field(default_factory=MinMax)

    def __post_init__(self):
        """Checks every field."""
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.activation_bits, "activation_bits")
        for layer, bits in self.layer_bits:
            check_bits(bits, f"layer_bits of {layer}")
        if self.sites not in SITES:
            raise ValueError(f"sites = {self.sites!r} is not allowed: it must be one of {SITES}")

    def weight_codes(self, name: str) -> TensorQuantizer | None:
        """How the tensor of that name (see `leaf_name`) is quantized; None if it stays float."""
        layer = self.layer(name)
        if layer is None:
            return None
        bits = dict(self.layer_bits).get(layer, self.weight_bits)
        return TensorQuantizer(bits, dict(self.kernels)[name], self.weights)

    def layer(self, name: str) -> str | None:
        """The layer whose quantized tensor that of the name is; None if it stays float."""
        return tensor_layer(name) if name in dict(self.kernels) else None

    @property
    def coders(self) -> list[TensorQuantizer]:
        """The different codes of this network's weights."""
        return sorted({c for name, _ in self.kernels if (c := self.weight_codes(name))}, key=repr)

    @property
    def quantizes_kernel_inputs(self) -> bool:
        """Whether what enters a kernel is a site (see `sites.find_sites`) as well."""
        return self.sites == "integer"

    @property
    def site_options(self) -> dict[str, Any]:
        """The options of `find_sites` and `map_activations` that choose the sites."""
        return {
            "kernel_inputs": self.quantizes_kernel_inputs,
            "keep_loops": True,  # No kernel is in one (see `kernels.find_kernels`).
            "gates": self.gates,
        }

    def site_bits(self, kind: str) -> int:
        """Bits of the activation sites of a kind (see `calls.ActivationSite`)."""
        return _IMAGE_BITS if kind == "image" else self.activation_bits
