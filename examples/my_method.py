"""A method of your own in one file: two losses, and the config keys that they own.

docs/write_a_method.md explains it, and has the command that runs it.
"""

import jax.numpy as jnp

from ait_jax.methods.losses import GENERATOR_LOSSES, STUDENT_LOSSES
from ait_jax.methods.registry import Setting, integer


def normalised(features):
    """The features of each example as a vector of length 1: float32 [N, features]."""
    flat = features.reshape(len(features), -1).astype(jnp.float32)
    return flat / jnp.sqrt(jnp.sum(flat**2, axis=1, keepdims=True) + 1e-8)


@STUDENT_LOSSES.register(
    "features",
    settings={"loss.features_sites": Setting(0, integer(0), "the last n sites count; 0: all")},
)
def features_loss(section):
    """Squared distance of the student's features from the teacher's, a mean over sites."""

    def loss(outputs):
        teacher, student = outputs.teacher.features, outputs.student.features
        distances = [
            jnp.mean(jnp.sum((normalised(teacher[i]) - normalised(student[i])) ** 2, axis=1))
            for i in sorted(student)[-section.features_sites :]
        ]
        return jnp.mean(jnp.stack(distances))

    return loss


@GENERATOR_LOSSES.register("total_variation")
def total_variation(section):
    """Mean absolute difference of neighbouring pixels."""
    return lambda outputs: sum(jnp.mean(jnp.abs(jnp.diff(outputs.images, axis=i))) for i in (1, 2))
