"""ResNets for small images (He et al., CVPR 2016, section 4.2)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["CifarResNet"]

_conv3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convs and a shortcut.

    Attributes:
        features: output channels.
        stride: of the first conv.
        shortcut: where the shape changes, `"A"` subsamples and pads channels with zeros on both
            sides, `"B"` projects by a 1x1 conv and batch norm.
    """

    features: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, features]."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = _conv3(self.features, strides=self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = norm(name="bn2")(_conv3(self.features, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == "A":
                pad = (self.features - x.shape[-1]) // 2
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (pad, self.features - x.shape[-1] - pad)))
            else:
                x = nn.Conv(
                    self.features, (1, 1), self.stride, use_bias=False, name="shortcut_conv"
                )(x)
                x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet with three stages of 16, 32 and 64 channels.

    Attributes:
        depth: 6n + 2 (8, 20, 32, 44, 56, ...).
        num_classes: width of the logits.
        shortcut: `"A"` or `"B"`, see `BasicBlock`.
    """

    depth: int
    num_classes: int
    shortcut: str = "A"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
            images: [N, H, W, C], normalised as the weights want it.
            train: batch statistics in batch norms rather than running ones.

        Returns:
            [N, num_classes].
        """
        x = _conv3(16, name="stem_conv")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_bn")(x))
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and block == 0 else 1
                name = f"stage{stage}_block{block}"
                x = BasicBlock(features, stride, self.shortcut, name=name)(x, train)
        return nn.Dense(self.num_classes, name="classifier")(jnp.mean(x, axis=(1, 2)))
