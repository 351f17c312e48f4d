"""Bits by layer: what layers a network has, which run first and last, and the user's exceptions.

A layer is a module with a kernel that is quantized; its name is that kernel's without `/kernel`,
such as `stage1_block0/conv1`. Weights alone are meant: activations are no layer's but a site's.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.errors import UserError
from ait_jax.quant.affine import MAX_BITS, MIN_BITS
from ait_jax.quant.policy import Kernels, kernel_layer, leaf_name, tensor_layer

__all__ = ["LayerBitsError", "executed_layers", "parse_layer_bits", "resolve_layer_bits"]


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


def _layers(params: Any) -> set[str]:
    names = [kernel_layer(leaf_name(p), w.ndim) for p, w in jax.tree.leaves_with_path(params)]
    return {name for name in names if name is not None}


def executed_layers(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> list[str]:
    """The layers that a model calls, in the order of execution; nothing is computed.

    Args:
        model: any Linen module from images to logits.
        variables: its variables, or their shapes.
        image_shape: (H, W, C) of one image.

    Returns:
        A name for each call: a layer that is shared comes as often as it is called.
    """
    layers = _layers(variables["params"])
    calls = []

    def record(next_fun, args, kwargs, context):
        name = "/".join(context.module.path)
        if name in layers:
            calls.append(name)
        return next_fun(*args, **kwargs)

    # A function of its own: of model.apply, jax might remember a trace and call nothing.
    def forward(variables, image):
        with nn.intercept_methods(record):
            return model.apply(variables, image)

    jax.eval_shape(forward, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return calls


def resolve_layer_bits(
    model: nn.Module,
    variables: Any,
    image_shape: tuple[int, ...],
    *,
    first_last_bits: int = 0,
    overrides: str = "",
    kernels: Kernels | None = None,
) -> tuple[tuple[str, int], ...]:
    """`QuantPolicy.layer_bits` of a network.

    Args:
        model: any Linen module from images to logits.
        variables: its variables, or their shapes.
        image_shape: (H, W, C) of one image.
        first_last_bits: weight bits of the layers that run first and last; 0 for no exception.
        overrides: see `parse_layer_bits`. A regex has to match the *whole* name of a layer; of
            several entries that match a layer the *last* one counts, and any of them counts more
            than `first_last_bits`.
        kernels: the quantized tensors, where these are not those called `kernel` (see
            `policy.QuantPolicy`).

    Returns:
        `(layer, weight bits)` for each layer that is an exception.

    Raises:
        LayerBitsError: if `overrides` is malformed, or an entry matches no layer.
    """
    entries = parse_layer_bits(overrides)
    if not first_last_bits and not entries:
        return ()
    if kernels is None:
        executed = executed_layers(model, variables, image_shape)
        layers = list(dict.fromkeys(executed + sorted(_layers(variables["params"]))))
    else:
        executed = layers = [tensor_layer(name) for name, _ in kernels]
    bits: dict[str, int] = {}
    if first_last_bits:
        bits = dict.fromkeys(executed[:1] + executed[-1:], first_last_bits)
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
