"""What the examples `bring_*.py` share: handwritten digits, and a teacher trained on them.

The 1,797 real images that ship with scikit-learn: 1,347 to train a teacher with, 450 to measure
accuracy on. The quantization sees none of the former.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from ait_jax.run.xla_setup import choose_cpu_convolutions

choose_cpu_convolutions()  # The faster ones of XLA on CPU; as the program does.
logging.basicConfig(format="%(message)s")  # jax-models would let everyone speak.

STEPS = 400  # of a teacher's training
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = ((IMAGES.reshape(-1, 8, 8, 1) / 16 - 0.3) / 0.38).astype(np.float32)
ORDER = np.random.default_rng(0).permutation(len(LABELS))
TRAIN, TEST = ((IMAGES[part], LABELS[part]) for part in (ORDER[:1347], ORDER[1347:]))
DIGITS = {
    "image_shape": (8, 8, 1),
    "num_classes": 10,
    "evaluation": TEST,
    "recipe": "paper",
    "settings": {"train.warmup_steps": 100, "train.steps": 200},
}


def _loss(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = rng.choice(len(TRAIN[1]), 64, replace=False)
        yield tuple(part[chosen] for part in TRAIN)


def train(model, rate=3e-3, **kwargs):
    """Trains a Linen model; returns its variables.

    Args:
        model: of images [N, 8, 8, 1].
        rate: of AdamW at the start, falling to 0.
        **kwargs: what the model takes beside images, in training.
    """
    tx = optax.adamw(optax.cosine_decay_schedule(rate, STEPS), weight_decay=1e-3)
    variables = dict(model.init(jax.random.key(0), IMAGES[:1], **kwargs))
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, images, labels):
        def loss(params):
            logits, updated = model.apply(
                variables | {"params": params}, images, mutable=["batch_stats"], **kwargs
            )
            return _loss(logits, labels), updated

        (_, updated), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return variables | dict(updated) | {"params": params}, opt_state

    for images, labels in _batches():
        variables, opt_state = step(variables, opt_state, images, labels)
    return variables


def train_nnx(model, rate=3e-3):
    """Trains an NNX model in place, and returns it."""
    tx = optax.adamw(optax.cosine_decay_schedule(rate, STEPS), weight_decay=1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        optimizer.update(model, nnx.grad(lambda m: _loss(m(images), labels))(model))

    for images, labels in _batches():
        step(model, optimizer, jnp.asarray(images), jnp.asarray(labels))
    return model
