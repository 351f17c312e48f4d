"""Trains a teacher on real data, where the user has none trained."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils

from ait_jax import parallel
from ait_jax.convert.weights import save_variables
from ait_jax.data import evaluator, sources
from ait_jax.errors import UserError
from ait_jax.methods import losses
from ait_jax.promotion import promoting
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.run.interruption import check_stop
from ait_jax.run.metrics import Progress
from ait_jax.teacher import Preprocess, build_teacher_model, preprocess_of_config

__all__ = [
    "TrainingState",
    "ensure_teacher",
    "load_checked",
    "train_and_save",
    "train_teacher",
    "training_images",
]

logger = logging.getLogger(__name__)

_SAVES = 20  # Checkpoints of a training: what an interruption costs is one part in so many.
_LOG_STEPS = 500  # At most so many between two lines of the log.
_DRAWN = 128  # Steps whose images are drawn in one computation.


class TrainingState(NamedTuple):
    """All that resumes.

    Attributes:
        variables: `params` and `batch_stats`.
        opt_state: of the optimizer.
        step: int32 []: steps done.
    """

    variables: Any
    opt_state: Any
    step: jax.Array


def _draw_keys(run_key: jax.Array, step: Any) -> jax.Array:
    """Keys of a step: which images, how they are moved, whether they are mirrored."""
    return jax.random.split(jax.random.fold_in(run_key, step), 3)


def _choices(run_key: jax.Array, steps: range, batch_size: int, total: int) -> Iterator[np.ndarray]:
    """Indices of each step's images, of the global batch: int32 [batch_size]."""

    @jax.jit
    @jax.vmap
    def draw(step):
        return jax.random.randint(_draw_keys(run_key, step)[0], (batch_size,), 0, total)

    for start in range(steps.start, steps.stop, _DRAWN):
        drawn = np.asarray(draw(np.arange(start, start + _DRAWN)))
        yield from drawn[: steps.stop - start]


def _augmented(
    keys: jax.Array, images: jax.Array, ids: jax.Array, batch_size: int, *, flip: bool
) -> jax.Array:
    """Images moved by up to an eighth of their size, edges repeated, half of them mirrored.

    Args:
        keys: those of `_draw_keys`.
        images: uint8 [N, H, W, C].
        ids: int32 [N], their places in the global batch.
        batch_size: global.
        flip: whether to mirror.

    Returns:
        uint8 [N, H, W, C].
    """
    height, width = images.shape[1:3]
    reach = max(1, min(height, width) // 8)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    # Drawn for the global batch, so that any number of devices moves an image alike.
    offsets = jax.random.randint(keys[1], (batch_size, 2), 0, 2 * reach + 1)[ids]

    def crop(image, offset):
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    moved = jax.vmap(crop)(padded, offsets)
    if not flip:
        return moved
    mirrored = jax.random.bernoulli(keys[2], shape=(batch_size,))[ids]
    return jnp.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)


def _over_all_devices(next_fun, args, kwargs, context):
    """Interceptor for `nn.intercept_methods`: batch norms see the global batch."""
    is_norm = isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"
    if is_norm and jax.device_count() > 1:
        # Models know nothing of axes, and a module's attributes are frozen once it is bound.
        object.__setattr__(context.module, "axis_name", parallel.BATCH_AXIS)
    return next_fun(*args, **kwargs)


