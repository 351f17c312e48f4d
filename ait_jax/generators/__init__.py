"""Generators of synthetic images. All share the interface of `generators.base.Generator`."""

from collections.abc import Callable

from ait_jax.generators.base import Generator
from ait_jax.generators.gdfq import GDFQ

__all__ = ["GENERATORS", "Generator", "build_generator"]

GENERATORS: dict[str, Callable[..., Generator]] = {"gdfq": GDFQ}


def build_generator(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, latent_size: int
) -> Generator:
    """The generator of that name.

    Args:
        name: a key of `GENERATORS`.
        image_shape: (H, W, C) of the images that it makes.
        num_classes: labels are 0 .. num_classes - 1.
        latent_size: width of the latent vector.

    Raises:
        ValueError: if there is no such generator, or it cannot make images of that shape.
    """
    if name not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise ValueError(f"generator.name = {name!r} is not allowed: it must be one of {known}")
    return GENERATORS[name](
        image_shape=image_shape, num_classes=num_classes, latent_size=latent_size
    )
