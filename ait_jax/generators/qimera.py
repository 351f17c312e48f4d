"""Qimera's generator (Choi et al., NeurIPS 2021): some batches are made of superposed labels.

"Qimera: Data-free Quantization with Synthetic Boundary Supporting Samples".
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.errors import UserError
from ait_jax.generators.base import (
    GENERATORS,
    GeneratorContext,
    RegisteredGenerator,
    example_keys,
)
from ait_jax.generators.layers import ConditionalBatchNorm
from ait_jax.generators.trunk import check_image_shape, label_embedding, trunk
from ait_jax.methods.registry import RecipeWords, Setting, integer, number, one_of
from ait_jax.promotion import promoting

__all__ = ["Qimera", "QimeraBatch"]

# The coin must not share random numbers with any example.
_COIN_STREAM = 0x7FFFFFFF


class QimeraBatch(NamedTuple):
    """Random inputs of one batch.

    Attributes:
        latent: float32 [N, M, latent_size], standard normal.
        labels: int32 [N, M], uniform over the classes.
        weights: float32 [N, M], softmax of standard normals.
        superposed: bool [N], the same for the whole batch: if False, only the first of the M
            counts, with weight one.
    """

    latent: jax.Array
    labels: jax.Array
    weights: jax.Array
    superposed: jax.Array


class QimeraNetwork(nn.Module):
    """Normalised label embeddings plus noise, superposed, into GDFQ's trunk.

    Attributes:
        image_shape: (H, W, C), H and W divisible by 4.
        num_classes: rows of the embedding.
        conditional: class-conditional batch norms, the ImageNet form.
        axis_name: the axis over which batch statistics are taken, if any.
        remat: as for `trunk`.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    conditional: bool = False
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, batch: QimeraBatch) -> jax.Array:
        """Images [N, H, W, C]."""
        rows = label_embedding(batch.labels, self.num_classes, batch.latent.shape[-1])
        x = (rows + batch.latent).astype(jnp.float32)
        alone = _normalised(x[:, 0], (1,), None)
        # By slot, over batch and latent together.
        mixed = jnp.einsum("nm,nml->nl", batch.weights, _normalised(x, (0, 2), self.axis_name))
        latent = jnp.where(batch.superposed[:, None], mixed, alone).astype(batch.latent.dtype)
        if not self.conditional:
            return trunk(self, latent, self.image_shape, self.axis_name, remat=self.remat)

        slots = batch.weights.shape[1]
        # A mean over the slots of weight times row: the extra 1 / M is the published code's.
        mixture = _weights(batch, batch.weights / slots)

        def conditional_norm(**kwargs):
            norm = ConditionalBatchNorm(self.num_classes, axis_name=self.axis_name, **kwargs)
            return lambda x: norm(x, batch.labels, mixture.astype(x.dtype))

        return trunk(
            self, latent, self.image_shape, self.axis_name, conditional_norm, remat=self.remat
        )


def _weights(batch: QimeraBatch, superposed: jax.Array) -> jax.Array:
    """The weights [N, M] of a superposed batch, or one for the first label alone."""
    first = jnp.arange(superposed.shape[1])[None] == 0
    return jnp.where(batch.superposed[:, None], superposed, first.astype(superposed.dtype))


def _normalised(x: jax.Array, axes: tuple[int, ...], axis_name: str | None) -> jax.Array:
    """Zero mean and unit variance over axes, and over devices if an axis is named."""
    moments = jnp.stack([jnp.mean(x, axes, keepdims=True), jnp.mean(x * x, axes, keepdims=True)])
    if axis_name is not None:
        moments = jax.lax.pmean(moments, axis_name)
    variance = jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
    return (x - moments[0]) * jax.lax.rsqrt(variance + 1e-5)


class _Published(NamedTuple):
    probability: float
    labels: int
    embedding: str


# By network: the classifier's width, which is the latent's; settings with AIT (Choi et al., CVPR
# 2022, section 5 and appendix); Qimera's own by weight bits, those of 5 for others.
_PUBLISHED: dict[str, tuple[int, _Published, dict[int, _Published]]] = {
    "cifar10_resnet20": (
        64,
        _Published(0.4, 2, "teacher"),
        {4: _Published(0.4, 2, "random"), 5: _Published(0.4, 2, "random")},
    ),
    "cifar100_resnet20": (
        64,
        _Published(0.4, 25, "teacher"),
        {4: _Published(0.4, 10, "teacher"), 5: _Published(0.4, 50, "teacher")},
    ),
    "imagenet_resnet18": (
        512,
        _Published(0.4, 250, "random"),
        {4: _Published(0.4, 500, "random"), 5: _Published(0.4, 100, "random")},
    ),
    "imagenet_resnet50": (
        2048,
        _Published(0.4, 100, "teacher"),
        {4: _Published(0.7, 500, "teacher"), 5: _Published(0.7, 100, "teacher")},
    ),
    "imagenet_mobilenet_v2": (
        1280,
        _Published(0.4, 250, "random"),
        {4: _Published(0.4, 100, "random"), 5: _Published(0.4, 100, "random")},
    ),
}


