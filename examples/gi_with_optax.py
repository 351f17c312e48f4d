"""Gradient Inundation with optax: AdamW in a partition, Lion, MultiSteps, a schedule for T.

python examples/gi_with_optax.py trains a small network with 4-bit weights by every recipe, and
prints how many codes change in a step without Gradient Inundation and with it.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

IMAGES, LABELS = load_digits(return_X_y=True)
CODES = WeightCodes(bits=4)
FRACTION = 0.01  # T: of every kernel's codes so many are to change in every step
RATE = 1e-4  # too small for most weights to reach a rounding threshold


# Recipes: each returns an optimizer without Gradient Inundation and the same one with it ----------


def kernels(params):
    """True for kernels, False for biases, which have no codes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def adamw_partition():
    """Kernels get AdamW and Gradient Inundation, everything else AdamW alone."""
    adamw = optax.adamw(RATE, weight_decay=0.01)
    groups = {True: optax.chain(adamw, gradient_inundation(FRACTION, CODES)), False: adamw}
    return adamw, optax.partition(groups, kernels)


def lion():
    """Lion moves every weight by its rate; `optax.masked` leaves the biases as Lion wants them."""
    inundation = gradient_inundation(FRACTION, CODES)
    return optax.lion(RATE), optax.chain(optax.lion(RATE), optax.masked(inundation, kernels))


def multi_steps():
    """Gradients of four batches to a step. Inside MultiSteps: it must see the whole step."""
    adam = optax.adam(RATE)
    inundated = optax.chain(adam, optax.masked(gradient_inundation(FRACTION, CODES), kernels))
    return optax.MultiSteps(adam, 4), optax.MultiSteps(inundated, 4)


def scheduled_fraction():
    """T as a hyperparameter: on a schedule here, and in the state for all to see."""

    @optax.inject_hyperparams
    def inundated(learning_rate, fraction):
        inundation = gradient_inundation(fraction, CODES)
        return optax.chain(optax.adam(learning_rate), optax.masked(inundation, kernels))

    falling = optax.linear_schedule(0.03, FRACTION, 20)
    return optax.adam(RATE), inundated(learning_rate=RATE, fraction=falling)


RECIPES = {f.__name__: f for f in (adamw_partition, lion, multi_steps, scheduled_fraction)}


# What they train ----------------------------------------------------------------------------------


def dense(layer, x):
    """A layer whose kernel is rounded to 4 bits, straight-through."""
    return x @ fake_quant_weight(layer["kernel"], CODES.bits) + layer["bias"]


def loss_fn(params, x, y):
    """Cross entropy of a network with one hidden layer."""
    logits = dense(params["out"], jax.nn.relu(dense(params["hidden"], x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx, params, steps):
    """Yields the parameters after each step on a batch of digits."""

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng, state = np.random.default_rng(0), tx.init(params)
    for _ in range(steps):
        batch = rng.integers(0, len(LABELS), 256)
        params, state = step(params, state, IMAGES[batch] / 16, LABELS[batch])
        yield params


@jax.jit
def crossed(old, new):
    """The share of codes that a step changed, of the kernel where it is lowest."""
    pairs = [(old[name]["kernel"], new[name]["kernel"]) for name in old]
    return jnp.min(jnp.stack([jnp.mean(CODES(w) != CODES(v)) for w, v in pairs]))


def main(steps=40):
    """Runs all recipes; returns, by name, the shares of each step, without and with."""
    normal = jax.random.normal
    params = {
        "hidden": {"kernel": normal(jax.random.key(0), (64, 32)) / 8, "bias": jnp.zeros(32)},
        "out": {"kernel": normal(jax.random.key(1), (32, 10)) / 6, "bias": jnp.zeros(10)},
    }
    results = {}
    for name, recipe in RECIPES.items():
        shares = []
        for tx in recipe():
            path = [params, *train(tx, params, steps)]
            # MultiSteps leaves the weights alone while it gathers gradients.
            path = path[:: 4 if name == "multi_steps" else 1]
            shares.append(np.array([crossed(*pair) for pair in itertools.pairwise(path)]))
        results[name] = tuple(shares)
        without, with_it = (f"{100 * s.min():.2f} to {100 * s.max():.2f} %" for s in shares)
        print(f"{name}: {without} of the codes change in a step, with GI {with_it}")
    return results


if __name__ == "__main__":
    main()
