"""The U-Net of OTT (`pip install "ott-jax[neural]"`), an NNX module with a table of labels.

It takes times, images and labels, and makes images; here the mean of each of ten channels is the
logit of a class. Each row of the table has a grid of its own.
"""

from digits import DIGITS, train_nnx
from flax import nnx
from jax import numpy as jnp
from ott.neural.networks.velocity_field.unet import UNet

import ait_jax

sizes = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "out_channels": 10}
unet = UNet(shape=(8, 8, 1), attention_resolutions=(), num_classes=1, **sizes, rngs=nnx.Rngs(0))
images = nnx.Sequential(lambda x: (jnp.zeros(len(x)), x, jnp.zeros(len(x), int)), unet)
model = train_nnx(nnx.Sequential(images, lambda y: y.mean((1, 2))))
print(ait_jax.zero_shot_quantize(model, weight_bits=3, activation_bits=4, **DIGITS))
