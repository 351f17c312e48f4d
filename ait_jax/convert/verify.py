"""Logits of a converted network against those of the PyTorch project its weights come from.

torch and the project are imported when they are needed; neither is a dependency.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ait_jax.convert import Weights
from ait_jax.errors import UserError
from ait_jax.models import build_model

__all__ = ["TOLERANCE", "UnverifiedError", "VerificationError", "verify_logits"]

# The largest difference of logits that is allowed, in units of the largest logit: far above the
# noise of float32, far below what a wrong stride, padding or epsilon makes.
TOLERANCE = 1e-3

_IMAGES = 4
_SEED = 0


class UnverifiedError(UserError):
    """There is nothing to compare with; the message says why."""

    def __init__(self, reason: str):
        super().__init__(f"logits not verified: {reason}")
        self.reason = reason


class VerificationError(UserError):
    """The PyTorch network computes something else, or does not take the weights."""


def verify_logits(
    weights: Weights, variables: Any, arch: str, image_shape: tuple[int, int, int], source: str
) -> tuple[str, float]:
    """Runs random images through both networks, in float32.

    Args:
        weights: the file's tensors, and whose names they have.
        variables: the same, converted and checked.
        arch: a key of `models.ARCHITECTURES`.
        image_shape: (H, W, C); some packages' networks are for images of the usual size alone.
        source: the file, for messages.

    Returns:
        The package that was compared with, and the largest difference of logits, relative to the
        largest logit.

    Raises:
        UnverifiedError: if the package or torch is not installed, the weights are of no package, or
            the network takes no RGB images.
        VerificationError: if the difference is above `TOLERANCE`, or the package's network does not
            take the state dict as it is.
    """
    if weights.naming is None:
        raise UnverifiedError("the file has the names of this package, of no PyTorch project")
    if image_shape[-1] != 3:
        raise UnverifiedError(f"the network takes images of {image_shape[-1]} channels, not RGB")
    images = np.random.default_rng(_SEED).standard_normal((_IMAGES, *image_shape), np.float32)
    classes = variables["params"]["classifier"]["kernel"].shape[-1]
    model = build_model(arch, classes)
    package, network = _build(weights.naming.project, arch, classes)
    torch = _import("torch")
    tensors = {name: torch.tensor(_plain(value)) for name, value in weights.state_dict.items()}
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise VerificationError(
            f"{source}: the {arch} of {package} does not take the weights: {error}"
        ) from error
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(model.apply)(variables, images))
    difference = float(np.abs(logits - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:  # NaN is not.
        raise VerificationError(
            f"{source}: the logits differ from those of {package} by {difference:.1e} of the "
            f"largest; at most {TOLERANCE:g} is allowed"
        )
    return package, difference


def _plain(value: np.ndarray) -> np.ndarray:
    """Of a dtype that torch knows: numpy's bfloat16 is not."""
    return np.asarray(value, value.dtype if value.dtype.kind in "biu" else np.float32)


def _import(name: str) -> Any:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UnverifiedError(f"{package} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # One that was built for another torch fails in any way.
        raise UnverifiedError(f"{package} cannot be imported: {error}") from error


def _build(project: str, arch: str, classes: int) -> tuple[str, Any]:
    """Name and network of the first of a naming's projects that is installed."""
    reasons = []
    for part in project.split(", "):
        package = part.partition(" ")[0]
        if package not in _PACKAGES:
            reasons.append(f"{package} is not a package")
            continue
        try:
            return package, _PACKAGES[package](arch, classes)
        except UnverifiedError as error:
            reasons.append(error.reason)
    raise UnverifiedError("; ".join(reasons))


def _torchvision(arch: str, classes: int) -> Any:
    return getattr(_import("torchvision.models"), arch)(num_classes=classes)


def _timm(arch: str, classes: int) -> Any:
    name = {"mobilenet_v2": "mobilenetv2_100"}.get(arch, arch)
    if arch.startswith("efficientnet"):
        name = f"tf_{arch}"
    return _import("timm").create_model(name, num_classes=classes)


def _pytorchcv(arch: str, classes: int) -> Any:
    # Modules of their own: the package's list of models needs torchvision.
    if arch.startswith("cifar"):
        blocks = (int(arch.removeprefix("cifar_resnet").removesuffix("_b")) - 2) // 6
        return _import("pytorchcv.models.resnet_cifar").CIFARResNet(
            channels=[[width] * blocks for width in (16, 32, 64)],
            init_block_channels=16,
            bottleneck=False,
            num_classes=classes,
        )
    if arch == "mobilenet_v2_cv":
        return _import("pytorchcv.models.mobilenetv2").mobilenetv2_w1(num_classes=classes)
    constructor = getattr(_import("pytorchcv.models.resnet"), arch.removesuffix("_cv"))
    return constructor(num_classes=classes)


def _efficientnet_lite(arch: str, classes: int) -> Any:
    package = _import("efficientnet_lite_pytorch")
    return package.EfficientNet.from_name(arch.replace("_", "-", 1), num_classes=classes)


# By the first words of `Naming.project`.
_PACKAGES: dict[str, Callable[[str, int], Any]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "pytorchcv": _pytorchcv,
    "efficientnet-lite-pytorch": _efficientnet_lite,
}
