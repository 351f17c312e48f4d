"""EfficientNet-Lite: EfficientNet (Tan & Le, ICML 2019) without squeeze-excitation, with ReLU6.

Two kinds share every shape and differ in padding alone: TensorFlow's original, which pads as "SAME"
does, and PyTorch's re-implementation (RangiLyu/EfficientNet-Lite), which pads both sides alike.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ait_jax.models.mobilenet_v2 import InvertedResidual, round_channels

__all__ = ["IMAGE_SIZES", "EfficientNetLite", "stage_blocks"]

# Variant -> usual size of its images.
IMAGE_SIZES = (224, 240, 260, 280, 300)

# Variant -> multipliers of width and depth.
_SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))

# Blocks, output channels, kernel, and stride of the first block, for each stage of variant 0.
_STAGES = (
    (1, 16, 3, 1),
    (2, 24, 3, 2),
    (2, 40, 5, 2),
    (3, 80, 3, 2),
    (3, 112, 5, 1),
    (4, 192, 5, 2),
    (1, 320, 3, 1),
)
_EPSILON = 1e-3


def stage_blocks(variant: int) -> tuple[int, ...]:
    """Blocks in each stage; the first and the last stage do not grow with the variant."""
    depth = _SCALES[variant][1]
    inner = (math.ceil(depth * blocks) for blocks, *_ in _STAGES[1:-1])
    return _STAGES[0][0], *inner, _STAGES[-1][0]


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 to 4.

    Attributes:
        variant: 0 to 4.
        num_classes: width of the logits.
        same: whether convs pad as TensorFlow's "SAME", or `kernel // 2` on each side.
    """

    variant: int
    num_classes: int
    same: bool = True

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
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=_EPSILON
        )
        padding = "SAME" if self.same else 1
        x = nn.Conv(32, (3, 3), 2, padding=padding, use_bias=False, name="stem_conv")(images)
        x = nn.relu6(norm(name="stem_bn")(x))
        width = _SCALES[self.variant][0]
        counts = stage_blocks(self.variant)
        for stage, (_, channels, kernel, stride) in enumerate(_STAGES, start=1):
            for block in range(counts[stage - 1]):
                x = InvertedResidual(
                    round_channels(channels * width),
                    stride=stride if block == 0 else 1,
                    expansion=1 if stage == 1 else 6,
                    expand=stage > 1,
                    kernel=kernel,
                    same=self.same,
                    epsilon=_EPSILON,
                    name=f"stage{stage}_block{block}",
                )(x, train)
        x = nn.Conv(1280, (1, 1), use_bias=False, name="head_conv")(x)
        x = nn.relu6(norm(name="head_bn")(x))
        return nn.Dense(self.num_classes, name="classifier")(jnp.mean(x, axis=(1, 2)))