def _deltas(words: RecipeWords) -> dict[str, Any]:
    """The published settings of a recipe's network."""
    if words.framework != "qimera" or words.network not in _PUBLISHED:
        return {}
    latent_size, chosen, own = _PUBLISHED[words.network]
    if words.method == "baseline":
        chosen = own.get(words.weight_bits, own[5])
    return {
        "generator.latent_size": latent_size,
        "generator.superpose_probability": chosen.probability,
        "generator.superposed_labels": chosen.labels,
        "generator.embedding": chosen.embedding,
    }


@GENERATORS.register(
    "qimera",
    settings={
        "generator.embedding": Setting(
            "teacher",
            one_of(("teacher", "random")),
            "Qimera: where its embedding starts, the classifier's weights or random ones",
        ),
        "generator.superposed_labels": Setting(
            2, integer(1), "Qimera: M, labels of an image in a superposed batch"
        ),
        "generator.superpose_probability": Setting(
            0.4, number(0, 1), "Qimera: p, of a batch being superposed"
        ),
    },
    deltas=_deltas,
)
@dataclasses.dataclass(frozen=True)
class Qimera(RegisteredGenerator):
    """Qimera's generator and sampler; see `generators.base.Generator` for the methods.

    Attributes:
        image_shape: (H, W, C) of the images; H and W must be divisible by 4.
        num_classes: labels are 0 .. num_classes - 1.
        latent_size: width of latent and embedding.
        conditional: class-conditional batch norms (the ImageNet form).
        superposed_labels: M, labels of an image in a superposed batch.
        superpose_probability: p, of a batch being superposed.
        remat: whether gradients compute activations again instead of keeping them.
        embedding: initial label embedding [num_classes, latent_size], or None for a random one. It
            is copied: training the generator does not touch it.
    """

    keys = ("latent_size", "conditional", "superposed_labels", "superpose_probability", "remat")

    image_shape: tuple[int, int, int]
    num_classes: int
    latent_size: int = 64
    conditional: bool = False
    superposed_labels: int = 2
    superpose_probability: float = 0.4
    remat: bool = False
    embedding: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        """Checks the image size and the embedding's shape."""
        check_image_shape(self.image_shape, "qimera", 4)
        shape = (self.num_classes, self.latent_size)
        if self.embedding is not None and jnp.shape(self.embedding) != shape:
            raise UserError(
                f"generator.latent_size = {self.latent_size} is not allowed with "
                f"generator.embedding = 'teacher': the classifier's weights are "
                f"{jnp.shape(self.embedding)} (classes, latent), so it must be "
                f"{jnp.shape(self.embedding)[1]}"
            )

    @classmethod
    def further(cls, section: Any, context: GeneratorContext) -> dict[str, Any]:
        """The classifier's weights, where its embedding starts from them."""
        return {
            "embedding": context.classifier_weights() if section.embedding == "teacher" else None
        }

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables: `params` and `batch_stats`."""
        shape = (1, self.superposed_labels)
        batch = QimeraBatch(
            jnp.zeros((*shape, self.latent_size)),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape),
            jnp.zeros((1,), bool),
        )
        variables = dict(self._network(None).init(key, batch))
        if self.embedding is not None:
            table = jnp.array(self.embedding, jnp.float32)
            variables["params"] = variables["params"] | {"embedding": {"embedding": table}}
        return variables

    def sample(self, key: jax.Array, step: jax.Array, example_ids: jax.Array) -> QimeraBatch:
        """Latents, labels, weights, and the coin of the step."""
        coin_key = jax.random.fold_in(jax.random.fold_in(key, step), _COIN_STREAM)
        coin = jax.random.bernoulli(coin_key, self.superpose_probability)
        slots = self.superposed_labels

        def one(example_key):
            latent_key, label_key, weight_key = jax.random.split(example_key, 3)
            return QimeraBatch(
                latent=jax.random.normal(latent_key, (slots, self.latent_size)),
                labels=jax.random.randint(label_key, (slots,), 0, self.num_classes),
                weights=jax.nn.softmax(jax.random.normal(weight_key, (slots,))),
                superposed=coin,
            )

        return jax.vmap(one)(example_keys(key, step, example_ids))

    def apply(
        self, variables: Any, batch: QimeraBatch, *, axis_name: str | None = None
    ) -> tuple[jax.Array, Any]:
        """Images [N, H, W, C] and the new `batch_stats`."""
        network = self._network(axis_name, remat=self.remat)
        images, updated = promoting(network.apply)(variables, batch, mutable=["batch_stats"])
        return images, updated["batch_stats"]

    def targets(self, batch: QimeraBatch) -> jax.Array:
        """Soft labels, float32 [N, num_classes]; one-hot in a batch that is not superposed."""
        weights = _weights(batch, batch.weights)
        rows = jnp.arange(len(batch.labels))[:, None]
        zeros = jnp.zeros((len(batch.labels), self.num_classes))
        return zeros.at[rows, batch.labels].add(weights)  # A label may be drawn twice.

    # Fresh variables come without `remat`: Flax would draw other random numbers.
    def _network(self, axis_name: str | None, *, remat: bool = False) -> QimeraNetwork:
        return QimeraNetwork(self.image_shape, self.num_classes, self.conditional, axis_name, remat)
