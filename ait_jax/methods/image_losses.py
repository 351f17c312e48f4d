"""Further terms of the images' loss, whoever makes them: a generator, or Adam on pixels."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.methods.losses import (
    GENERATOR_LOSSES,
    GeneratorOutputs,
    LossKind,
    cross_entropy,
    running_statistics,
)
from ait_jax.methods.registry import Setting, number

__all__ = ["disagreement_loss", "standard_deviation_loss"]

# Dead channels have variance 0, where a root has no derivative.
_SMALL_VARIANCE = 1e-6


def standard_deviation_loss(observed: Mapping[str, Any], batch_stats: Any) -> jax.Array:
    """How far images are from the teacher's statistics, in means and standard deviations.

    Variances, as in `batch_norm_statistics_loss`, are squares: a few wide channels outweigh all
    others. Summed over the batch norms (GENIE: Jeon et al., CVPR 2023, section 3.2).

    Args:
        observed: statistics of each batch norm's input, by module name.
        batch_stats: the teacher's collection of running statistics.

    Returns:
        float32 scalar; 0 without batch norms.
    """
    total = jnp.zeros((), jnp.float32)
    for name, statistics in observed.items():
        mean, var = running_statistics(batch_stats, name)
        deviation, wanted = (
            jnp.sqrt(jnp.maximum(v, 0) + _SMALL_VARIANCE) for v in (statistics.var, var)
        )
        total += jnp.mean(jnp.square(statistics.mean - mean))
        total += jnp.mean(jnp.square(deviation - wanted))
    return total


@GENERATOR_LOSSES.register("bns_std", kind=LossKind(of_all_devices=True))
def _standard_deviations(section: Any) -> Callable[[GeneratorOutputs], jax.Array]:
    del section
    return lambda outputs: standard_deviation_loss(outputs.teacher.batch_norms, outputs.batch_stats)


def disagreement_loss(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    targets: jax.Array,
    *,
    low: float,
    high: float,
    disagreement: float,
    agreement: float,
) -> jax.Array:
    """Asks for images on which the student disagrees with the teacher, but not too much (AdaDFQ).

    Qian et al., "Adaptive Data-Free Quantization", CVPR 2023: the entropy of the difference of the
    logits, normalised over the batch, is kept between two margins.

    Args:
        teacher_logits: [N, classes].
        student_logits: [N, classes].
        targets: labels [N] or probabilities [N, classes].
        low: the lower margin.
        high: the upper one.
        disagreement: weight of the cross entropy of the difference.
        agreement: weight of that of the sum.

    Returns:
        float32 scalar.
    """
    teacher, student = (x.astype(jnp.float32) for x in (teacher_logits, student_logits))
    log_p = jax.nn.log_softmax(teacher - student)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    least = jax.lax.stop_gradient(jnp.min(entropy))
    most = jnp.log(float(teacher.shape[-1]))
    h = (entropy - least) / jnp.maximum(most - least, 1e-6)
    margins = jnp.mean(jax.nn.relu(low - h)) + jnp.mean(jax.nn.relu(h - high))
    return (
        margins
        + disagreement * cross_entropy(teacher - student, targets)
        + agreement * cross_entropy(teacher + student, targets)
    )


@GENERATOR_LOSSES.register(
    "adadfq",
    settings={
        "loss.adadfq_low": Setting(0.1, number(0, 1), "lower margin of the student's entropy"),
        "loss.adadfq_high": Setting(0.8, number(0, 1), "upper margin of it"),
        "loss.adadfq_disagreement": Setting(0.2, number(0), "weight of disagreement"),
        "loss.adadfq_agreement": Setting(0.1, number(0), "weight of agreement"),
    },
    kind=LossKind(of_student=True),
)
def _disagreement(section: Any) -> Callable[[GeneratorOutputs], jax.Array]:
    return lambda outputs: disagreement_loss(
        outputs.teacher_logits,
        outputs.student.logits,
        outputs.targets,
        low=section.adadfq_low,
        high=section.adadfq_high,
        disagreement=section.adadfq_disagreement,
        agreement=section.adadfq_agreement,
    )
