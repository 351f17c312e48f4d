"""MobileNetV2 (Sandler et al., CVPR 2018)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["STAGES", "InvertedResidual", "MobileNetV2", "round_channels"]

# Blocks, output channels, and stride of the first block, for each stage (table 2).
STAGES = (
    (1, 16, 1),
    (2, 24, 2),
    (3, 32, 2),
    (4, 64, 2),
    (3, 96, 1),
    (3, 160, 2),
    (1, 320, 1),
)


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and not less than 90 % of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise conv, and 1x1 projection without activation (linear bottleneck).

    Attributes:
        features: output channels.
        stride: of the depthwise conv.
        expansion: channels inside for each input channel.
        expand: whether there is an expansion conv.
        kernel: size of the depthwise conv.
        same: TensorFlow's padding, which for a stride of 2 depends on the size, rather than
            `kernel // 2` on each side as in PyTorch.
        epsilon: of the batch norms.
    """

    features: int
    stride: int
    expansion: int
    expand: bool = True
    kernel: int = 3
    same: bool = False
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, features]."""
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=self.epsilon
        )
        inner = x.shape[-1] * self.expansion
        y = x
        if self.expand:
            y = nn.Conv(inner, (1, 1), use_bias=False, name="expand_conv")(y)
            y = nn.relu6(norm(name="expand_bn")(y))
        y = nn.Conv(
            inner,
            (self.kernel, self.kernel),
            self.stride,
            padding="SAME" if self.same else self.kernel // 2,
            feature_group_count=inner,
            use_bias=False,
            name="depthwise_conv",
        )(y)
        y = nn.relu6(norm(name="depthwise_bn")(y))
        y = nn.Conv(self.features, (1, 1), use_bias=False, name="project_conv")(y)
        y = norm(name="project_bn")(y)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNetV2 as torchvision's, or as pytorchcv's.

    Attributes:
        num_classes: width of the logits.
        width: multiplies all channels but the logits; the last conv never has less than 1280.
        cv: pytorchcv's: the first block keeps its 1x1 conv though it does not expand, the
            classifier is a 1x1 conv without bias, and channels are cut, not rounded to eights.
    """

    num_classes: int
    width: float = 1.0
    cv: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
            images: [N, H, W, C], normalised as the weights want it.
            train: batch statistics in batch norms rather than running ones.

        Returns:
            [N, num_classes].
        """
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        scale = int if self.cv else round_channels
        x = nn.Conv(scale(32 * self.width), (3, 3), 2, padding=1, use_bias=False, name="stem_conv")(
            images
        )
        x = nn.relu6(norm(name="stem_bn")(x))
        for stage, (blocks, channels, stride) in enumerate(STAGES, start=1):
            for block in range(blocks):
                x = InvertedResidual(
                    scale(channels * self.width),
                    stride=stride if block == 0 else 1,
                    expansion=1 if stage == 1 else 6,
                    expand=stage > 1 or self.cv,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        last = scale(1280 * max(1.0, self.width))
        x = nn.relu6(
            norm(name="head_bn")(nn.Conv(last, (1, 1), use_bias=False, name="head_conv")(x))
        )
        if self.cv:
            x = jnp.mean(x, axis=(1, 2), keepdims=True)
            x = nn.Conv(self.num_classes, (1, 1), use_bias=False, name="classifier")(x)
            return x.reshape(x.shape[0], self.num_classes)
        return nn.Dense(self.num_classes, name="classifier")(jnp.mean(x, axis=(1, 2)))
