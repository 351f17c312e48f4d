"""Gradient Inundation without any neural network library: parameters in a dict, jax and optax.

python examples/gi_plain_params.py trains a network with 4-bit weights, and prints how many codes
change in a step without Gradient Inundation and with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

IMAGES, LABELS = load_digits(return_X_y=True)
CODES = WeightCodes(bits=4)
FRACTION = 0.01  # T: of every matrix's codes so many are to change in every step


def loss_fn(params, x, y):
    """Cross entropy of a network with one hidden layer and rounded weights."""
    hidden = jax.nn.relu(x @ fake_quant_weight(params["w1"], CODES.bits) + params["b1"])
    logits = hidden @ fake_quant_weight(params["w2"], CODES.bits) + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def matrices(params):
    """True for what is quantized, here everything of rank 2."""
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, params)


# Last in the chain: it has to see the step that is really applied, rate and momentum included.
PLAIN = optax.sgd(1e-3, momentum=0.9, nesterov=True)
INUNDATED = optax.chain(PLAIN, optax.masked(gradient_inundation(FRACTION, CODES), matrices))


def train(tx, steps):
    """Returns the share of codes that each step changed, of the matrix where it is lowest."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        shares = [jnp.mean(CODES(new[name]) != CODES(params[name])) for name in ("w1", "w2")]
        return new, state, jnp.min(jnp.stack(shares))

    rng, state, shares = np.random.default_rng(0), tx.init(params), []
    for _ in range(steps):
        batch = rng.integers(0, len(LABELS), 256)
        params, state, share = step(params, state, IMAGES[batch] / 16, LABELS[batch])
        shares.append(share)
    return np.array(shares)


def main(steps=40):
    """Returns the shares of each step, without Gradient Inundation and with it."""
    without, with_it = train(PLAIN, steps), train(INUNDATED, steps)
    print(
        f"dict: {100 * without.min():.2f} to {100 * without.max():.2f} % of the codes change in a "
        f"step, with GI {100 * with_it.min():.2f} to {100 * with_it.max():.2f} %"
    )
    return {"dict": (without, with_it)}


if __name__ == "__main__":
    main()
