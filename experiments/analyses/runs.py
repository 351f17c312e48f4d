"""Loads what analyses look at: a finished run, its student, synthetic and real images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ait_jax.data import sources
from ait_jax.data.teacher_training import ensure_teacher, load_checked
from ait_jax.errors import UserError
from ait_jax.export.finished import best_student, last_state, read_finished, unkept_run
from ait_jax.generators import bank_size
from ait_jax.methods import losses
from ait_jax.quant.frozen import apply_frozen
from ait_jax.teacher import Teacher, load_teacher
from ait_jax.training.loop import Run
from ait_jax.training.state import AITState
from ait_jax.training.student import TrainedStudent

__all__ = [
    "KINDS",
    "Examples",
    "Restored",
    "RunError",
    "ce_and_kl",
    "check_papers_grids",
    "chunked",
    "config_teacher",
    "described",
    "examples",
    "image_source",
    "real_images",
    "restore_run",
    "unkept_run",
]

KINDS = ("synthetic", "real")

_TEACHER_BATCH = 64


class RunError(UserError):
    """A run, or images of it, that cannot be analysed; the message names it and why."""


class Examples(NamedTuple):
    """Images on which losses are measured.

    Attributes:
        images: float32 [N, H, W, C], normalised as the teacher wants them.
        targets: of the cross entropy, labels [N] or probabilities [N, classes].
        teacher_logits: float32 [N, classes].
    """

    images: jax.Array
    targets: jax.Array
    teacher_logits: jax.Array


class Restored(NamedTuple):
    """A finished run.

    Attributes:
        run: its parts, wired.
        state: after its last step.
        student: the one that was asked for.
        which: "best" or "last".
    """

    run: Run
    state: AITState
    student: TrainedStudent
    which: str


def config_teacher(config: ml_collections.ConfigDict, folder: Path) -> Teacher:
    """The teacher of a config; where the config says so, it is trained first, and kept in `folder`.

    Raises:
        UserError: if there is none.
    """
    weights = Path(config.teacher.weights)
    if config.teacher.weights == "train":
        weights = ensure_teacher(config, folder / "teacher.safetensors")
    return load_teacher(config, weights)


def restore_run(folder: Path, which: str | None = None, weights: Path | None = None) -> Restored:
    """A finished run and its student.

    Args:
        folder: the run's.
        which: "best" or "last"; None: the one that the run kept (`train.keep_student`).
        weights: the teacher's, where they are not what the config says any more.

    Raises:
        RunError: if there is no finished run, or it has no such student.
        UserError: if a file of the run, or the teacher, cannot be read.
    """
    if not (folder / "summary.json").is_file():
        raise RunError(
            f"--run = '{folder}' is not allowed: it must be the folder of a finished run (there is "
            "no summary.json)"
        )
    finished = read_finished(folder, weights)
    run = unkept_run(finished.config, finished.teacher)
    state, step = last_state(run, folder)
    keeps = finished.config.train.keep_student
    wanted = which or keeps
    kept = best_student(folder, run.quantized, run.teacher) if wanted == keeps else None
    if kept is not None:
        return Restored(run, state, kept, wanted)
    if which == "best":
        raise RunError(
            f"--which = 'best' is not allowed: the run in {folder} knows no best student; use "
            "'last'"
        )
    top1 = finished.summary.get("final_top1")
    return Restored(
        run, state, TrainedStudent(state.student, state.ranges, state.grids, step, top1), "last"
    )


def check_papers_grids(config: ml_collections.ConfigDict) -> None:
    """Refuses students whose grids have a state: these analyses compute the paper's grids anew.

    Raises:
        RunError: names what the config has, and what it must have.
    """
    quant = config.quant
    if quant.weights != "minmax" or quant.activations != "ema":
        raise RunError(
            f"quant.weights = {quant.weights!r} with quant.activations = {quant.activations!r} is "
            "not allowed: this analysis is of the paper's grids, 'minmax' and 'ema'; take the word "
            "'paper' after the config's colon"
        )


def image_source(config: ml_collections.ConfigDict) -> str:
    """What makes the synthetic images of a config, in words."""
    if not config.images.count:
        return f"the {config.generator.name} generator"
    bank = f"the bank of {bank_size(config)} images"
    return bank if config.images.share == 1 else f"{bank} and the {config.generator.name} generator"


def described(restored: Restored, kinds: Sequence[str], count: int) -> str:
    """One sentence on what is analysed: the student, and so many images of each kind."""
    config, student = restored.run.config, restored.student
    top1 = "" if student.top1 is None else f", top-1 {student.top1:.2f} %"
    bits = f"W{config.quant.weight_bits}A{config.quant.activation_bits}"
    sources = {
        "real": f"{config.data.name} ({config.data.split}), with their labels",
        "synthetic": f"{image_source(config)} after the last step",
    }
    images = ", and on ".join(f"{count} {kind} images of {sources[kind]}" for kind in kinds)
    gi = "on" if config.gi.enabled else "off"
    return (
        f"The {restored.which} student of a run of {config.config_name or config.teacher.arch} at "
        f"{bits} (loss: {config.loss.kl:g} KL + {config.loss.ce:g} CE, Gradient Inundation {gi}; "
        f"step {student.step}{top1}), on {images}."
    )


def examples(restored: Restored, kind: str, count: int) -> Examples:
    """Images of a finished run, the same for the same arguments.

    Args:
        restored: the run.
        kind: one of `KINDS`. Synthetic ones are those that the generator as it is after the last
            step makes of one batch of so many; real ones are drawn from the evaluation data.
        count: how many.

    Raises:
        RunError: if `count` is less than 1, or there are no real images, or not so many.
        DataError: if the data is missing or does not fit.
    """
    if count < 1:
        raise RunError(f"--examples = {count} is not allowed: it must be at least 1")
    run = restored.run
    if kind == "real":
        pixels = real_images(run.config)
        if count > len(pixels.labels):
            raise RunError(
                f"--examples = {count} is not allowed: {run.config.data.name} "
                f"({run.config.data.split}) has {len(pixels.labels)} images"
            )
        chosen = np.random.default_rng(run.config.seed).permutation(len(pixels.labels))[:count]
        images, labels = next(sources.gathered(pixels, [chosen]))
        normalised, targets = run.teacher.preprocess(images), jnp.asarray(labels)
    else:
        state = restored.state
        batch = run.generator.sample(run.frozen.key, state.step, jnp.arange(count, dtype=jnp.int32))
        normalised = jax.jit(lambda v, b: run.generator.apply(v, b)[0])(state.generator, batch)
        targets = run.generator.targets(batch)
    forward = jax.jit(lambda variables, x: apply_frozen(run.teacher.model, variables, x))
    logits = [
        forward(run.frozen.teacher, normalised[i : i + _TEACHER_BATCH])
        for i in range(0, count, _TEACHER_BATCH)
    ]
    return Examples(normalised.astype(jnp.float32), targets, jnp.concatenate(logits))


def chunked(whole: Examples, size: int) -> list[tuple[float, Examples]]:
    """Parts of at most `size` examples, each with its share of all: means are weighted with it."""
    count = len(whole.images)
    parts = [Examples(*(x[i : i + size] for x in whole)) for i in range(0, count, size)]
    return [(len(part.images) / count, part) for part in parts]


def ce_and_kl(logits: jax.Array, on: Examples, section: ml_collections.ConfigDict) -> jax.Array:
    """Cross entropy and KL distance to the teacher, by a config's section `loss`: float32 [2]."""
    ce = losses.cross_entropy(logits, on.targets)
    kl = losses.kl_divergence(
        logits, on.teacher_logits, temperature=section.temperature, reduction=section.reduction
    )
    return jnp.stack([ce, kl])


def real_images(config: ml_collections.ConfigDict) -> sources.Images:
    """The evaluation images of a config, `data.name`, split `data.split`.

    Raises:
        RunError: if the config names none.
        DataError: if they are missing or do not fit.
    """
    if config.data.name == "none":
        raise RunError("data.name = 'none' is not allowed: real images are needed")
    what = config.data.name, config.data.split, "evaluation data"
    return load_checked(config, *what, whole=True)[0]
