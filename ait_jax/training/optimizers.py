"""The two optimizers and their schedules, from the config."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ait_jax.methods.phases import plan_of_config
from ait_jax.optim import gradient_inundation
from ait_jax.promotion import promoting
from ait_jax.quant.params import inundation_mask, kernel_mask
from ait_jax.quant.policy import QuantPolicy

__all__ = [
    "fraction_schedule",
    "generator_optimizer",
    "learned_optimizer",
    "student_optimizer",
]


# Where a cosine ends, as a share of where it begins, and in how many stages.
_COSINE_END, _STAGES = 0.01, 100


def _cosine(value: float, steps: int) -> optax.Schedule:
    """A cosine from `value` to a hundredth of it, in stages.

    Gradient Inundation and the step that checks it both compute the fraction: a cosine computed by
    two programs may differ in its last bit, and so may the number of codes that must change.
    """
    stages = min(_STAGES, steps)
    shares = 0.5 * (1 + np.cos(np.pi * np.arange(stages) / stages))
    table = np.float32(value * (_COSINE_END + (1 - _COSINE_END) * shares))
    length = -(-steps // stages)

    def schedule(count):
        return jnp.asarray(table)[jnp.minimum(jnp.asarray(count) // length, stages - 1)]

    return schedule


def _scheduled(
    config: ml_collections.ConfigDict, value: float, *, student: bool = False
) -> optax.Schedule:
    """`value` as `schedule.shape` lets it decay.

    Args:
        config: the whole one.
        value: at the start.
        student: whether it is called with the count of student steps; else of all steps.
    """
    plan = plan_of_config(config)
    first_step = plan.first_student_step if student else 0
    if config.schedule.shape == "cosine":
        steps = plan.student_steps if student else plan.total_steps
        return promoting(_cosine(value, max(steps, 1)))
    boundaries = [step - first_step for step in config.schedule.boundaries]
    passed = sum(step <= 0 for step in boundaries)
    schedule = optax.piecewise_constant_schedule(
        value * config.schedule.decay**passed,
        {step: config.schedule.decay for step in boundaries if step > 0},
    )
    return promoting(schedule)


def fraction_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Gradient Inundation's T, called with the count of *student* steps."""
    return _scheduled(config, config.gi.fraction, student=True)


def generator_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam; its rate decays with the steps of the run."""
    generator = config.generator
    rate = _scheduled(config, generator.learning_rate)
    adam = optax.adam(rate, b1=generator.b1, b2=generator.b2)
    return adam._replace(update=promoting(adam.update))


def learned_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, of what quantizers learn; its rate decays with the student's."""
    adam = optax.adam(_scheduled(config, config.quant.learning_rate, student=True))
    return adam._replace(update=promoting(adam.update))


def _unquantized(params: Any, policy: QuantPolicy) -> Any:
    return jax.tree.map(operator.not_, kernel_mask(params, policy))


def student_optimizer(
    config: ml_collections.ConfigDict, policy: QuantPolicy
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum or Adam, then Gradient Inundation on the quantized kernels alone.

    Kernels of different codes are groups of their own, each tensor in one of them, so that Gradient
    Inundation is the last to see it. Kernels each of whose grids holds a single value (a depthwise
    conv of 1x1) are in none: no step changes their codes.
    """
    student, gi = config.student, config.gi
    rate = _scheduled(config, student.learning_rate, student=True)
    if student.optimizer == "adam":
        adam = optax.adam(rate, b1=student.momentum)
        chain = [adam._replace(update=promoting(adam.update))]
    else:
        chain = [optax.sgd(rate, momentum=student.momentum, nesterov=True)]
    if student.float_rate != 1:
        # Before Gradient Inundation, which must see what is applied.
        floats = functools.partial(_unquantized, policy=policy)
        chain.append(optax.masked(optax.scale(student.float_rate), floats))
    if student.weight_decay:
        chain.insert(0, optax.add_decayed_weights(student.weight_decay))
    if gi.enabled:
        for coder in policy.coders:
            inundation = gradient_inundation(
                fraction_schedule(config),
                coder,
                search=gi.search,
                bisect_steps=gi.bisect_steps,
                max_doublings=gi.max_doublings,
            )
            mask = functools.partial(inundation_mask, policy=policy, coder=coder)
            chain.append(optax.masked(inundation, mask))
    return optax.chain(*chain)
