"""Gradient Inundation with Equinox (pip install equinox): quantization-aware training of an MLP.

python examples/gi_equinox.py trains a network with 4-bit weights, and prints how many codes change
in a step without Gradient Inundation and with it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

IMAGES, LABELS = load_digits(return_X_y=True)
CODES = WeightCodes(bits=4, channel_axis=0)  # eqx.nn.Linear's weights are [out, in]
FRACTION = 0.01  # T: of every weight matrix's codes so many are to change in every step
RATE = 1e-4  # too small for most weights to reach a rounding threshold


def is_matrix(leaf):
    """True for what is quantized."""
    return eqx.is_inexact_array(leaf) and leaf.ndim == 2


def rounded(model):
    """The model with its matrices rounded, straight-through."""
    return jax.tree.map(
        lambda leaf: fake_quant_weight(leaf, CODES.bits, 0) if is_matrix(leaf) else leaf, model
    )


def train(tx, steps):
    """Returns the share of codes that each step changed, of the matrix where it is lowest."""
    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))

    @eqx.filter_jit
    def step(model, state, x, y):
        def loss_fn(model):
            logits = jax.vmap(rounded(model))(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        grads = eqx.filter_grad(loss_fn)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        new = eqx.apply_updates(model, updates)
        pairs = zip(model.layers, new.layers)
        shares = [jnp.mean(CODES(a.weight) != CODES(b.weight)) for a, b in pairs]
        return new, state, jnp.min(jnp.stack(shares))

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    rng, shares = np.random.default_rng(0), []
    for _ in range(steps):
        batch = rng.integers(0, len(LABELS), 256)
        model, state, share = step(model, state, IMAGES[batch] / 16, LABELS[batch])
        shares.append(share)
    return np.array(shares)


def main(steps=40):
    """Returns the shares of each step, without Gradient Inundation and with it."""
    inundation = optax.masked(
        gradient_inundation(FRACTION, CODES), lambda params: jax.tree.map(is_matrix, params)
    )
    without = train(optax.adam(RATE), steps)
    with_it = train(optax.chain(optax.adam(RATE), inundation), steps)
    print(
        f"equinox: {100 * without.min():.2f} to {100 * without.max():.2f} % of the codes change in "
        f"a step, with GI {100 * with_it.min():.2f} to {100 * with_it.max():.2f} %"
    )
    return {"equinox": (without, with_it)}


if __name__ == "__main__":
    main()
