"""A user's generator and images, checked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ait_jax.data.evaluator import Evaluator
from ait_jax.data.sources import Images
from ait_jax.errors import UserError
from ait_jax.generators import Generator
from ait_jax.methods.losses import GeneratorOutputs, StudentOutputs, Term
from ait_jax.quant.taps import apply_tapped
from ait_jax.teacher import Preprocess
from ait_jax.zero_shot.bring import Brought
from ait_jax.zero_shot.images import checked_images

__all__ = ["check_generator", "check_losses", "evaluator_of", "own_terms"]


def check_generator(
    generator: Generator, config: ml_collections.ConfigDict
) -> jax.ShapeDtypeStruct:
    """Checks a generator; traces, but computes nothing.

    Returns:
        The shape of its targets.

    Raises:
        UserError: if it is none, or makes images or targets that do not fit the config.
    """
    size = config.train.batch_size
    try:
        variables = jax.eval_shape(generator.init, jax.random.key(0))
        batch = jax.eval_shape(
            generator.sample,
            jax.random.key(0),
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.ShapeDtypeStruct((size,), jnp.int32),
        )
        images, _ = jax.eval_shape(generator.apply, variables, batch)
        targets = jax.eval_shape(generator.targets, batch)
    except Exception as error:
        raise UserError(
            f"generator cannot be used: its methods must be those of ait_jax.generators.Generator "
            f"({type(error).__name__}: {error})"
        ) from error
    if set(variables) != {"params", "batch_stats"}:
        raise UserError(
            f"generator.init makes {sorted(variables)}: it must make params and batch_stats, "
            "either of which may be empty"
        )
    classes = config.teacher.num_classes
    for what, shape, allowed in (
        ("images", images.shape, [(size, *config.teacher.image_shape)]),
        ("targets", targets.shape, [(size,), (size, classes)]),
    ):
        if shape not in allowed:
            raise UserError(
                f"generator makes {what} of shape {shape} for {size} examples: it must be "
                f"{' or '.join(map(str, allowed))}"
            )
    return targets


_TAKEN = ("loss", "kl", "cross_entropy", "bns", "agreement")  # names of metrics


def own_terms(terms: Mapping[str, Callable[[Any], jax.Array]] | None) -> tuple[Term, ...]:
    """A user's loss terms, weights included, as the step takes them."""
    return tuple(Term(name, 1.0, term) for name, term in (terms or {}).items())


def check_losses(
    config: ml_collections.ConfigDict,
    brought: Brought,
    targets: Any,
    generator_losses: Any,
    student_losses: Any,
) -> None:
    """Checks a user's loss terms; traces, but computes nothing.

    Args:
        config: of the run.
        brought: the network.
        targets: the shape of what the generator aims at.
        generator_losses: terms by name.
        student_losses: likewise.

    Raises:
        UserError: if one is no function, makes no scalar, or has the name of another metric.
    """
    shape = (config.train.batch_size, *config.teacher.image_shape)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    site_options = {"kernel_inputs": config.quant.sites == "integer", "keep_loops": True}

    def outputs_of(variables, images, targets):
        seen = apply_tapped(brought.model, variables, images, site_options=site_options)
        statistics = variables["batch_stats"]
        return (
            # The student's are of the same shapes.
            GeneratorOutputs(images, targets, seen.logits, seen, statistics, lambda: seen),
            StudentOutputs(images, targets, seen.logits, seen.logits, seen, seen, statistics),
        )

    for i, (what, terms) in enumerate(
        (("generator_losses", generator_losses), ("student_losses", student_losses))
    ):
        kind = (GeneratorOutputs, StudentOutputs)[i].__name__
        if not isinstance(terms, Mapping):
            raise UserError(f"{what} must be a mapping from names to functions, not {terms!r}")
        for name, term in terms.items():
            if name in _TAKEN:
                raise UserError(f"{what} has {name!r}, which is another metric's name: choose one")
            try:
                made = jax.eval_shape(
                    lambda *parts, term=term, i=i: term(outputs_of(*parts)[i]),
                    brought.variables,
                    images,
                    targets,
                )
            except Exception as error:
                raise UserError(
                    f"{what}[{name!r}] cannot be computed of {kind}: {error}"
                ) from error
            if getattr(made, "shape", None) != ():
                raise UserError(f"{what}[{name!r}] makes {made}: it must make a scalar")


def evaluator_of(
    evaluation: tuple[Any, Any], config: ml_collections.ConfigDict, preprocess: Preprocess
) -> Evaluator:
    """The evaluator of a user's images, of which each process takes its share.

    Args:
        evaluation: `(images, labels)`.
        config: of the run.
        preprocess: of pixels.

    Raises:
        UserError: if they do not fit the config, or each other.
    """
    try:
        images, labels = evaluation
        labels = np.asarray(labels)
    except (TypeError, ValueError) as error:
        raise UserError(f"evaluation must be a pair of images and labels: {error}") from error
    shape, classes = config.teacher.image_shape, config.teacher.num_classes
    images = checked_images(images, shape, name="evaluation[0]")
    if labels.shape != images.shape[:1] or not labels.size:
        raise UserError(
            f"evaluation has {len(images)} images and labels of shape {labels.shape}: they must be "
            "(N,), one label for each image"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"evaluation has labels of {labels.dtype} in {labels.min()}..{labels.max()}: they must "
            f"be integers in 0..{classes - 1}, as num_classes = {classes}"
        )
    share = slice(jax.process_index(), None, jax.process_count())
    return Evaluator(
        Images(images[share], labels[share].astype(np.int32), len(labels)),
        config.data.batch_size,
        preprocess if images.dtype == np.uint8 else lambda x: x.astype(jnp.float32),
        image_shape=shape,
        num_classes=classes,
    )
