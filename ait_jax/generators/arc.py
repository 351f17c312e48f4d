"""ARC's generator (Zhu et al., "AutoReCon", IJCAI 2021): three searched cells."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.errors import UserError
from ait_jax.generators.base import GENERATORS
from ait_jax.generators.gdfq import GDFQ, GDFQBatch
from ait_jax.generators.genotypes import GENOTYPES, Genotype
from ait_jax.generators.layers import ConditionalBatchNorm, TorchConv, TorchDense
from ait_jax.generators.trunk import check_image_shape, image_head
from ait_jax.methods.registry import RecipeWords, Setting, one_of

__all__ = ["ARC"]

_FEATURES = 64


def _doubled(x: jax.Array, method: str) -> jax.Array:
    n, height, width, channels = x.shape
    return jax.image.resize(x, (n, 2 * height, 2 * width, channels), method)


class _NormActConv(nn.Module):
    """Conditional batch norm, leaky ReLU, conv."""

    num_classes: int
    size: int
    dilation: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        norm = ConditionalBatchNorm(self.num_classes, axis_name=self.axis_name, name="norm")
        x = nn.leaky_relu(norm(x, labels), 0.2)
        return TorchConv(_FEATURES, self.size, self.dilation, name="conv")(x)


class _Cell(nn.Module):
    """One cell: [N, H, W, 64] to [N, 2H, 2W, 64]."""

    up: str
    ops: tuple[str, ...]
    cross: str
    num_classes: int
    axis_name: str | None
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, before: list[jax.Array], labels: jax.Array) -> list[jax.Array]:
        norm_act_conv = nn.remat(_NormActConv) if self.remat else _NormActConv

        def part(size, dilation, name):
            module = norm_act_conv(self.num_classes, size, dilation, self.axis_name, name=name)
            return lambda x: module(x, labels)

        def up(x, kind, name):
            if kind == "N":
                # Copies have the statistics of what they are copies of, and a 1x1 conv sees no
                # neighbours: the same numbers, at a quarter of the work.
                return _doubled(part(1, 1, name)(x), "nearest")
            return part(1, 1, name)(_doubled(x, "bilinear"))

        def op(x, i):
            kind = self.ops[i]
            if kind == "skip":
                return x
            return part(int(kind[1:]), 2 if kind[0] == "d" else 1, f"op{i}")(x)

        def total(ends):
            # An edge of kind "none" does not exist.
            terms = [op(nodes[node], i) for node, i in ends if self.ops[i] != "none"]
            first = 3 * (len(nodes) - 2)
            for i, kind in list(enumerate(self.cross))[first : first + 3]:
                if kind != "0":
                    terms.append(up(before[i - first], kind, f"cross{i}"))
            if not terms:
                raise ValueError(f"node {len(nodes)} of a cell has no inputs: {self.ops}")
            return sum(terms[1:], terms[0])

        nodes = [up(x, kind, f"up{i}") for i, kind in enumerate(self.up)]
        nodes.append(total(((0, 0), (1, 1))))
        nodes.append(total(((0, 2), (1, 3), (2, 4))))
        return nodes


class ARCNetwork(nn.Module):
    """Three cells, fed by three parts of the latent.

    Attributes:
        image_shape: (H, W, C), H and W divisible by 8.
        num_classes: rows of the conditional batch norms' tables. (The published tables have 1,000
            rows everywhere; rows without a class never learn.)
        genotype: the edges.
        axis_name: the axis over which batch statistics are taken, if any.
        remat: whether the gradient computes every edge again, keeping nothing but what enters it.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    genotype: Genotype
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, batch: GDFQBatch) -> jax.Array:
        """Images [N, H, W, C]."""
        height, width, channels = self.image_shape
        third = batch.latent.shape[-1] // 3
        parts = jnp.split(batch.latent, np.array([third, 2 * third]), axis=-1)  # 33, 33, 34 of 100
        labels = batch.labels[:, None]
        x, nodes = jnp.zeros(()), list[jax.Array]()
        for i, (part, scale) in enumerate(zip(parts, (8, 4, 2))):
            h, w = height // scale, width // scale
            dense = TorchDense(h * w * _FEATURES, name=f"latent{i}")(part)
            x = x + dense.reshape(-1, h, w, _FEATURES)
            nodes = _Cell(
                up=self.genotype.up[i],
                ops=self.genotype.ops[i],
                cross=self.genotype.cross[i - 1] if i else "",
                num_classes=self.num_classes,
                axis_name=self.axis_name,
                remat=self.remat,
                name=f"cell{i}",
            )(x, nodes, labels)
            x = nodes[-1]
        norm = ConditionalBatchNorm(self.num_classes, axis_name=self.axis_name, name="head_norm")
        x = nn.leaky_relu(norm(x, labels), 0.2)
        return image_head(x, channels, self.axis_name)


# On a CPU its generator costs about four times GDFQ's: fewer steps, the schedule in proportion.
_SHORTER = {
    "train.steps": 300,
    "train.eval_every": 100,
    "schedule.boundaries": (310, 410),
}


def _deltas(words: RecipeWords) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if words.network in GENOTYPES:
        found["generator.genotype"] = words.network
    if words.framework == "arc" and words.budget == "cpu" and words.network.startswith("cifar"):
        found |= _SHORTER
    return found


@GENERATORS.register(
    "arc",
    settings={
        "generator.genotype": Setting(
            "cifar10_resnet20", one_of(GENOTYPES), "ARC: the searched cells"
        ),
    },
    deltas=_deltas,
)
@dataclasses.dataclass(frozen=True)
class ARC(GDFQ):
    """ARC's generator; samples like GDFQ's. See `generators.base.Generator` for the methods.

    Attributes:
        image_shape: (H, W, C) of the images; H and W must be divisible by 8.
        num_classes: labels are 0 .. num_classes - 1.
        latent_size: width of the latent vector, at least 3.
        conditional: GDFQ's; makes no difference here.
        remat: whether gradients compute activations again instead of keeping them.
        genotype: a key of `GENOTYPES`.
    """

    keys = ("latent_size", "remat", "genotype")

    genotype: str = "cifar10_resnet20"

    def __post_init__(self):
        """Checks image size, latent size and genotype."""
        check_image_shape(self.image_shape, "arc", 8)
        if self.latent_size < 3:
            raise UserError(
                f"generator.latent_size = {self.latent_size} is not allowed with generator.name = "
                "'arc': three cells share it, so it must be at least 3"
            )
        if self.genotype not in GENOTYPES:
            raise UserError(
                f"generator.genotype = {self.genotype!r} is not allowed: it must be one of "
                f"{', '.join(GENOTYPES)}"
            )

    def _network(self, axis_name: str | None, *, remat: bool = False) -> Any:
        genotype = GENOTYPES[self.genotype]
        return ARCNetwork(self.image_shape, self.num_classes, genotype, axis_name, remat)
