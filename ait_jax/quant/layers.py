"""Weight bits by layer: of those that run first and last, and of those that the user names.

A layer is a quantized tensor; its name is the tensor's without `/kernel` or `/embedding`, such as
`stage1_block0/conv1`. The bits are those of its weights: activations have bits by site.
"""

import re

from ait_jax.errors import UserError
from ait_jax.quant.affine import MAX_BITS, MIN_BITS
from ait_jax.quant.policy import Kernels, tensor_layer

__all__ = ["LayerBitsError", "parse_layer_bits", "resolve_layer_bits"]


class LayerBitsError(UserError):
    """A value of `quant.layer_bits` that is not allowed; names the value, the part, and why."""


def parse_layer_bits(text: str) -> list[tuple[re.Pattern[str], int]]:
    """The entries of `quant.layer_bits`, in order.

    Args:
        text: `REGEX=BITS` entries, separated by commas, so no regex may hold a comma; may be empty.

    Returns:
        `(regex, bits)` for each entry.

    Raises:
        LayerBitsError: if an entry has no `=`, no regex or a wrong one, or bits out of 2..8.
    """
    entries = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        regex, _, bits = (part.strip() for part in entry.rpartition("="))
        if not regex or bits not in map(str, range(MIN_BITS, MAX_BITS + 1)):
            raise LayerBitsError(
                f"quant.layer_bits = {text!r} is not allowed: {entry!r} must be REGEX=BITS, with "
                f"bits an integer in {MIN_BITS}..{MAX_BITS}"
            )
        try:
            entries.append((re.compile(regex), int(bits)))
        except re.error as error:
            raise LayerBitsError(
                f"quant.layer_bits = {text!r} is not allowed: {regex!r} is no regular expression "
                f"({error})"
            ) from error
    return entries


def resolve_layer_bits(
    kernels: Kernels, *, first_last_bits: int = 0, overrides: str = ""
) -> tuple[tuple[str, int], ...]:
    """`QuantPolicy.layer_bits` of a network.

    Args:
        kernels: the quantized tensors in the order of execution.
        first_last_bits: weight bits of the layers that run first and last; 0 for no exception.
        overrides: see `parse_layer_bits`. A regex has to match the *whole* name of a layer; of
            several entries that match a layer the *last* one counts, and any of them counts more
            than `first_last_bits`.

    Returns:
        `(layer, weight bits)` for each layer that is an exception.

    Raises:
        LayerBitsError: if `overrides` is malformed, or an entry matches no layer.
    """
    entries = parse_layer_bits(overrides)
    layers = [tensor_layer(name) for name, _ in kernels]
    bits: dict[str, int] = {}
    if first_last_bits:
        bits = dict.fromkeys(layers[:1] + layers[-1:], first_last_bits)
    for regex, own_bits in entries:
        matched = [layer for layer in layers if regex.fullmatch(layer)]
        if not matched:
            examples = layers if len(layers) <= 5 else [*layers[:3], "...", layers[-1]]
            raise LayerBitsError(
                f"quant.layer_bits = {overrides!r} is not allowed: {regex.pattern!r} matches no "
                f"layer's whole name; the {len(layers)} layers are {', '.join(examples)}"
            )
        bits |= dict.fromkeys(matched, own_bits)
    return tuple(bits.items())
