"""Generators of synthetic images. All share the interface of `generators.base.Generator`."""

from collections.abc import Callable
from typing import Any

import ml_collections

from ait_jax.generators.arc import ARC
from ait_jax.generators.base import Generator
from ait_jax.generators.gdfq import GDFQ
from ait_jax.generators.genotypes import GENOTYPES
from ait_jax.generators.qimera import Qimera

__all__ = ["GENERATORS", "GENOTYPES", "Generator", "build_generator", "generator_of_config"]

GENERATORS: dict[str, Callable[..., Generator]] = {"gdfq": GDFQ, "qimera": Qimera, "arc": ARC}

# Keys of config.generator that a framework's generator takes, beside latent_size and remat.
_SETTINGS = {
    "gdfq": ("conditional",),
    "qimera": ("conditional", "superposed_labels", "superpose_probability"),
    "arc": ("genotype",),
}


def build_generator(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, **settings: Any
) -> Generator:
    """The generator of that name.

    Args:
        name: a key of `GENERATORS`.
        image_shape: (H, W, C) of the images that it makes.
        num_classes: labels are 0 .. num_classes - 1.
        **settings: what else its class takes (`latent_size`, `conditional`, ...).

    Raises:
        ValueError: if there is no such generator, or it cannot make images of that shape.
    """
    if name not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise ValueError(f"generator.name = {name!r} is not allowed: it must be one of {known}")
    return GENERATORS[name](image_shape=image_shape, num_classes=num_classes, **settings)


def generator_of_config(
    config: ml_collections.ConfigDict, teacher_embedding: Callable[[], Any]
) -> Generator:
    """The generator that a config asks for.

    Args:
        config: the whole config.
        teacher_embedding: gives the teacher's classifier weights [classes, features]; called only
            where the framework starts from them.

    Raises:
        UserError: if the parts of the config do not fit.
    """
    chosen = config.generator
    settings = {key: chosen[key] for key in ("latent_size", "remat", *_SETTINGS[chosen.name])}
    if chosen.name == "qimera" and chosen.embedding == "teacher":
        settings["embedding"] = teacher_embedding()
    return build_generator(
        chosen.name,
        image_shape=tuple(config.teacher.image_shape),
        num_classes=config.teacher.num_classes,
        **settings,
    )
