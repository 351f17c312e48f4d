"""A Linen model that looks at its own reconstruction: a transposed conv, and a table of positions.

What enters `nn.Embed` are numbers of places, which cost the generator nothing; each place's row has
a grid of its own.
"""

import flax.linen as nn
import jax.numpy as jnp
from digits import DIGITS, train

import ait_jax


class Reconstructing(nn.Module):
    """Down, up again, and a classifier of both."""

    @nn.compact
    def __call__(self, x, train):
        """Images, float32 [N, 8, 8, 1] -> logits [N, 10]."""
        down = nn.Conv(16, (3, 3), strides=2)(x)
        down = nn.relu(nn.BatchNorm(use_running_average=not train)(down))
        places = nn.Embed(16, 16)(jnp.arange(16)).reshape(4, 4, 16)
        up = nn.relu(nn.ConvTranspose(16, (3, 3), strides=(2, 2))(down + places))
        pooled = [part.mean((1, 2)) for part in (down, up, up * x)]
        return nn.Dense(10)(nn.relu(nn.Dense(32)(jnp.concatenate(pooled, axis=-1))))


model = Reconstructing()
variables = train(model, rate=1e-2, train=True)
result = ait_jax.zero_shot_quantize(
    model, variables, weight_bits=3, activation_bits=4, apply_kwargs={"train": False}, **DIGITS
)
print(result)
