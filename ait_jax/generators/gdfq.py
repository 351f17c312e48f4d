"""GDFQ's generator (Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020)."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.generators.base import GENERATORS, RegisteredGenerator, example_keys
from ait_jax.generators.layers import ConditionalBatchNorm
from ait_jax.generators.trunk import check_image_shape, label_embedding, trunk
from ait_jax.promotion import promoting

__all__ = ["GDFQ", "GDFQBatch"]


class GDFQBatch(NamedTuple):
    """Random inputs of one batch.

    Attributes:
        latent: float32 [N, latent_size], standard normal.
        labels: int32 [N], uniform over the classes.
    """

    latent: jax.Array
    labels: jax.Array


class GDFQNetwork(nn.Module):
    """A label embedding times the latent (CIFAR), or class-conditional batch norms (ImageNet).

    Attributes:
        image_shape: (H, W, C), H and W divisible by 4.
        num_classes: rows of the embedding, or of the batch norms' tables.
        conditional: the ImageNet form.
        axis_name: the axis over which batch statistics are taken, if any.
        remat: as for `trunk`.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    conditional: bool = False
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, batch: GDFQBatch) -> jax.Array:
        """Images [N, H, W, C]."""
        if self.conditional:

            def conditional_norm(**kwargs):
                norm = ConditionalBatchNorm(self.num_classes, axis_name=self.axis_name, **kwargs)
                return lambda x: norm(x, batch.labels[:, None])

            return trunk(
                self,
                batch.latent,
                self.image_shape,
                self.axis_name,
                conditional_norm,
                remat=self.remat,
            )
        rows = label_embedding(batch.labels, self.num_classes, batch.latent.shape[-1])
        latent = rows * batch.latent
        return trunk(self, latent, self.image_shape, self.axis_name, remat=self.remat)


@GENERATORS.register("gdfq")
@dataclasses.dataclass(frozen=True)
class GDFQ(RegisteredGenerator):
    """GDFQ's generator and sampler; see `generators.base.Generator` for the methods.

    Attributes:
        image_shape: (H, W, C) of the images; H and W must be divisible by 4.
        num_classes: labels are 0 .. num_classes - 1.
        latent_size: width of the latent vector.
        conditional: class-conditional batch norms (the ImageNet form) instead of an embedding.
        remat: whether gradients compute activations again instead of keeping them.
    """

    keys = ("latent_size", "conditional", "remat")

    image_shape: tuple[int, int, int]
    num_classes: int
    latent_size: int = 100
    conditional: bool = False
    remat: bool = False

    def __post_init__(self):
        """Checks the image size."""
        check_image_shape(self.image_shape, "gdfq", 4)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables: `params` and `batch_stats`."""
        batch = GDFQBatch(jnp.zeros((1, self.latent_size)), jnp.zeros((1,), jnp.int32))
        return dict(self._network(None).init(key, batch))

    def sample(self, key: jax.Array, step: jax.Array, example_ids: jax.Array) -> GDFQBatch:
        """Latents and labels of the examples."""

        def one(example_key):
            latent_key, label_key = jax.random.split(example_key)
            return GDFQBatch(
                latent=jax.random.normal(latent_key, (self.latent_size,)),
                labels=jax.random.randint(label_key, (), 0, self.num_classes),
            )

        return jax.vmap(one)(example_keys(key, step, example_ids))

    def apply(
        self, variables: Any, batch: GDFQBatch, *, axis_name: str | None = None
    ) -> tuple[jax.Array, Any]:
        """Images [N, H, W, C] and the new `batch_stats`."""
        network = self._network(axis_name, remat=self.remat)
        images, updated = promoting(network.apply)(variables, batch, mutable=["batch_stats"])
        return images, updated["batch_stats"]

    def targets(self, batch: GDFQBatch) -> jax.Array:
        """The labels, int32 [N]."""
        return batch.labels

    # Fresh variables come without `remat`: Flax would draw other random numbers.
    def _network(self, axis_name: str | None, *, remat: bool = False) -> nn.Module:
        return GDFQNetwork(self.image_shape, self.num_classes, self.conditional, axis_name, remat)
