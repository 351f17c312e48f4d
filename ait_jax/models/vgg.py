"""VGG-16 (Simonyan & Zisserman, ICLR 2015) with batch norm, for ImageNet and for small images."""

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["STAGES", "VGG16"]

# Convs and their channels, for each stage; a 2x2 max pool follows each.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class _Block(nn.Module):
    """3x3 conv with bias, batch norm, ReLU.

    Attributes:
        features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, C] to [N, H, W, features]."""
        x = nn.Conv(self.features, (3, 3), padding=1, name="conv")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="bn")
        return nn.relu(norm(x))


class VGG16(nn.Module):
    """VGG-16 with batch norm. Its dropout, inactive once trained, is left out.

    Attributes:
        num_classes: width of the logits.
        hidden: width of the two dense layers before the classifier, which see the last stage pixel
            by pixel; 0 for none, and the mean over space instead.
    """

    num_classes: int
    hidden: int = 4096

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
            images: [N, H, W, C], normalised as the weights want it. With dense layers, H and W are
                those the weights were made for: published weights take 224 to 255.
            train: batch statistics in batch norms rather than running ones.

        Returns:
            [N, num_classes].
        """
        x = images
        for stage, (blocks, features) in enumerate(STAGES, start=1):
            for block in range(blocks):
                x = _Block(features, name=f"stage{stage}_block{block}")(x, train)
            x = nn.max_pool(x, (2, 2), (2, 2))
        if self.hidden:
            x = x.reshape(x.shape[0], -1)
            x = nn.relu(nn.Dense(self.hidden, name="dense1")(x))
            x = nn.relu(nn.Dense(self.hidden, name="dense2")(x))
        else:
            x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)
