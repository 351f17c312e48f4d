"""Gradient Inundation on codes of your own: symmetric int8 for each tensor, and float8.

python examples/gi_own_codes.py trains a linear classifier in both number formats, and prints how
many codes change in a step without Gradient Inundation and with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation

IMAGES, LABELS = load_digits(return_X_y=True)
FRACTION = 0.05  # T: so many of the codes are to change in every step
RATE = 1e-5  # too small for most weights to reach a rounding threshold


# Number formats: each a map to codes, and the values that they stand for --------------------------


def int8_codes(w):
    """Symmetric around zero, one scale for the whole tensor."""
    return jnp.round(w * (127 / jnp.max(jnp.abs(w)))).astype(jnp.int8)


def int8_values(w):
    """The weights that int8 kernels compute with."""
    return int8_codes(w) * (jnp.max(jnp.abs(w)) / 127)


def float8_codes(w):
    """The bits of the nearest float8: any integers will do, they are only compared."""
    return jax.lax.bitcast_convert_type(w.astype(jnp.float8_e4m3fn), jnp.uint8)


def float8_values(w):
    """The weights that float8 kernels compute with."""
    return w.astype(jnp.float8_e4m3fn).astype(w.dtype)


FORMATS = {"int8": (int8_codes, int8_values), "float8": (float8_codes, float8_values)}


# Quantization-aware training ----------------------------------------------------------------------


def train(tx, w, codes, values, steps):
    """Trains on all digits; returns the weights, and the share of codes that each step changed."""

    def loss_fn(w):
        # Straight-through: computed with the rounded weights, differentiated as if not rounded.
        rounded = w + jax.lax.stop_gradient(values(w) - w)
        logits = IMAGES / 16 @ rounded
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
        new = optax.apply_updates(w, updates)
        return new, state, jnp.mean(codes(new) != codes(w))

    state, shares = tx.init(w), []
    for _ in range(steps):
        w, state, share = step(w, state)
        shares.append(share)
    return w, np.array(shares)


def main(steps=40):
    """Trains in each format; returns, by name, the shares of each step, without and with."""
    w = jax.random.normal(jax.random.key(0), (64, 10)) / 8
    w, _ = train(optax.adam(1e-2), w, float8_codes, lambda w: w, 100)
    results = {}
    for name, (codes, values) in FORMATS.items():
        plain = optax.adam(RATE)
        inundated = optax.chain(optax.adam(RATE), gradient_inundation(FRACTION, codes))
        shares = [train(tx, w, codes, values, steps)[1] for tx in (plain, inundated)]
        results[name] = tuple(shares)
        without, with_it = (f"{100 * s.min():.2f} to {100 * s.max():.2f} %" for s in shares)
        print(f"{name}: {without} of the codes change in a step, with GI {with_it}")
    return results


if __name__ == "__main__":
    main()
