"""The losses of generator and student: arrays in, a float32 scalar out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from ait_jax.methods.registry import RecipeWords, Registry, Setting, number, one_of

__all__ = [
    "GENERATOR_LOSSES",
    "REDUCTIONS",
    "STUDENT_LOSSES",
    "GeneratorOutputs",
    "LossKind",
    "LossRegistry",
    "StudentOutputs",
    "Term",
    "batch_norm_statistics_loss",
    "cross_entropy",
    "default_terms",
    "kl_divergence",
    "loss_weight",
    "running_statistics",
    "term_values",
    "terms_of_config",
    "weighted_sum",
]

REDUCTIONS = ("mean", "batchmean")


@dataclasses.dataclass(frozen=True)
class GeneratorOutputs:
    """What a term of the generator's loss may read; of one device's share of a batch.

    Attributes:
        images: float32 [N, H, W, C], in the teacher's normalised space.
        targets: labels [N] or probabilities [N, classes].
        teacher_logits: [N, classes].
        teacher: what was seen of the teacher, `quant.taps.Outputs`: statistics of what enters its
            batch norms, features by activation site.
        batch_stats: the teacher's running statistics.
        student_apply: makes `student`; called only if that is read.
    """

    images: jax.Array
    targets: jax.Array
    teacher_logits: jax.Array
    teacher: Any = None
    batch_stats: Any = None
    student_apply: Callable[[], Any] | None = None

    @functools.cached_property
    def student(self) -> Any:
        """What is seen of the student on these images, `quant.taps.Outputs`; costs a forward."""
        return None if self.student_apply is None else self.student_apply()


@dataclasses.dataclass(frozen=True)
class StudentOutputs:
    """What a term of the student's loss may read; of one device's share of a batch.

    Attributes:
        images: float32 [N, H, W, C], constant here.
        targets: labels [N] or probabilities [N, classes].
        teacher_logits: [N, classes], constant here.
        student_logits: [N, classes], of the quantized network.
        teacher: what was seen of the teacher, `quant.taps.Outputs`, constant here.
        student: the same of the student; its features are quantized, and its sites are the
            teacher's.
        batch_stats: the teacher's running statistics.
    """

    images: jax.Array
    targets: jax.Array
    teacher_logits: jax.Array
    student_logits: jax.Array
    teacher: Any = None
    student: Any = None
    batch_stats: Any = None


class Term(NamedTuple):
    """A term of a loss.

    Attributes:
        name: of its metric, behind `generator/` or `student/`.
        weight: in the sum; with 0 it is a metric alone.
        fn: makes a scalar, a mean over examples, of `GeneratorOutputs` or `StudentOutputs`.
        of_all_devices: whether its value is that of the global batch, on every device.
        of_student: whether a generator's term reads the student, which images that are made before
            it is calibrated must do without.
    """

    name: str
    weight: float
    fn: Callable[[Any], jax.Array]
    of_all_devices: bool = False
    of_student: bool = False


# Each makes, of the config's section `loss`, a function of `GeneratorOutputs` (`StudentOutputs`).
# `loss.NAME` is its weight.
LossFactory = Callable[[Any], Callable[[Any], jax.Array]]


class LossKind(NamedTuple):
    """What is known of a registered loss beside what it computes.

    Attributes:
        metric: behind `generator/` or `student/`; its name if empty.
        always: whether its metric is there with weight 0 as well.
        of_all_devices: see `Term`.
        of_student: see `Term`.
    """

    metric: str = ""
    always: bool = False
    of_all_devices: bool = False
    of_student: bool = False


class LossRegistry(Registry[LossFactory]):
    """Losses by name; each has a weight, `loss.NAME`, which is 0 unless it declares another.

    Attributes:
        kinds: of the losses, by name.
    """

    def __init__(self, key: str):
        """Holds nothing yet.

        Args:
            key: the section of the config that holds the weights.
        """
        super().__init__(key)
        self.kinds: dict[str, LossKind] = {}

    def register(
        self,
        name: str,
        *,
        settings: Mapping[str, Setting] | None = None,
        deltas: Callable[[RecipeWords], Mapping[str, Any]] | None = None,
        kind: LossKind | None = None,
    ) -> Callable[[LossFactory], LossFactory]:
        """As `Registry.register`, with a weight.

        Args:
            name: by which the config chooses it.
            settings: the config keys that it owns, dotted, `loss.NAME` among them if its default is
                not 0.
            deltas: what shipped recipes set for it.
            kind: what else is known of it, if anything is.

        Raises:
            UserError: if the name, or one of the keys, is taken by something else.
        """
        weight = {f"loss.{name}": loss_weight(0.0, f"weight of {name}")}
        registered = super().register(name, settings=weight | dict(settings or {}), deltas=deltas)

        def of_kind(factory: LossFactory) -> LossFactory:
            self.kinds[name] = kind or LossKind()
            return registered(factory)

        return of_kind


def loss_weight(default: float, comment: str) -> Setting:
    """The config key of a loss's weight.

    Args:
        default: its value where none is set.
        comment: what the loss is, in a few words.
    """
    return Setting(default, number(0), comment)


GENERATOR_LOSSES = LossRegistry("loss")
STUDENT_LOSSES = LossRegistry("loss")


def terms_of_config(registry: LossRegistry, section: Any) -> tuple[Term, ...]:
    """The terms of a loss with their weights, in the order in which they were registered.

    Args:
        registry: `GENERATOR_LOSSES` or `STUDENT_LOSSES`.
        section: the config's section `loss`.
    """
    return tuple(
        Term(
            kind.metric or name,
            section[name],
            registry[name](section),
            of_all_devices=kind.of_all_devices,
            of_student=kind.of_student,
        )
        for name in registry
        for kind in [registry.kinds[name]]
        if section[name] or kind.always
    )


def default_terms(registry: LossRegistry) -> tuple[Term, ...]:
    """The terms of a loss as no config changes them: the paper's.

    Args:
        registry: `GENERATOR_LOSSES` or `STUDENT_LOSSES`.
    """
    settings = registry.all_settings()
    section = {key.removeprefix("loss."): setting.default for key, setting in settings.items()}
    return terms_of_config(registry, ml_collections.ConfigDict(section))


def term_values(terms: Sequence[Term], outputs: Any) -> dict[str, jax.Array]:
    """Each term by name, without its weight: float32 scalars.

    Args:
        terms: of the loss.
        outputs: `GeneratorOutputs` or `StudentOutputs`.
    """
    return {term.name: jnp.asarray(term.fn(outputs), jnp.float32) for term in terms}


def weighted_sum(terms: Sequence[Term], values: Mapping[str, jax.Array]) -> jax.Array:
    """The loss, a float32 scalar.

    Args:
        terms: of the loss.
        values: see `term_values`.
    """
    # A weight of 0 leaves a term out: 0 * inf would be NaN.
    parts = [term.weight * values[term.name] for term in terms if term.weight]
    return sum(parts[1:], parts[0]) if parts else jnp.zeros((), jnp.float32)


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


def running_statistics(batch_stats: Any, name: str) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance of a batch norm, float32 [features].

    Args:
        batch_stats: the teacher's collection of running statistics.
        name: of the module, slash-separated.
    """
    running = batch_stats
    for part in name.split("/"):
        running = running[part]
    return running["mean"].astype(jnp.float32), running["var"].astype(jnp.float32)


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
        mean, var = running_statistics(batch_stats, name)
        terms.append(
            jnp.mean(jnp.square(statistics.mean - mean))
            + jnp.mean(jnp.square(statistics.var - var))
        )
    return jnp.mean(jnp.stack(terms)) if terms else jnp.zeros((), jnp.float32)


