"""GDFQ's generator (Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020)."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.errors import UserError
from ait_jax.generators.base import example_keys
from ait_jax.generators.layers import TorchConv, TorchDense, UpsampleConv

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
    """The CIFAR form: a label embedding times the latent, then two upsampling convs.

    Attributes:
        image_shape: (H, W, C), H and W divisible by 4.
        num_classes: rows of the embedding.
        axis_name: the axis over which batch statistics are taken, if any.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch: GDFQBatch) -> jax.Array:
        """Images [N, H, W, C]."""
        height, width, channels = self.image_shape
        norm = functools.partial(
            nn.BatchNorm, use_running_average=False, momentum=0.9, axis_name=self.axis_name
        )
        leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
        embedding = nn.Embed(
            self.num_classes,
            batch.latent.shape[-1],
            embedding_init=nn.initializers.normal(1.0),
            name="embedding",
        )
        x = embedding(batch.labels) * batch.latent
        x = TorchDense(height // 4 * (width // 4) * 128, name="stem")(x)
        x = norm(epsilon=1e-5, name="stem_bn")(x.reshape(-1, height // 4, width // 4, 128))
        # The eps of 0.8 is the published one (a misplaced argument there), and part of the recipe.
        x = leaky_relu(norm(epsilon=0.8, name="bn1")(UpsampleConv(128, name="up1")(x)))
        x = leaky_relu(norm(epsilon=0.8, name="bn2")(UpsampleConv(64, name="up2")(x)))
        x = jnp.tanh(TorchConv(channels, name="to_image")(x))
        return norm(epsilon=1e-5, use_scale=False, use_bias=False, name="image_bn")(x)


@dataclasses.dataclass(frozen=True)
class GDFQ:
    """GDFQ's generator and sampler; see `generators.base.Generator` for the methods.

    Attributes:
        image_shape: (H, W, C) of the images; H and W must be divisible by 4.
        num_classes: labels are 0 .. num_classes - 1.
        latent_size: width of the latent vector.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    latent_size: int = 100

    def __post_init__(self):
        """Checks the image size."""
        if self.image_shape[0] % 4 or self.image_shape[1] % 4:
            raise UserError(
                f"teacher.image_shape = {self.image_shape} is not allowed with generator.name = "
                "'gdfq': height and width must be divisible by 4"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables: `params` and `batch_stats`."""
        batch = GDFQBatch(jnp.zeros((1, self.latent_size)), jnp.zeros((1,), jnp.int32))
        return dict(GDFQNetwork(self.image_shape, self.num_classes).init(key, batch))

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
        network = GDFQNetwork(self.image_shape, self.num_classes, axis_name)
        images, updated = network.apply(variables, batch, mutable=["batch_stats"])
        return images, updated["batch_stats"]

    def targets(self, batch: GDFQBatch) -> jax.Array:
        """The labels, int32 [N]."""
        return batch.labels
