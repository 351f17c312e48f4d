"""What it takes to train a small teacher: a network, images, preprocessing and settings."""

import flax.linen as nn
import ml_collections
import numpy as np

from ait_jax.data import sources
from ait_jax.teacher import Preprocess
from configs.quickstart import get_config

GREY = Preprocess((0.4,), (0.3,))


class Small(nn.Module):
    """A network that compiles at once."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x))
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


def small_training(**changes):
    """Settings of a training of 12 steps."""
    training = get_config().teacher.training
    training.update({"steps": 12, "batch_size": 8, "flip": True, **changes})
    return ml_collections.FrozenConfigDict(training)


def small_images(n=20):
    """Noise in three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 6, 5, 1), dtype=np.uint8)
    return sources.Images(pixels, np.arange(n, dtype=np.int32) % 3, n)