# What is registered -------------------------------------------------------------------------------


@GENERATOR_LOSSES.register(
    "generator_ce",
    settings={
        "loss.generator_ce": loss_weight(1.0, "the teacher's cross entropy with what is aimed at"),
    },
    kind=LossKind("cross_entropy", always=True),
)
def _generator_cross_entropy(section: Any) -> Callable[[GeneratorOutputs], jax.Array]:
    del section
    return lambda outputs: cross_entropy(outputs.teacher_logits, outputs.targets)


@GENERATOR_LOSSES.register(
    "bns",
    settings={"loss.bns": loss_weight(0.1, "batch-norm statistics, in the generator's loss")},
    kind=LossKind(always=True, of_all_devices=True),
)
def _batch_norm_statistics(section: Any) -> Callable[[GeneratorOutputs], jax.Array]:
    del section
    return lambda outputs: batch_norm_statistics_loss(
        outputs.teacher.batch_norms, outputs.batch_stats
    )


@STUDENT_LOSSES.register(
    "kl",
    settings={
        "loss.kl": loss_weight(1.0, "KL distance to the teacher, in the student's loss"),
        "loss.temperature": Setting(20.0, number(0, open_low=True), "T of the KL distance"),
        "loss.reduction": Setting(
            "mean", one_of(REDUCTIONS), "over batch and classes, as published; or batchmean"
        ),
    },
    kind=LossKind(always=True),
)
def _kl(section: Any) -> Callable[[StudentOutputs], jax.Array]:
    return lambda outputs: kl_divergence(
        outputs.student_logits,
        outputs.teacher_logits,
        temperature=section.temperature,
        reduction=section.reduction,
    )


@STUDENT_LOSSES.register(
    "ce",
    settings={"loss.ce": loss_weight(0.0, "cross entropy, in the student's loss; AIT drops it")},
    kind=LossKind("cross_entropy", always=True),
)
def _student_cross_entropy(section: Any) -> Callable[[StudentOutputs], jax.Array]:
    del section
    return lambda outputs: cross_entropy(outputs.student_logits, outputs.targets)
