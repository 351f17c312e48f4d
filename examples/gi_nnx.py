"""Gradient Inundation inside `nnx.Optimizer`: quantization-aware training of a Flax NNX model.

python examples/gi_nnx.py trains a network with 4-bit weights, and prints how many codes change in a
step without Gradient Inundation and with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

IMAGES, LABELS = load_digits(return_X_y=True)
CODES = WeightCodes(bits=4)
FRACTION = 0.01  # T: of every kernel's codes so many are to change in every step
RATE = 1e-4  # too small for most weights to reach a rounding threshold


class QuantizedLinear(nnx.Linear):
    """`nnx.Linear` whose kernel is rounded to 4 bits, straight-through."""

    def __call__(self, x):
        """Float32 [N, in] -> [N, out]."""
        return x @ fake_quant_weight(self.kernel[...], CODES.bits) + self.bias[...]


class Network(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs):
        self.hidden = QuantizedLinear(64, 32, rngs=rngs)
        self.out = QuantizedLinear(32, 10, rngs=rngs)

    def __call__(self, x):
        """Images, float32 [N, 64] -> logits [N, 10]."""
        return self.out(nnx.relu(self.hidden(x)))


def kernels(params):
    """True for kernels. In NNX the name of a parameter need not be the last part of its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.DictKey("kernel") in path, params
    )


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step; returns the share of codes that it changed, of the kernel where it is lowest."""

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    layers = (model.hidden, model.out)
    before = [CODES(layer.kernel[...]) for layer in layers]
    optimizer.update(model, nnx.grad(loss_fn)(model))
    pairs = zip(before, layers)
    return jnp.min(jnp.stack([jnp.mean(CODES(layer.kernel[...]) != old) for old, layer in pairs]))


def train(tx, steps):
    """Returns the optimizer, and the lowest share of codes that each step changed."""
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng, shares = np.random.default_rng(0), []
    for _ in range(steps):
        batch = rng.integers(0, len(LABELS), 256)
        shares.append(train_step(model, optimizer, IMAGES[batch] / 16, LABELS[batch]))
    return optimizer, np.array(shares)


def main(steps=40):
    """Returns the shares of each step, without Gradient Inundation and with it."""
    plain = optax.adamw(RATE)
    inundation = optax.masked(gradient_inundation(FRACTION, CODES), kernels)
    _, without = train(plain, steps)
    optimizer, with_it = train(optax.chain(plain, inundation), steps)
    print(
        f"nnx: {100 * without.min():.2f} to {100 * without.max():.2f} % of the codes change in a "
        f"step, with GI {100 * with_it.min():.2f} to {100 * with_it.max():.2f} %"
    )
    alpha = optax.tree.get(optimizer.opt_state, "alpha")
    print(f"    the last step of the hidden layer was scaled by {alpha['hidden']['kernel'][...]}")
    return {"nnx": (without, with_it)}


if __name__ == "__main__":
    main()
