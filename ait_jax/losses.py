"""The losses of generator and student: arrays in, a float32 scalar out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "REDUCTIONS",
    "GeneratorOutputs",
    "StudentOutputs",
    "batch_norm_statistics_loss",
    "cross_entropy",
    "kl_divergence",
]

REDUCTIONS = ("mean", "batchmean")


class GeneratorOutputs(NamedTuple):
    """What a loss term of the user's may say of the generator; of one device's share of a batch.

    Attributes:
        images: float32 [N, H, W, C], in the teacher's normalised space.
        targets: labels [N] or probabilities [N, classes].
        teacher_logits: [N, classes].
    """

    images: jax.Array
    targets: jax.Array
    teacher_logits: jax.Array


class StudentOutputs(NamedTuple):
    """The same of the student.

    Attributes:
        images: float32 [N, H, W, C], constant here.
        targets: labels [N] or probabilities [N, classes].
        teacher_logits: [N, classes], constant here.
        student_logits: [N, classes], of the quantized network.
    """

    images: jax.Array
    targets: jax.Array
    teacher_logits: jax.Array
    student_logits: jax.Array


def kl_divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    reduction: str = "mean",
) -> jax.Array:
    r"""`T^2 KL(softmax(teacher / T) || softmax(student / T))` (AIT, section 4.1).

    Args:
        student_logits: [N, classes].
        teacher_logits: [N, classes].
        temperature: T, softens both distributions.
        reduction: `"mean"` averages over batch *and classes*, as the published code does;
            `"batchmean"` over the batch alone, the textbook value, `classes` times larger.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if `reduction` is not one of `REDUCTIONS`.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction = {reduction!r} is not allowed: it must be one of {REDUCTIONS}"
        )
    log_p = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
    pointwise = jnp.exp(log_p) * (log_p - log_q)
    total = jnp.mean(pointwise) if reduction == "mean" else jnp.mean(jnp.sum(pointwise, axis=-1))
    return temperature**2 * total


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy.

    Args:
        logits: [N, classes].
        targets: integer labels [N], or probabilities [N, classes].

    Returns:
        float32 scalar.
    """
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    if targets.ndim == 1:
        return -jnp.mean(jnp.take_along_axis(log_q, targets[:, None], axis=-1))
    return -jnp.mean(jnp.sum(targets.astype(jnp.float32) * log_q, axis=-1))


def batch_norm_statistics_loss(observed: Mapping[str, Any], batch_stats: Any) -> jax.Array:
    """BNS: how far the statistics of synthetic images are from the teacher's (GDFQ, equation 4).

    Args:
        observed: statistics of each batch norm's input, by module name, each with `mean` and `var`
            (biased) of shape [features]; see `quant.taps.Outputs`.
        batch_stats: the teacher's collection of running statistics.

    Returns:
        float32 scalar, the mean over batch norms of `mse(mean) + mse(var)`; 0 without batch norms.
    """
    terms = []
    for name, statistics in observed.items():
        running = batch_stats
        for part in name.split("/"):
            running = running[part]
        terms.append(
            jnp.mean(jnp.square(statistics.mean - running["mean"].astype(jnp.float32)))
            + jnp.mean(jnp.square(statistics.var - running["var"].astype(jnp.float32)))
        )
    return jnp.mean(jnp.stack(terms)) if terms else jnp.zeros((), jnp.float32)
