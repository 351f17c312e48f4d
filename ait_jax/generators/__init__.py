"""Generators of synthetic images. All share the interface of `generators.base.Generator`."""

from collections.abc import Callable
from typing import Any

import ml_collections

# Each registers itself.
from ait_jax.generators.bank import Bank, bank_size
from ait_jax.generators.base import GENERATORS, Generator, GeneratorContext
from ait_jax.generators.gdfq import GDFQ
from ait_jax.generators.qimera import Qimera

from ait_jax.generators.arc import ARC  # isort: skip  # after what it is based on
from ait_jax.generators.genotypes import GENOTYPES

__all__ = [
    "ARC",
    "GDFQ",
    "GENERATORS",
    "GENOTYPES",
    "Bank",
    "Generator",
    "GeneratorContext",
    "Qimera",
    "generator_of_config",
]


def generator_of_config(
    config: ml_collections.ConfigDict, classifier_weights: Callable[[], Any]
) -> Generator:
    """The generator that a config asks for, with a bank of images if it asks for one.

    Args:
        config: the whole config.
        classifier_weights: gives the teacher's classifier weights [classes, features]; called only
            by generators that start from them.

    Raises:
        UserError: if the parts of the config do not fit.
    """
    context = GeneratorContext(
        tuple(config.teacher.image_shape), config.teacher.num_classes, classifier_weights
    )
    images = config.images
    shape, classes = context.image_shape, context.num_classes
    if images.count and images.share == 1:
        return Bank(shape, classes, bank_size(config))
    generator: Generator = GENERATORS[config.generator.name].of_config(config.generator, context)
    if not images.count:
        return generator
    return Bank(shape, classes, bank_size(config), images.share, generator)
