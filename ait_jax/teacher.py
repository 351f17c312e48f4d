"""The teacher: a frozen network, where its weights come from, and what its images look like."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ait_jax.convert.weights import fingerprint, load_variables, read_weights
from ait_jax.errors import UserError
from ait_jax.models import build_model
from ait_jax.promotion import of_rank
from ait_jax.quant.kernels import network_kernels
from ait_jax.quant.policy import Kernels, leaf_name

__all__ = [
    "Preprocess",
    "Teacher",
    "build_teacher_model",
    "classifier_weights",
    "load_teacher",
    "load_variables",
    "preprocess_of_config",
    "read_weights",
    "teacher_of_config",
]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How the teacher wants its images: resized, cropped, then `(x / 255 - mean) / std`.

    Calling it normalises, on the device; real images are resized and cropped as they are decoded.

    Attributes:
        mean: of images in [0, 1], one number for each channel.
        std: likewise.
        resize: short side of real images, in pixels, before the central crop; 0: not resized.
        interpolation: "bilinear" or "bicubic".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int = 0
    interpolation: str = "bilinear"

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 [N, H, W, C] -> float32 [N, H, W, C], normalised."""
        mean = of_rank(jnp.asarray(self.mean, jnp.float32), images.ndim)
        std = of_rank(jnp.asarray(self.std, jnp.float32), images.ndim)
        return (images.astype(jnp.float32) / 255 - mean) / std

    @property
    def warning(self) -> str:
        """What is odd about `mean` and `std`; empty if nothing is."""
        if max(map(abs, (*self.mean, *self.std))) <= 1:
            return ""
        return (
            f"mean = {self.mean} and std = {self.std} look like those of pixels in 0..255: both "
            "must be of images in [0, 1], so divide them by 255"
        )

    def invert(self, images: np.ndarray) -> np.ndarray:
        """Normalised images -> uint8, clipped; for people to look at."""
        pixels = (np.asarray(images) * np.asarray(self.std) + np.asarray(self.mean)) * 255
        return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network. It never changes and is never saved with a run; its fingerprint is.

    Attributes:
        model: the Linen module, or what stands in for one (see `ait_jax.zero_shot.networks`).
        variables: `params` and `batch_stats`, float32.
        preprocess: what its images look like.
        fingerprint: identifies the variables.
        kernels: see `QuantPolicy.kernels`.
    """

    model: Any
    variables: Any
    preprocess: Preprocess
    fingerprint: str
    kernels: Kernels


def classifier_weights(params: Any, num_classes: int) -> np.ndarray:
    """The weights of the last layer: float32 [num_classes, features], a copy.

    Args:
        params: the network's parameters.
        num_classes: width of the logits.

    Raises:
        UserError: if there is not exactly one dense (or 1x1) kernel with so many outputs.
    """
    found = {
        leaf_name(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if leaf.ndim >= 2 and leaf.shape[-1] == num_classes and set(leaf.shape[:-2]) <= {1}
    }
    if len(found) > 1:  # A layer within the network may be as wide by chance.
        found = {name: leaf for name, leaf in found.items() if "classifier" in name}
    if len(found) != 1:
        raise UserError(
            "generator.embedding = 'teacher' is not allowed with this teacher: "
            f"{len(found)} of its layers look like the classifier; use 'random'"
        )
    (kernel,) = found.values()
    return np.array(kernel.reshape(-1, num_classes).T, np.float32)


def build_teacher_model(config: ml_collections.ConfigDict) -> tuple[nn.Module, Any]:
    """The model of `config.teacher` and the shapes of its variables."""
    teacher = config.teacher
    model = build_model(teacher.arch, teacher.num_classes)
    image = jax.ShapeDtypeStruct((1, *teacher.image_shape), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), image)


def load_teacher(config: ml_collections.ConfigDict, weights: Path) -> Teacher:
    """The teacher of a config, with the weights of a file.

    Raises:
        WeightsError: as `load_variables`.
    """
    teacher = config.teacher
    model, shapes = build_teacher_model(config)
    variables = load_variables(weights, teacher.arch, shapes, key=teacher.weights_key)
    return teacher_of_config(config, model, variables, fingerprint(variables))


def teacher_of_config(
    config: ml_collections.ConfigDict, model: nn.Module, variables: Any, fingerprint: str
) -> Teacher:
    """The teacher of a config, with given variables.

    Args:
        config: names its images: their shape, and how they are preprocessed.
        model: of the config.
        variables: of the model; for a program that only traces, their shapes.
        fingerprint: of the variables.

    Raises:
        KernelsError: if nothing in the model can be quantized.
    """
    return Teacher(
        model=model,
        variables=variables,
        preprocess=preprocess_of_config(config),
        fingerprint=fingerprint,
        kernels=network_kernels(model, variables, tuple(config.teacher.image_shape)),
    )


def preprocess_of_config(config: ml_collections.ConfigDict) -> Preprocess:
    """How the teacher of a config wants its images."""
    teacher = config.teacher
    images = teacher.preprocess
    return Preprocess(tuple(teacher.mean), tuple(teacher.std), images.resize, images.interpolation)
