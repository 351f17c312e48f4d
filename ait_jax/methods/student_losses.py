"""Further terms of the student's loss: features aligned with the teacher's, and pseudo-labels.

AIT has none of them: the student learns from the KL distance alone. All are off by default.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.methods.losses import STUDENT_LOSSES, StudentOutputs
from ait_jax.methods.registry import Setting, number

__all__ = ["channel_attention_loss", "feature_distance_loss", "pseudo_label_loss"]


def _channel_energy(features: jax.Array) -> jax.Array:
    """Mean square of each channel over space, of length 1 for each example: float32 [N, C]."""
    x = jnp.square(features.astype(jnp.float32))
    energy = jnp.mean(x.reshape(len(x), -1, x.shape[-1]), axis=1)
    return energy / jnp.sqrt(jnp.sum(jnp.square(energy), axis=-1, keepdims=True) + 1e-12)


def channel_attention_loss(
    student: Mapping[int, jax.Array], teacher: Mapping[int, jax.Array]
) -> jax.Array:
    """Squared distance of the channels' energies, summed over sites (HAST: Li et al., CVPR 2023).

    Args:
        student: features [N, ..., C] by activation site.
        teacher: those of the teacher.

    Returns:
        float32 scalar; 0 without sites.
    """
    total = jnp.zeros((), jnp.float32)
    for site, own in student.items():
        distance = _channel_energy(own) - _channel_energy(teacher[site])
        total += jnp.mean(jnp.square(distance))
    return total


def feature_distance_loss(
    student: Mapping[int, jax.Array], teacher: Mapping[int, jax.Array]
) -> jax.Array:
    """Mean squared distance of the features, summed over sites (PLF: Fan et al., CVPR 2024).

    Args:
        student: features by activation site.
        teacher: those of the teacher.

    Returns:
        float32 scalar; 0 without sites.
    """
    total = jnp.zeros((), jnp.float32)
    for site, own in student.items():
        difference = own.astype(jnp.float32) - teacher[site].astype(jnp.float32)
        total += jnp.mean(jnp.square(difference))
    return total


def pseudo_label_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, threshold: float
) -> jax.Array:
    """Cross entropy with the teacher's class where the teacher is sure (PLF, equation 9).

    Args:
        student_logits: [N, classes].
        teacher_logits: [N, classes].
        threshold: the largest entropy of the teacher that counts as sure, as a share of the
            logarithm of the number of classes.

    Returns:
        float32 scalar, a mean over all examples: those that do not count are 0.
    """
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    sure = entropy <= threshold * jnp.log(float(log_p.shape[-1]))
    labels = jnp.argmax(log_p, axis=-1)
    picked = jnp.take_along_axis(log_q, labels[:, None], axis=-1)[:, 0]
    return -jnp.mean(jnp.where(sure, picked, 0.0))


@STUDENT_LOSSES.register("channel_attention")
def _channel_attention(section: Any) -> Callable[[StudentOutputs], jax.Array]:
    del section
    return lambda outputs: channel_attention_loss(
        outputs.student.features, outputs.teacher.features
    )


@STUDENT_LOSSES.register("feature_distance")
def _feature_distance(section: Any) -> Callable[[StudentOutputs], jax.Array]:
    del section
    return lambda outputs: feature_distance_loss(outputs.student.features, outputs.teacher.features)


@STUDENT_LOSSES.register(
    "pseudo_labels",
    settings={
        "loss.pseudo_label_entropy": Setting(
            0.5, number(0, 1), "the largest entropy of a teacher that is sure, of log(classes)"
        ),
    },
)
def _pseudo_labels(section: Any) -> Callable[[StudentOutputs], jax.Array]:
    return lambda outputs: pseudo_label_loss(
        outputs.student_logits, outputs.teacher_logits, threshold=section.pseudo_label_entropy
    )
