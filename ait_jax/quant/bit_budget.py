"""Bytes of a layer's integers, and which layers should have more bits of a budget of bytes."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ait_jax.quant.affine import MAX_BITS, ChannelAxis, grid_shape

__all__ = ["Suggestion", "suggest_layer_bits", "tensor_bytes"]


def tensor_bytes(shape: tuple[int, ...], bits: int, channel_axis: ChannelAxis) -> int:
    """What a tensor takes as packed integers with its grids, of 8 bytes each.

    Args:
        shape: of the tensor.
        bits: 2 to 8.
        channel_axis: as for `affine.weight_params`.
    """
    return math.ceil(math.prod(shape) * bits / 8) + 8 * math.prod(grid_shape(shape, channel_axis))


class Suggestion(NamedTuple):
    """Bits by layer within a budget.

    Attributes:
        layer_bits: the value of `quant.layer_bits`; empty if no layer differs from the others.
        bits: of every layer.
        size: bytes of all of them.
        error: sum of their relative errors.
    """

    layer_bits: str
    bits: dict[str, int]
    size: int
    error: float


def suggest_layer_bits(
    bits: Mapping[str, int],
    *,
    error: Callable[[str, int], float],
    size: Callable[[str, int], int],
    budget: int,
    named: Collection[str] = (),
) -> Suggestion:
    """Gives a bit at a time to the layer whose error falls most for each byte that it takes.

    It ends when no layer's next bit fits into the budget, or lowers its error. Errors of layers
    are compared as if each mattered as much to the network, which only a run can tell.

    Args:
        bits: of each layer at the start; in case of a tie the first layer has the bit.
        error: `error(layer, bits)`, the relative error of its weights (see `rounding_error`).
        size: `size(layer, bits)`, in bytes.
        budget: bytes of all layers together, at most.
        named: layers that the result is to name though they get no bit: those that have other bits
            than `quant.weight_bits` already.

    Returns:
        The suggestion; that of the start where nothing fits.
    """
    chosen = dict(bits)
    total = sum(size(layer, own) for layer, own in chosen.items())
    while True:
        best, most = None, 0.0
        for layer, own in chosen.items():
            if own >= MAX_BITS:
                continue
            added = size(layer, own + 1) - size(layer, own)
            if total + added > budget:
                continue
            gain = (error(layer, own) - error(layer, own + 1)) / max(added, 1)
            if gain > most:
                best, most = layer, gain
        if best is None:
            break
        total += size(best, chosen[best] + 1) - size(best, chosen[best])
        chosen[best] += 1
    entries = [
        f"{_regex(layer)}={own}"
        for layer, own in chosen.items()
        if own != bits[layer] or layer in named
    ]
    errors = sum(error(layer, own) for layer, own in chosen.items())
    return Suggestion(",".join(entries), chosen, total, errors)


def _regex(layer: str) -> str:
    """The regex of one name, as an entry of `quant.layer_bits` can hold it."""
    # Entries end at commas, and lose spaces at their ends.
    hidden = (f"\\u{ord(c):04x}" if c == "," or c.isspace() else re.escape(c) for c in layer)
    return "".join(hidden)
