"""A Flax NNX model as its tutorials write them, with batch norms and dropout.

The module is left as it is; what is quantized is a copy in inference mode (`model.eval()`).
"""

from digits import DIGITS, train_nnx
from flax import nnx

import ait_jax


class CNN(nnx.Module):
    """Two convs, two dense layers."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, rngs=rngs)
        self.hidden = nnx.Linear(512, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Images, float32 [N, 8, 8, 1] -> logits [N, 10]."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.head(self.dropout(x))


model = train_nnx(CNN(nnx.Rngs(0)))
result = ait_jax.zero_shot_quantize(model, weight_bits=2, activation_bits=4, **DIGITS)
print(result)
