"""A ResNet of the package jax-resnet (`pip install jax-resnet`), which calls ReLU as a function.

Activations are quantized after each ReLU, as in the paper.
"""

from digits import DIGITS, train
from jax_resnet import ResNet, ResNetBlock

import ait_jax

model = ResNet(ResNetBlock, stage_sizes=(1, 1), hidden_sizes=(16, 32), n_classes=10)
variables = train(model)
result = ait_jax.zero_shot_quantize(model, variables, weight_bits=2, activation_bits=4, **DIGITS)
print(result)
