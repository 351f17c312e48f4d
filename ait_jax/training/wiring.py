"""From a config and a teacher to the pure step of a run, and to the layout that compiles it."""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from ait_jax import parallel
from ait_jax.generators import Generator, generator_of_config
from ait_jax.generators.bank import BANK
from ait_jax.methods.losses import GENERATOR_LOSSES, STUDENT_LOSSES, Term, terms_of_config
from ait_jax.methods.phases import Phase, plan_of_config
from ait_jax.methods.transforms import transforms_of_config
from ait_jax.parallel import distributed
from ait_jax.run.image_bank import read_bank
from ait_jax.teacher import Teacher, classifier_weights
from ait_jax.training import optimizers
from ait_jax.training.state import AITState, Frozen, init_state
from ait_jax.training.step import Step, StepBuilder, repeated
from ait_jax.training.student import quantized_model

__all__ = [
    "builder_of_config",
    "first_state",
    "layout_of_config",
    "phase_step",
    "with_given_images",
]


def layout_of_config(
    config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> parallel.Layout:
    """The layout of `config.parallel` over all devices, or over those of a described slice."""
    min_sharded = config.parallel.fsdp_min_size if config.parallel.fsdp else None
    return parallel.Layout(config.parallel.mode, min_sharded=min_sharded, devices=devices)


def builder_of_config(
    config: ml_collections.ConfigDict,
    teacher: Teacher,
    generator: Generator | None = None,
    *,
    generator_losses: Sequence[Term] = (),
    student_losses: Sequence[Term] = (),
) -> StepBuilder:
    """The parts of a run, wired; nothing is compiled yet.

    Args:
        config: checked by `config.validate_config`.
        teacher: of the run.
        generator: the config's, if none is given.
        generator_losses: further terms of the generator's loss.
        student_losses: further terms of the student's.

    Returns:
        The builder of the run's steps.

    Raises:
        UserError: if the parts do not fit each other.
    """
    quantized = quantized_model(config, teacher)
    generator = generator or generator_of_config(
        config,
        lambda: classifier_weights(teacher.variables["params"], config.teacher.num_classes),
    )
    return StepBuilder(
        teacher=teacher.model,
        quantized=quantized,
        generator=generator,
        generator_tx=optimizers.generator_optimizer(config),
        student_tx=optimizers.student_optimizer(config, quantized.policy),
        learned_tx=optimizers.learned_optimizer(config),
        fraction=optimizers.fraction_schedule(config),
        generator_losses=(
            *terms_of_config(GENERATOR_LOSSES, config.loss),
            *generator_losses,
        ),
        student_losses=(*terms_of_config(STUDENT_LOSSES, config.loss), *student_losses),
        transforms=transforms_of_config(config.augment),
        num_classes=config.teacher.num_classes,
        plan=plan_of_config(config),
        compute_dtype=jnp.dtype(config.train.compute_dtype),
    )


def first_state(builder: StepBuilder, frozen: Frozen) -> AITState:
    """The state before the first step, see `state.init_state`."""
    own = {
        phase.name: functools.partial(phase.own.init, builder, frozen)
        for phase in builder.plan.phases
        if phase.own is not None
    }
    return init_state(
        frozen,
        builder.generator,
        builder.quantized,
        builder.generator_tx,
        builder.student_tx,
        learned_tx=builder.learned_tx,
        own=own,
    )


def with_given_images(
    state: AITState, config: ml_collections.ConfigDict, layout: parallel.Layout
) -> AITState:
    """The first state with the bank of `images.given`; as it is if none is given.

    All processes call it.

    Args:
        state: before the first step.
        config: of the run.
        layout: of the state.

    Raises:
        UserError: if the file does not hold these images, or other processes read others.
    """
    path, count = config.images.given, config.images.count
    if not path:
        return state
    shape = tuple(config.teacher.image_shape)
    images = distributed.together(lambda: read_bank(path, count, shape))
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    distributed.check_same({"images.given": path, "its images (SHA-256)": digest})
    stats = state.generator["batch_stats"]
    sharding = layout.shardings({BANK: stats[BANK]})[BANK]
    bank = jax.make_array_from_callback(images.shape, sharding, lambda index: images[index])
    return state._replace(generator=state.generator | {"batch_stats": stats | {BANK: bank}})


def phase_step(
    builder: StepBuilder,
    layout: parallel.Layout,
    phase: Phase,
    *,
    calibrate: bool,
    dispatched: int = 1,
    unroll: bool = False,
) -> Step:
    """The pure step of one phase, as `layout.compile` takes it.

    Args:
        builder: of the step.
        layout: names the axis, and gathers what it divides.
        phase: of its plan.
        calibrate: whether activation ranges follow the batch.
        dispatched: steps that run as one program.
        unroll: whether these are no loop.
    """
    pure = builder.build(
        phase,
        calibrate=calibrate,
        axis_name=layout.axis_name,
        gathered=layout.gathered,
    )
    return repeated(pure, dispatched, unroll=unroll) if dispatched > 1 else pure
