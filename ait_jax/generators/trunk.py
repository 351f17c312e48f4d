"""What generators share: GDFQ's and Qimera's network between latent and image, and its ends."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.errors import UserError
from ait_jax.generators.layers import TorchConv, TorchDense, UpsampleConv

__all__ = ["check_image_shape", "image_head", "label_embedding", "trunk"]


def check_image_shape(image_shape: tuple[int, int, int], name: str, divisor: int) -> None:
    """Refuses images that whole numbers of doublings cannot make.

    Args:
        image_shape: (H, W, C).
        name: of the generator.
        divisor: of H and of W.

    Raises:
        UserError: naming the size and the generator.
    """
    if image_shape[0] % divisor or image_shape[1] % divisor:
        raise UserError(
            f"teacher.image_shape = {image_shape} is not allowed with generator.name = {name!r}: "
            f"height and width must be divisible by {divisor}"
        )


def label_embedding(labels: jax.Array, num_classes: int, features: int) -> jax.Array:
    """Learned rows for labels, N(0, 1) at first: [..., features]; inside a compact module.

    Args:
        labels: integers [...], below num_classes.
        num_classes: rows there are.
        features: width of a row.
    """
    init = nn.initializers.normal(1.0)
    return nn.Embed(num_classes, features, embedding_init=init, name="embedding")(labels)


def image_head(x: jax.Array, channels: int, axis_name: str | None) -> jax.Array:
    """Features to images [N, H, W, channels]; inside a compact module.

    Args:
        x: [N, H, W, F].
        channels: of the images.
        axis_name: the axis over which batch statistics are taken, if any.
    """
    x = jnp.tanh(TorchConv(channels, name="to_image")(x))
    return nn.BatchNorm(
        use_running_average=False,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        use_scale=False,
        use_bias=False,
        name="image_bn",
    )(x)


def trunk(
    module: nn.Module,
    x: jax.Array,
    image_shape: tuple[int, int, int],
    axis_name: str | None,
    conditional_norm: Callable[..., Callable[[jax.Array], jax.Array]] | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """Latents to images; to be called inside a compact module, whose submodules it makes.

    Args:
        module: the compact module.
        x: [N, latent_size].
        image_shape: (H, W, C), H and W divisible by 4.
        axis_name: the axis over which batch statistics are taken, if any.
        conditional_norm: makes the three inner batch norms, from `name` and `epsilon`, where they
            are not plain ones.
        remat: whether the gradient computes each of the four blocks again, keeping nothing but what
            enters it.

    Returns:
        Images [N, H, W, C], in the teacher's normalised space.
    """
    height, width, channels = image_shape
    norm = conditional_norm or functools.partial(
        nn.BatchNorm, use_running_average=False, momentum=0.9, axis_name=axis_name
    )
    leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)

    def stem(_, x):
        x = TorchDense(height // 4 * (width // 4) * 128, name="stem")(x)
        return norm(name="stem_bn", epsilon=1e-5)(x.reshape(-1, height // 4, width // 4, 128))

    # The eps of 0.8 is the published one (a misplaced argument there), and part of the recipe.
    def first(_, x):
        return leaky_relu(norm(name="bn1", epsilon=0.8)(UpsampleConv(128, name="up1")(x)))

    def second(_, x):
        return leaky_relu(norm(name="bn2", epsilon=0.8)(UpsampleConv(64, name="up2")(x)))

    def head(_, x):
        return image_head(x, channels, axis_name)

    for block in (stem, first, second, head):
        x = (nn.remat(block) if remat else block)(module, x)
    return x
