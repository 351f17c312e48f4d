"""Trains a teacher on real data, where the user has none trained (the quickstart)."""

import logging
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from ait_jax import data, losses
from ait_jax.metrics import Progress
from ait_jax.teacher import Preprocess, build_teacher_model, save_variables

__all__ = ["ensure_teacher", "train_teacher"]

logger = logging.getLogger(__name__)


def _shifted(key: jax.Array, images: jax.Array) -> jax.Array:
    """Images moved by up to an eighth of their size, edges repeated: [N, H, W, C]."""
    height, width = images.shape[1:3]
    reach = max(1, min(height, width) // 8)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)

    def crop(image, offset):
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    return jax.vmap(crop)(padded, offsets)


def train_teacher(
    model: nn.Module,
    images: data.Images,
    preprocess: Preprocess,
    training: ml_collections.ConfigDict,
    seed: int,
) -> Any:
    """Trains from scratch: SGD with Nesterov momentum, cosine rate, small random shifts.

    Args:
        model: a Linen classifier; `__call__(images, train)`.
        images: the training data, all of it in this process.
        preprocess: what the network shall expect.
        training: `steps`, `batch_size`, `learning_rate`, `weight_decay`.
        seed: of initial weights and order.

    Returns:
        `params` and `batch_stats`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    # Uncommitted numpy inputs would travel to the device at every step.
    pixels, labels = jnp.asarray(images.images), jnp.asarray(images.labels)
    variables = model.init(init_key, preprocess(pixels[:1]))
    warmup = training.steps // 10
    rate = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, warmup, max(training.steps, warmup + 1)
    )
    tx = optax.chain(
        optax.add_decayed_weights(training.weight_decay),
        optax.sgd(rate, momentum=0.9, nesterov=True),
    )

    @jax.jit
    def step(variables, opt_state, index):
        key = jax.random.fold_in(run_key, index)
        choice_key, shift_key = jax.random.split(key)
        chosen = jax.random.randint(choice_key, (training.batch_size,), 0, len(labels))
        batch = preprocess(_shifted(shift_key, pixels[chosen]))

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                batch,
                train=True,
                mutable=["batch_stats"],
            )
            return losses.cross_entropy(logits, labels[chosen]), updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, opt_state, loss

    opt_state = tx.init(variables["params"])
    log_every = max(1, training.steps // 4)
    progress = Progress("teacher", total=training.steps, log_every=log_every)
    for index in range(training.steps):
        variables, opt_state, loss = step(variables, opt_state, index)
        progress.update(index + 1, {"loss": float(loss)})
    progress.close()
    return jax.device_get(variables)


def ensure_teacher(config: ml_collections.ConfigDict, path: Path) -> Path:
    """Trains the config's teacher on the train split of `data.name`, unless `path` exists.

    Args:
        config: with `teacher.weights = "train"`.
        path: of the safetensors file to write.

    Returns:
        `path`.

    Raises:
        DataError: if the data is missing or does not fit.
    """
    if path.exists():
        return path
    shape = tuple(config.teacher.image_shape)
    wanted = config.teacher.preprocess
    fit = data.Fit(shape, wanted.resize, wanted.interpolation)
    images = data.load_images(config.data.name, config.data.dir, "train", fit=fit)
    logger.info("training a teacher on %d images of %s", images.total, config.data.name)
    start = time.perf_counter()
    model, _ = build_teacher_model(config)
    preprocess = Preprocess(tuple(config.teacher.mean), tuple(config.teacher.std))
    variables = train_teacher(model, images, preprocess, config.teacher.training, config.seed)
    save_variables(variables, path)
    logger.info("trained in %.0f s, kept in %s", time.perf_counter() - start, path)
    return path
