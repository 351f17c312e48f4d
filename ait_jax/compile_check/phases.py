"""The step of a config's phase, compiled for described devices; no weights are needed."""

from typing import Any

import jax
import ml_collections
import numpy as np

from ait_jax.compile_check.slices import Slice
from ait_jax.errors import UserError, did_you_mean
from ait_jax.generators import Generator, generator_of_config
from ait_jax.teacher import (
    Teacher,
    build_teacher_model,
    classifier_weights,
    teacher_of_config,
)
from ait_jax.training.state import AITState, Frozen
from ait_jax.training.step import StepBuilder
from ait_jax.training.wiring import builder_of_config, first_state, layout_of_config, phase_step

__all__ = ["compile_phase", "shapes_of"]


def _teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher's shapes."""
    model, variables = build_teacher_model(config)
    return teacher_of_config(config, model, variables, "")


def _generator(config: ml_collections.ConfigDict, teacher: Teacher) -> Generator:
    def zeros(leaf):
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # Takes no memory.

    params = jax.tree.map(zeros, teacher.variables["params"])
    return generator_of_config(
        config, lambda: classifier_weights(params, config.teacher.num_classes)
    )


def shapes_of(config: ml_collections.ConfigDict) -> tuple[StepBuilder, AITState, Frozen]:
    """A run's builder, and the shapes of its state and of what it reads; no weights are needed.

    Raises:
        UserError: if the config's parts do not fit each other.
    """
    teacher = _teacher(config)
    builder = builder_of_config(config, teacher, _generator(config, teacher))
    frozen = Frozen(teacher.variables, jax.eval_shape(lambda: jax.random.key(config.seed)))
    return builder, jax.eval_shape(lambda frozen: first_state(builder, frozen), frozen), frozen


def compile_phase(config: ml_collections.ConfigDict, described: Slice, phase: str) -> Any:
    """Compiles the step of a phase for a slice.

    Args:
        config: checked by `config.validate_config`.
        described: the slice.
        phase: name of one of the config's; ranges are calibrated if they ever are in it.

    Returns:
        jax's compiled object, which cannot be run here.

    Raises:
        UserError: if there is no such phase, or the batch does not divide over the slice's devices,
            or as `shapes_of`.
        jax.errors.JaxRuntimeError: if the compiler refuses the program, see
            `slices.refused_bytes`.
    """
    layout = layout_of_config(config, described.devices)
    example_ids = layout.example_shapes(config.train.batch_size)
    builder, state, frozen = shapes_of(config)
    chosen = {known.name: known for known in builder.plan.phases}.get(phase)
    if chosen is None:
        raise UserError(
            f"--phase = {phase!r} is not allowed: train.phases = {config.train.phases!r}"
            f"{did_you_mean(phase, config.train.phases)}"
        )
    step = phase_step(
        builder,
        layout,
        chosen,
        calibrate=chosen.calibration_steps > 0,
        dispatched=max(config.train.steps_per_dispatch, 1),
    )
    return layout.compile(step, state, frozen, example_ids)
