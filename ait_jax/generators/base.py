"""What every generator is to the training step, and the keys of its random numbers."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax

from ait_jax.methods.registry import Registry, Setting, boolean, integer, one_of

__all__ = ["GENERATORS", "Generator", "GeneratorContext", "RegisteredGenerator", "example_keys"]


class Generator(Protocol):
    """A framework's generator: sampler and network. All methods are pure."""

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables: `params` and `batch_stats`."""
        ...

    def sample(self, key: jax.Array, step: jax.Array, example_ids: jax.Array) -> Any:
        """The random inputs of some examples of a step.

        Args:
            key: the key of the run.
            step: int32 scalar.
            example_ids: int32 [N], *global* indices within the batch, so that an example is the
                same wherever it is made.

        Returns:
            A pytree of arrays with leading axis N.
        """
        ...

    def apply(
        self, variables: Any, batch: Any, *, axis_name: str | None = None
    ) -> tuple[jax.Array, Any]:
        """Images [N, H, W, C] in the teacher's normalised space, and new `batch_stats`.

        Args:
            variables: `params` and `batch_stats`.
            batch: from `sample`.
            axis_name: the axis over which the batch is split, if any; batch norms use the
                statistics of the global batch.
        """
        ...

    def targets(self, batch: Any) -> jax.Array:
        """What the teacher should see in the images: labels [N] or probabilities [N, classes]."""
        ...


class GeneratorContext(NamedTuple):
    """What a generator may need to know of the run, beside its config section.

    Attributes:
        image_shape: (H, W, C) of the images that it makes.
        num_classes: labels are 0 .. num_classes - 1.
        classifier_weights: gives the teacher's classifier weights [classes, features].
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    classifier_weights: Callable[[], Any]


class RegisteredGenerator:
    """Base of generators whose arguments are keys of the config's section `generator`.

    Attributes:
        keys: those that it takes, beside the shape of images and the number of classes.
    """

    keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of_config(cls, section: Any, context: GeneratorContext) -> Any:
        """The generator of a config.

        Args:
            section: its section `generator`.
            context: what else it needs to know.
        """
        given = {key: section[key] for key in cls.keys} | cls.further(section, context)
        return cls(context.image_shape, context.num_classes, **given)  # type: ignore[call-arg]

    @classmethod
    def further(cls, section: Any, context: GeneratorContext) -> dict[str, Any]:
        """Further arguments by name.

        Args:
            section: the config's section `generator`.
            context: what else is known.
        """
        del section, context
        return {}


# Classes of generators by name, each with `of_config(section, context)`, where `section` is the
# config's section `generator`.
GENERATORS: Registry[Any] = Registry("generator.name")
GENERATORS.settings |= {
    "generator.name": Setting("gdfq", one_of(GENERATORS), "the framework that makes the images"),
    "generator.latent_size": Setting(
        100, integer(1), "width of the latent; Qimera: of the classifier's input"
    ),
    "generator.conditional": Setting(
        False, boolean(), "GDFQ, Qimera: class-conditional batch norms, as for ImageNet"
    ),
    "generator.remat": Setting(
        False,
        boolean(),
        "less memory for more time: activations are computed again in the backward pass",
    ),
}


def example_keys(key: jax.Array, step: jax.Array, example_ids: jax.Array) -> jax.Array:
    """One key for each example of a step, from (key, step, global index) alone: keys [N].

    Args:
        key: the key of the run.
        step: int32 scalar.
        example_ids: int32 [N], global indices within the batch.
    """
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda i: jax.random.fold_in(step_key, i))(example_ids)
