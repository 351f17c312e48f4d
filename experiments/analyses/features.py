r"""What the teacher makes of a run's synthetic images, beside real ones.

    python -m experiments.analyses.features --run=runs/cifar10_w4a4 \
        --out=experiments/results/features_gdfq

Features are what enters the teacher's classifier, projected onto the two principal components of
both sets together. The images are those of the run's generator after its last step, in batches of
`train.batch_size` as in training, and as many of its evaluation data.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from sklearn.decomposition import PCA

from ait_jax import main as program
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.data import sources
from ait_jax.errors import UserError
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.sites import find_sites, map_activations
from ait_jax.run.storage import user_path
from ait_jax.teacher import Teacher
from experiments.analyses import features_page, figures, runs
from experiments.analyses.features_page import ALL, Comparison, Features, Numbers, Sample

_BATCH = 64  # Of the teacher.


def feature_function(
    model: Any, variables: Any, image_shape: tuple[int, ...]
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """`(variables, images) -> (logits, features)`: features enter the layer that runs last.

    Args:
        model: any Linen module from images [N, H, W, C] to logits.
        variables: its variables, or their shapes.
        image_shape: (H, W, C) of one image.

    Returns:
        A pure function; features are float32 [N, width], means over space where the last layer is a
        conv.

    Raises:
        RunError: if the model has no layer with a kernel.
    """
    entered = []

    def record(call):
        if call.parameter:
            entered.append(call.operands[call.data])

    def forward(variables, images):
        entered.clear()
        apply = functools.partial(apply_frozen, model)
        mapped = map_activations(apply, lambda site, y: y, on_kernel=record, keep_loops=True)
        logits = mapped(variables, images)
        features = entered[-1]
        features = jnp.mean(features, axis=tuple(range(1, features.ndim - 1)))
        return logits.astype(jnp.float32), features.astype(jnp.float32)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    find_sites(
        functools.partial(apply_frozen, model), variables, images, on_kernel=record, keep_loops=True
    )
    if not entered:
        raise runs.RunError("the teacher has no layer with a kernel: there are no features")
    return forward


def seen_by_teacher(teacher: Teacher, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's probabilities [N, classes] and features [N, width] of normalised images."""
    forward = jax.jit(feature_function(teacher.model, teacher.variables, images.shape[1:]))
    probabilities, features = [], []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        padded = np.zeros((_BATCH, *images.shape[1:]), np.float32)  # One shape, compiled once.
        padded[: len(batch)] = batch
        logits, entered = forward(teacher.variables, padded)
        probabilities.append(np.asarray(jax.nn.softmax(logits))[: len(batch)])
        features.append(np.asarray(entered)[: len(batch)])
    return np.concatenate(probabilities), np.concatenate(features)


# Images of each kind, if there are as many real ones.
_EXAMPLES = 1000


def real_sample(
    restored: runs.Restored, count: int | None = None
) -> tuple[Sample, tuple[str, ...]]:
    """Images drawn from the evaluation data of a run, the same for the same seed; and the classes.

    Args:
        restored: the run.
        count: how many; None: 1,000, or all where there are fewer.

    Raises:
        RunError: if there are none, or fewer.
        DataError: if they are missing or do not fit.
    """
    config, teacher = restored.run.config, restored.run.teacher
    found = runs.real_images(config)
    if count is None:
        count = min(_EXAMPLES, len(found.labels))
    if count > len(found.labels):
        raise runs.RunError(
            f"--examples = {count} is not allowed: {config.data.name} ({config.data.split}) has "
            f"{len(found.labels)} images"
        )
    chosen = np.random.default_rng(config.seed).permutation(len(found.labels))[:count]
    pixels, labels = next(sources.gathered(found, [chosen]))
    seen = seen_by_teacher(teacher, np.asarray(teacher.preprocess(pixels)))
    names = found.classes or tuple(map(str, range(config.teacher.num_classes)))
    return Sample(pixels, labels, *seen), names