def train_teacher(
    model: nn.Module,
    images: sources.Images,
    preprocess: Preprocess,
    training: ml_collections.ConfigDict,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> Any:
    """Trains from scratch: SGD with Nesterov momentum, cosine rate, small random shifts.

    Images stay on the host; each step's travel to the devices. All devices share a batch, and give
    the same run as one does, up to the order of float sums.

    Args:
        model: a Linen classifier; `__call__(images, train)`.
        images: the training data, all of it within reach of this process.
        preprocess: what the network shall expect.
        training: `config.teacher.training`.
        seed: of initial weights and order.
        checkpoints: where to save on the way, and to resume from what is there; None: nowhere.

    Returns:
        `params` and `batch_stats`.

    Raises:
        UserError: if the batch does not divide over the devices, or the loss is not finite.
        DataError: if an image that is not kept cannot be decoded.
    """
    batch_size, steps = training.batch_size, training.steps
    parallel.check_divisible(batch_size, "teacher.training.batch_size")
    ids = parallel.global_example_ids(batch_size)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = jax.jit(model.init)(init_key, jnp.zeros((1, *images.images.shape[1:])))
    warmup = steps // 10
    rate = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, warmup, max(steps, warmup + 1)
    )
    tx = optax.chain(
        optax.add_decayed_weights(training.weight_decay),
        optax.sgd(promoting(rate), momentum=0.9, nesterov=True),
    )

    def step(state, run_key, ids, pixels, labels):
        keys = _draw_keys(run_key, state.step)
        batch = preprocess(_augmented(keys, pixels, ids, batch_size, flip=training.flip))

        def loss_fn(params):
            with nn.intercept_methods(_over_all_devices):
                logits, updated = model.apply(
                    {"params": params, "batch_stats": state.variables["batch_stats"]},
                    batch,
                    train=True,
                    mutable=["batch_stats"],
                )
            return losses.cross_entropy(logits, labels), updated["batch_stats"]

        params = state.variables["params"]
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        loss, grads = jax.lax.pmean((loss, grads), parallel.BATCH_AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        variables = {"params": optax.apply_updates(params, updates), "batch_stats": stats}
        return TrainingState(variables, opt_state, state.step + 1), loss

    mapped = parallel.parallelize(step, replicated=2, sharded=3, donate_first=True)
    state = TrainingState(variables, tx.init(variables["params"]), jnp.int32(0))
    done = 0
    if checkpoints is not None and (latest := checkpoints.latest_step()) is not None:
        state, _ = checkpoints.restore(latest, state)
        done = latest
        logger.info("resumed at step %d", done)
    local = ids.ravel()
    chosen = _choices(run_key, range(done, steps), batch_size, images.total)
    batches = sources.gathered(images, (indices[local] for indices in chosen))
    log_every = max(1, min(steps // 4, _LOG_STEPS))
    progress = Progress("teacher", total=steps, done=done, log_every=log_every)
    with contextlib.closing(progress):
        pending = None
        for count, batch in enumerate(batches, start=done + 1):
            check_stop()
            state, loss = mapped(state, run_key, ids, *parallel.local_shards(batch))
            # The loss before this one, so that the host gathers while the devices work.
            if pending is not None:
                _report(progress, count - 1, pending)
            pending = loss
            if checkpoints is not None and count % -(-steps // _SAVES) == 0:
                checkpoints.save(count, state, {})
        if pending is not None:
            _report(progress, steps, pending)
    return jax.device_get(state.variables)


def _report(progress: Progress, step: int, loss: jax.Array) -> None:
    value = float(loss)
    if not math.isfinite(value):
        raise UserError(
            f"the teacher's loss became {value} at step {step}: lower "
            "teacher.training.learning_rate, or see whether teacher.mean and .std fit the images"
        )
    progress.update(step, {"loss": value})


# From config to file ------------------------------------------------------------------------------


def load_checked(
    config: ml_collections.ConfigDict, name: str, split: str, key: str, *, whole: bool
) -> tuple[sources.Images, evaluator.Evaluator]:
    """Images and their evaluator, checked against the teacher.

    Args:
        config: of the teacher.
        name: as `data.name`.
        split: as `data.split`.
        key: names the data in errors.
        whole: as for `evaluator.load_evaluation`.

    Returns:
        The images of this process, and the evaluator.

    Raises:
        DataError: if the data is missing or does not fit.
    """
    settings = ml_collections.ConfigDict(config.data.to_dict() | {"name": name, "split": split})
    image_shape, num_classes = tuple(config.teacher.image_shape), config.teacher.num_classes
    try:
        return evaluator.load_evaluation(
            settings, preprocess_of_config(config), image_shape, num_classes, whole=whole
        )
    except sources.DataError as error:
        raise sources.DataError(f"{key}: {error}") from error


def training_images(config: ml_collections.ConfigDict) -> sources.Images:
    """The images of `data.name`, split `teacher.training.split`, checked against the teacher.

    Raises:
        DataError: as `load_checked`.
    """
    split = config.teacher.training.split
    what = "training data"
    if not config.data.name.startswith(sources.FOLDER):
        what += f", teacher.training.split = {split!r}"
    return load_checked(config, config.data.name, split, what, whole=True)[0]


def train_and_save(
    config: ml_collections.ConfigDict,
    path: Path,
    images: sources.Images,
    checkpoints: Checkpoints | None,
) -> Any:
    """Trains the config's teacher, and writes its variables.

    Args:
        config: of the teacher.
        path: of the safetensors file to write.
        images: to train on.
        checkpoints: as for `train_teacher`.

    Returns:
        `params` and `batch_stats`.
    """
    logger.info("training a teacher on %d images of %s", images.total, config.data.name)
    start = time.perf_counter()
    try:
        model, _ = build_teacher_model(config)
        preprocess = preprocess_of_config(config)
        variables = train_teacher(
            model, images, preprocess, config.teacher.training, config.seed, checkpoints
        )
    except KeyboardInterrupt:
        kept = "nothing of it is kept" if checkpoints is None else "its checkpoints are kept"
        logger.info("stopped while the teacher was being trained: %s", kept)
        raise
    if jax.process_index() == 0:
        save_variables(variables, path)
    multihost_utils.sync_global_devices(f"{path} is there")
    logger.info("trained in %.0f s, kept in %s", time.perf_counter() - start, path)
    return variables


def ensure_teacher(config: ml_collections.ConfigDict, path: Path) -> Path:
    """Trains the config's teacher on `data.name`, unless `path` exists.

    Args:
        config: with `teacher.weights = "train"`.
        path: of the safetensors file to write.

    Returns:
        `path`.

    Raises:
        DataError: if the data is missing or does not fit.
        UserError: as `train_teacher`.
    """
    if not path.exists():
        train_and_save(config, path, training_images(config), None)
    return path
