"""Networks in Linen, NHWC, unaware of quantization, and the registry that names them."""

import functools
from collections.abc import Callable

import flax.linen as nn

from ait_jax.models.resnet_cifar import CifarResNet

__all__ = ["ARCHITECTURES", "build_model"]

# Name -> constructor(num_classes=...). Suffix a or b: the shortcut kind.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    f"cifar_resnet{depth}_{kind.lower()}": functools.partial(
        CifarResNet, depth=depth, shortcut=kind
    )
    for depth in (8, 20, 32, 44, 56)
    for kind in ("A", "B")
}


def build_model(arch: str, num_classes: int) -> nn.Module:
    """The network of that name.

    Raises:
        ValueError: if there is none; lists those there are.
    """
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"teacher.arch = {arch!r} is not allowed: it must be one of {known}")
    return ARCHITECTURES[arch](num_classes=num_classes)
