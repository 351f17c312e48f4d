"""What is done to images before the student sees them: flips, shifts, a low-pass, mixup.

The teacher sees the same images, and labels what it sees. Each example has random numbers of its
own, from a key of its own, so that a batch is the same on any number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.methods.registry import Registry, Setting, boolean, integer, number

__all__ = [
    "TRANSFORMS",
    "Transform",
    "flipped",
    "low_passed",
    "mixed",
    "shifted",
    "transform_images",
    "transforms_of_config",
]

# transform(keys [N], images [N, H, W, C], targets [N, classes], everyone) -> (images, targets),
# where `everyone(x)` are the examples of all devices.
Everyone = Callable[[jax.Array], jax.Array]
Transform = Callable[[jax.Array, jax.Array, jax.Array, Everyone], tuple[jax.Array, jax.Array]]

# Each makes, of the config's section `augment`, a transform, or None if it is off.
TRANSFORMS: Registry[Callable[[Any], Transform | None]] = Registry("augment")


def transforms_of_config(section: Any) -> tuple[Transform, ...]:
    """The transforms that are on, in the order in which they were registered.

    Args:
        section: the config's section `augment`.
    """
    made = (factory(section) for factory in TRANSFORMS.values())
    return tuple(transform for transform in made if transform is not None)


def transform_images(
    transforms: Sequence[Transform],
    keys: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Images and targets after all transforms, one after the other.

    Args:
        transforms: may be empty.
        keys: one for each example, [N].
        images: [N, H, W, C].
        targets: probabilities [N, classes].
        axis_name: the axis over which the batch is split, if any.
    """

    def everyone(x):
        return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)

    for i, transform in enumerate(transforms):
        own = jax.vmap(functools.partial(jax.random.fold_in, data=i))(keys)
        images, targets = transform(own, images, targets, everyone)
    return images, targets


def flipped(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Half of the images mirrored, left to right.

    Args:
        keys: one for each example, [N].
        images: [N, H, W, C].
    """
    mirrored = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def shifted(keys: jax.Array, images: jax.Array, most: int, *, mode: str = "edge") -> jax.Array:
    """Images moved by up to some pixels along each axis.

    Args:
        keys: one for each example, [N].
        images: [N, H, W, C].
        most: pixels.
        mode: of `jnp.pad`, for what comes in at the sides; "wrap" moves what goes out there.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)), mode=mode)

    def one(key, image):
        y, x = jax.random.randint(key, (2,), 0, 2 * most + 1)
        return jax.lax.dynamic_slice(image, (y, x, 0), (height, width, image.shape[-1]))

    return jax.vmap(one)(keys, padded)


def low_passed(images: jax.Array, cutoff: float) -> jax.Array:
    """Images without their highest frequencies (SynQ: Kim et al., ICLR 2025, section 4.1).

    Args:
        images: [N, H, W, C].
        cutoff: the standard deviation of the Gaussian in the spectrum, in periods per image.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[1:3]
    rows = jnp.fft.fftfreq(height, 1 / height)[:, None]
    columns = jnp.fft.rfftfreq(width, 1 / width)[None]
    gain = jnp.exp(-(rows**2 + columns**2) / (2 * cutoff**2))[None, :, :, None]
    spectrum = jnp.fft.rfft2(images.astype(jnp.float32), axes=(1, 2)) * gain
    return jnp.fft.irfft2(spectrum, s=(height, width), axes=(1, 2)).astype(images.dtype)


def mixed(
    keys: jax.Array, images: jax.Array, targets: jax.Array, everyone: Everyone, share: float
) -> tuple[jax.Array, jax.Array]:
    """Some of the examples mixed with another one of the batch, in a random proportion.

    Args:
        keys: one for each example, [N].
        images: [N, H, W, C].
        targets: probabilities [N, classes].
        everyone: gives the examples of all devices.
        share: of the examples that are mixed.
    """
    others = everyone(images), everyone(targets)

    def draw(key):
        which, how_much, whether = jax.random.split(key, 3)
        partner = jax.random.randint(which, (), 0, len(others[0]))
        kept = jax.random.uniform(how_much)
        return partner, jnp.where(jax.random.bernoulli(whether, share), kept, 1.0)

    partners, kept = jax.vmap(draw)(keys)

    def mix(x, other):
        own = kept.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
        return own * x + (1 - own) * other[partners]

    return mix(images, others[0]), mix(targets, others[1])


@TRANSFORMS.register(
    "flip",
    settings={
        "augment.flip": Setting(
            False, boolean(), "half of the student's images mirrored; not for digits or text"
        )
    },
)
def _flip(section: Any) -> Transform | None:
    if not section.flip:
        return None
    return lambda keys, images, targets, everyone: (flipped(keys, images), targets)


@TRANSFORMS.register(
    "shift",
    settings={
        "augment.shift": Setting(0, integer(0), "pixels by which the student's images are moved")
    },
)
def _shift(section: Any) -> Transform | None:
    if not section.shift:
        return None
    return lambda keys, images, targets, everyone: (shifted(keys, images, section.shift), targets)


@TRANSFORMS.register(
    "low_pass",
    settings={
        "augment.low_pass": Setting(
            0.0,
            number(0),
            "cutoff of a low-pass on the student's images, periods each; 0: none",
        )
    },
)
def _low_pass(section: Any) -> Transform | None:
    if not section.low_pass:
        return None
    return lambda keys, images, targets, everyone: (low_passed(images, section.low_pass), targets)


@TRANSFORMS.register(
    "mixup",
    settings={"augment.mixup": Setting(0.0, number(0, 1), "share of examples that are mixed")},
)
def _mixup(section: Any) -> Transform | None:
    if not section.mixup:
        return None
    return lambda keys, images, targets, everyone: mixed(
        keys, images, targets, everyone, section.mixup
    )
