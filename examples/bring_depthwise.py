"""A ResNeXt of the package jax-resnet (`pip install jax-resnet`), of as many groups as channels.

Its 3x3 convs are depthwise: each output channel's grid covers nine weights.
"""

from functools import partial

from digits import DIGITS, train
from jax_resnet import ResNet, ResNetBottleneckBlock

import ait_jax

block = partial(ResNetBottleneckBlock, groups=16, base_width=4)
model = ResNet(block, stage_sizes=(1, 1), hidden_sizes=(16, 16), n_classes=10)
variables = train(model)
result = ait_jax.zero_shot_quantize(model, variables, weight_bits=3, activation_bits=4, **DIGITS)
print(result)
