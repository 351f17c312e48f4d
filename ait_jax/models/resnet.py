"""ResNets for ImageNet (He et al., CVPR 2016, section 4.1)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["STAGES", "ResNet"]

# Depth -> blocks in each of the four stages.
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class _Block(nn.Module):
    """Two 3x3 convs, or a bottleneck of three, and a shortcut: projected where the shape changes.

    Attributes:
        features: output channels.
        stride: of the block.
        bottleneck: 1x1, 3x3, 1x1 with a quarter of the channels inside.
        stride_in_first: whether a bottleneck strides in its first 1x1 conv rather than its 3x3.
    """

    features: int
    stride: int
    bottleneck: bool
    stride_in_first: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps [N, H, W, C] to [N, H / stride, W / stride, features]."""
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )

        def conv_norm(x, features, kernel, stride, index):
            x = nn.Conv(
                features,
                (kernel, kernel),
                stride,
                padding=kernel // 2,
                use_bias=False,
                name=f"conv{index}",
            )(x)
            return norm(name=f"bn{index}")(x)

        if self.bottleneck:
            inner = self.features // 4
            first, second = (self.stride, 1) if self.stride_in_first else (1, self.stride)
            y = nn.relu(conv_norm(x, inner, 1, first, 1))
            y = nn.relu(conv_norm(y, inner, 3, second, 2))
            y = conv_norm(y, self.features, 1, 1, 3)
        else:
            y = nn.relu(conv_norm(x, self.features, 3, self.stride, 1))
            y = conv_norm(y, self.features, 3, 1, 2)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), self.stride, use_bias=False, name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet with a 7x7 stem and four stages.

    Attributes:
        depth: a key of `STAGES`; from 50 on, the blocks are bottlenecks.
        num_classes: width of the logits.
        stride_in_first: where bottlenecks stride: in the 3x3 conv as torchvision's (False), or in
            the first 1x1 as the paper's and pytorchcv's.
    """

    depth: int
    num_classes: int
    stride_in_first: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits.

        Args:
            images: [N, H, W, C], normalised as the weights want it.
            train: batch statistics in batch norms rather than running ones.

        Returns:
            [N, num_classes].
        """
        x = nn.Conv(64, (7, 7), 2, padding=3, use_bias=False, name="stem_conv")(images)
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, name="stem_bn"
        )
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        bottleneck = self.depth >= 50
        for stage, blocks in enumerate(STAGES[self.depth], start=1):
            features = 2 ** (stage + 5) * (4 if bottleneck else 1)
            for block in range(blocks):
                x = _Block(
                    features,
                    stride=2 if stage > 1 and block == 0 else 1,
                    bottleneck=bottleneck,
                    stride_in_first=self.stride_in_first,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        return nn.Dense(self.num_classes, name="classifier")(jnp.mean(x, axis=(1, 2)))
