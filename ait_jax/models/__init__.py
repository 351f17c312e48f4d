"""Networks in Linen, NHWC, unaware of quantization, and the registry that names them."""

import functools
from collections.abc import Callable

import flax.linen as nn

from ait_jax.models import efficientnet_lite
from ait_jax.models.efficientnet_lite import EfficientNetLite
from ait_jax.models.mobilenet_v2 import MobileNetV2
from ait_jax.models.resnet import ResNet
from ait_jax.models.resnet_cifar import CifarResNet
from ait_jax.models.vgg import VGG16

__all__ = ["ARCHITECTURES", "build_model", "usual_image_size"]

# Name -> constructor(num_classes=...). Where suffixes tell networks apart, weights of one are wrong
# in the other even if their shapes fit.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    # Suffix a or b: the shortcut kind.
    **{
        f"cifar_resnet{depth}_{kind.lower()}": functools.partial(
            CifarResNet, depth=depth, shortcut=kind
        )
        for depth in (8, 20, 32, 44, 56)
        for kind in ("A", "B")
    },
    **{f"resnet{depth}": functools.partial(ResNet, depth=depth) for depth in (18, 34, 50, 101)},
    # Suffix cv: as pytorchcv has them.
    **{
        f"resnet{depth}_cv": functools.partial(ResNet, depth=depth, stride_in_first=True)
        for depth in (50, 101)
    },
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_cv": functools.partial(MobileNetV2, cv=True),
    # Suffix sym: both sides padded alike.
    **{
        f"efficientnet_lite{variant}{'' if same else '_sym'}": functools.partial(
            EfficientNetLite, variant=variant, same=same
        )
        for same in (True, False)
        for variant in range(5)
    },
    "vgg16_bn": VGG16,
    "vgg16_bn_cifar": functools.partial(VGG16, hidden=0),
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


def usual_image_size(arch: str) -> int:
    """Height and width of the images that published weights of that network were trained on."""
    if "cifar" in arch:
        return 32
    if arch.startswith("efficientnet_lite"):
        return efficientnet_lite.IMAGE_SIZES[int(arch.removesuffix("_sym")[-1])]
    return 224