def synthetic_sample(restored: runs.Restored, count: int) -> Sample:
    """Images that a run's generator makes as it is after the last step.

    Labels are those that the generator was given; of superposed ones, the strongest.
    """
    run, state = restored.run, restored.state
    ids = jnp.arange(run.config.train.batch_size, dtype=jnp.int32)
    make = jax.jit(lambda variables, batch: run.generator.apply(variables, batch)[0])
    images, labels = [], []
    for i in range(-(-count // len(ids))):
        batch = run.generator.sample(run.frozen.key, state.step + i, ids)
        targets = run.generator.targets(batch)
        images.append(np.asarray(make(state.generator, batch)))
        labels.append(np.asarray(targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)))
    normalised = np.concatenate(images)[:count]
    pixels = run.teacher.preprocess.invert(normalised)
    seen = seen_by_teacher(run.teacher, normalised)
    return Sample(pixels, np.concatenate(labels)[:count], *seen)


# Comparison ---------------------------------------------------------------------------------------


def _spread(features: np.ndarray) -> float:
    """Root of the mean squared distance from the mean."""
    return float(np.sqrt(np.sum(np.var(features, axis=0))))


def _numbers(name: str, real: Sample, synthetic: Sample) -> Numbers:
    columns: dict[str, float] = {}
    for kind, sample in (("real", real), ("synthetic", synthetic)):
        columns |= {
            f"{kind}_images": len(sample.labels),
            f"{kind}_spread": _spread(sample.features),
            f"{kind}_confidence": float(np.mean(sample.confidence)),
            f"{kind}_entropy": float(np.mean(sample.entropy)),
            f"{kind}_agreement": float(np.mean(sample.predicted == sample.labels)),
        }
    apart = real.features.mean(axis=0) - synthetic.features.mean(axis=0)
    return Numbers(name, float(np.linalg.norm(apart)), **columns)


def compare(real: Sample, synthetic: Sample, classes: tuple[str, ...]) -> Comparison:
    """Measures how far two sets of images are apart, as the teacher sees them.

    Args:
        real: at least two images.
        synthetic: as many.
        classes: names of the labels.
    """
    both = np.concatenate([real.features, synthetic.features])
    pca = PCA(2, svd_solver="full").fit(both)
    numbers = [_numbers(ALL, real, synthetic)]
    means = {}
    for label, name in enumerate(classes):
        parts = [sample.of_class(label) for sample in (real, synthetic)]
        if all(len(part.labels) for part in parts):
            numbers.append(_numbers(name, *parts))
            means[name] = [part.features.mean(axis=0) for part in parts]
    # Equal numbers of images: the sets' means are as far from the common one as half of this.
    between = (numbers[0].distance / 2) ** 2
    own = np.array([mean[0] for mean in means.values()])
    nearest = [
        int(np.argmin(np.linalg.norm(own - mean[1], axis=1))) == i
        for i, mean in enumerate(means.values())
    ]
    return Comparison(
        numbers=numbers,
        points=[
            Features(kind, int(label), int(guess), float(x), float(y), float(sure), float(entropy))
            for kind, sample in (("real", real), ("synthetic", synthetic))
            for label, guess, (x, y), sure, entropy in zip(
                sample.labels,
                sample.predicted,
                pca.transform(sample.features),
                sample.confidence,
                sample.entropy,
            )
        ],
        explained=tuple(map(float, pca.explained_variance_ratio_)),
        between=float(between / np.sum(np.var(both, axis=0))),
        nearest=float(np.mean(nearest)) if nearest else float("nan"),
    )


def main(argv: list[str]) -> int:
    """Compares and writes; returns the exit code."""
    program.prepare(argv, ("run", "out"))
    values = flags.FLAGS
    try:
        for name in ("config", "workdir"):  # The library's program has them.
            if values[name].value is not None:
                raise UserError(f"--{name} is not allowed: the run has its own (--run)")
        figures.require_matplotlib()
        weights = user_path(values.teacher) if values.teacher else None
        restored = runs.restore_run(user_path(values.run), "last", weights)
        config = restored.run.config
        out = figures.open_folder(values.out)
        real, classes = real_sample(restored, values.examples)
        synthetic = synthetic_sample(restored, len(real.labels))
        comparison = compare(real, synthetic, classes)
        features_page.write(out, config, real, synthetic, comparison, classes)
    except UserError as error:
        tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130
    print((out / "features.md").read_text())
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("run", None, "Folder of a finished run.")
    flags.DEFINE_string("out", None, "Folder of tables, pictures and the paragraph.")
    flags.DEFINE_string("teacher", None, "Its weights, where they lie elsewhere by now.")
    flags.DEFINE_integer(
        "examples", None, "Images of each kind; by default 1,000, if there are.", lower_bound=2
    )
    run_with_flags(main, program.parse_flags)
