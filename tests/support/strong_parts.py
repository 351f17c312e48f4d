"""The strong recipe's parts around a network that compiles at once."""

import functools

import jax
import jax.numpy as jnp

from ait_jax.config import default_config, validate_config
from ait_jax.quant.kernels import network_kernels
from ait_jax.teacher import Teacher
from ait_jax.training.state import Frozen
from ait_jax.training.wiring import builder_of_config, first_state
from tests.conftest import random_variables
from tests.support.small_teacher import GREY, Small

SHAPE = (8, 8, 1)


def strong(**changes):
    """A config with a bank of images; changes by key, dots or `__` between its parts."""
    config = default_config()
    config.teacher.weights = "net.th"
    config.update_from_flattened_dict(
        {
            "teacher.image_shape": SHAPE,
            "teacher.num_classes": 3,
            "teacher.mean": (0.4,),
            "teacher.std": (0.3,),
            "train.batch_size": 8,
            "train.phases": ("images", "calibrate", "student"),
            "images.count": 32,
            "images.batch": 16,
            "images.steps": 20,
            "quant.calibration_steps": 2,
            "loss.bns": 0.0,
            "loss.bns_std": 1.0,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
    )
    return config


@functools.cache
def parts(**changes):
    """Of such a config: builder, frozen and first state."""
    config = strong(**changes)
    validate_config(config)
    model = Small()
    variables = jax.tree.map(jnp.asarray, random_variables(model, SHAPE))
    teacher = Teacher(model, variables, GREY, "", network_kernels(model, variables, SHAPE))
    builder = builder_of_config(config, teacher)
    frozen = Frozen(variables, jax.random.key(0))
    return builder, frozen, first_state(builder, frozen)
