"""Quantization-aware training of a small transformer on text, with Gradient Inundation.

python examples/gi_text_transformer.py trains a character-level language model on optax's
docstrings, rounds its weights to 3 bits, and goes on training with them rounded: without Gradient
Inundation and with it.
"""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

CODES = WeightCodes(bits=3)
FRACTION = 0.002  # T: of every kernel's codes so many are to change in every step
LENGTH, BATCH, WIDTH = 32, 16, 64


class Transformer(nn.Module):
    """A transformer before anyone thought of quantizing it."""

    characters: int

    @nn.compact
    def __call__(self, text):
        """Predicts each next character: int32 [N, L] -> logits [N, L, characters]."""
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        x = nn.Embed(self.characters, WIDTH)(text) + positions
        mask = nn.make_causal_mask(text)
        for _ in range(2):
            x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
            x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(self.characters)(nn.LayerNorm()(x))


def read_text():
    """Text that every user of optax has: codes of its characters, and how many there are."""
    text = "\n".join(inspect.getdoc(f) or "" for _, f in sorted(vars(optax).items()) if callable(f))
    characters, codes = np.unique(list(text), return_inverse=True)
    return codes.astype(np.int32), len(characters)


def kernels(params):
    """True for the tensors to quantize: every kernel, no embedding, bias or scale."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def rounded(params):
    """The parameters with fake-quantized kernels, straight-through."""
    return jax.tree.map(
        lambda w, is_kernel: fake_quant_weight(w, CODES.bits) if is_kernel else w,
        params,
        kernels(params),
    )


def smallest_share(old, new):
    """The share of codes that a step changed, of the kernel where it is lowest."""
    pairs = zip(*map(jax.tree.leaves, (old, new, kernels(old))))
    shares = [jnp.mean(CODES(w) != CODES(v)) for w, v, is_kernel in pairs if is_kernel]
    return jnp.min(jnp.stack(shares))


def train(model, tx, params, text, steps, quantize):
    """Returns the parameters, and for each step its loss and the lowest share of codes changed."""

    def loss_fn(params, batch):
        logits = model.apply({"params": quantize(params)}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        return new, state, (loss, smallest_share(params, new))

    rng, state, rows = np.random.default_rng(0), tx.init(params), []
    for _ in range(steps):
        starts = rng.integers(0, len(text) - LENGTH, BATCH)
        batch = text[starts[:, None] + np.arange(LENGTH + 1)]
        params, state, row = step(params, state, batch)
        rows.append(row)
    losses, shares = np.array(rows).T
    return params, losses, shares


def main(steps=60, float_steps=200):
    """Returns the lowest share of codes that each step changed, without and with."""
    text, characters = read_text()
    model = Transformer(characters)
    params = jax.jit(model.init)(jax.random.key(0), text[None, :LENGTH])["params"]
    params, losses, _ = train(model, optax.adamw(3e-3), params, text, float_steps, lambda p: p)
    print(f"float: loss {losses[-20:].mean():.3f}")

    plain = optax.adamw(1e-4)
    inundated = optax.chain(plain, optax.masked(gradient_inundation(FRACTION, CODES), kernels))
    results = []
    for name, tx in [("without", plain), ("with", inundated)]:
        _, losses, shares = train(model, tx, params, text, steps, rounded)
        low, high = 100 * shares.min(), 100 * shares.max()
        print(
            f"transformer, {name} GI: {low:.2f} to {high:.2f} % of the codes change in a step, "
            f"loss {losses[-20:].mean():.3f}"
        )
        results.append(shares)
    return {"transformer": tuple(results)}


if __name__ == "__main__":
    main()
