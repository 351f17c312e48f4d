"""The training step: sample -> generate -> teacher -> generator's update -> student's KL update.

Everything here is pure and unaware of devices, but for the name of the axis over which a batch may
be split: means, statistics and gradients are those of the global batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ait_jax import losses
from ait_jax.generators import Generator
from ait_jax.optim.inundation import GradientInundationState, codes_needed
from ait_jax.promotion import promoting
from ait_jax.quant import affine
from ait_jax.quant.frozen import apply_observed
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.state import AITState, Frozen, Totals

__all__ = ["LossSettings", "Step", "StepBuilder", "cast_floating", "repeated"]

# step(state, frozen, example_ids) -> (state, metrics); `axis_name` is bound by the builder.
Step = Callable[[AITState, Frozen, jax.Array], tuple[AITState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Weights and forms of the losses.

    Attributes:
        kl: weight of the KL distance to the teacher in the student's loss.
        ce: weight of the cross entropy with the synthetic label (0 in AIT, section 4.1).
        temperature: T of the KL distance.
        reduction: one of `losses.REDUCTIONS`.
        bns: weight of the batch-norm statistics in the generator's loss.
    """

    kl: float = 1.0
    ce: float = 0.0
    temperature: float = 20.0
    reduction: str = "mean"
    bns: float = 0.1


@dataclasses.dataclass(frozen=True)
class StepBuilder:
    """The parts of a run, from which `build` makes the step of each phase.

    Attributes:
        teacher: the model of teacher and student.
        quantized: its quantized apply.
        generator: makes the images.
        generator_tx: the generator's optimizer.
        student_tx: the student's optimizer, Gradient Inundation last.
        fraction: the schedule of T, called with the count of student steps.
        losses: their weights.
        warmup_steps: steps before the first student step.
        compute_dtype: in which generator and teacher run. Parameters, statistics and losses are
            float32 throughout, and so is the student, whose codes must not depend on it.
        generator_losses: terms that the user adds to the generator's loss, by name: each makes a
            scalar of `losses.GeneratorOutputs`, a mean over examples.
        student_losses: the same for the student, of `losses.StudentOutputs`.
    """

    teacher: Any
    quantized: QuantizedModel
    generator: Generator
    generator_tx: optax.GradientTransformation
    student_tx: optax.GradientTransformation
    fraction: Callable[[jax.Array], Any]
    losses: LossSettings
    warmup_steps: int
    compute_dtype: Any = jnp.float32
    generator_losses: Mapping[str, Callable[[Any], jax.Array]] = dataclasses.field(
        default_factory=dict
    )
    student_losses: Mapping[str, Callable[[Any], jax.Array]] = dataclasses.field(
        default_factory=dict
    )

    def build(
        self,
        *,
        train_student: bool,
        calibrate: bool,
        axis_name: str | None,
        gathered: Callable[..., Any] | None = None,
    ) -> Step:
        """The pure step of one phase.

        Args:
            train_student: False in warm-up, where only the generator learns.
            calibrate: whether activation ranges follow the batch.
            axis_name: the axis over which the batch is split, if any.
            gathered: `gathered(params, dtype=None)` makes parameters whole where they are used, if
                devices hold parts of them, and casts them.

        Returns:
            The step. Its metrics are float32 scalars, equal on all devices, by slash-named key.
        """
        gathered = gathered or cast_floating

        def step(state, frozen, example_ids):
            batch = self.generator.sample(frozen.key, state.step, example_ids)
            state, images, teacher_logits, metrics = self._generator_step(
                state, frozen, batch, axis_name, gathered
            )
            if train_student:
                state, student_metrics = self._student_step(
                    state, frozen, batch, images, teacher_logits, calibrate, axis_name, gathered
                )
                metrics |= student_metrics
            elif calibrate:
                _, ranges = self.quantized.apply(
                    gathered(state.student),
                    frozen.teacher["batch_stats"],
                    images,
                    state.ranges,
                    calibrate=True,
                    axis_name=axis_name,
                )
                state = state._replace(ranges=ranges)
            return state._replace(step=state.step + 1), metrics

        return step

    def _generator_step(self, state, frozen, batch, axis_name, gathered):
        targets = self.generator.targets(batch)
        batch_stats = state.generator["batch_stats"]

        def loss_fn(params):
            variables = {"params": gathered(params, self.compute_dtype), "batch_stats": batch_stats}
            with jax.named_scope("generator"):
                images, new_stats = self.generator.apply(
                    variables, cast_floating(batch, self.compute_dtype), axis_name=axis_name
                )
            params = cast_floating(frozen.teacher["params"], self.compute_dtype)
            teacher = frozen.teacher | {"params": params}
            with jax.named_scope("teacher"):
                # The user's model may not expect to be cast.
                logits, observed = promoting(apply_observed)(
                    self.teacher, teacher, images, axis_name=axis_name
                )
                ce = losses.cross_entropy(logits, targets)
                bns = losses.batch_norm_statistics_loss(observed, frozen.teacher["batch_stats"])
            own = _terms(self.generator_losses, losses.GeneratorOutputs(images, targets, logits))
            loss = ce + self.losses.bns * bns + sum(own.values())
            return loss, (images, logits, new_stats, ce, bns, own)

        grads, (images, logits, new_stats, ce, bns, own) = jax.grad(loss_fn, has_aux=True)(
            state.generator["params"]
        )
        grads, ce, own = _pmean((grads, ce, own), axis_name)
        params = state.generator["params"]
        with jax.named_scope("generator_update"):
            updates, opt_state = self.generator_tx.update(grads, state.generator_opt, params)
            params = optax.apply_updates(params, updates)
        state = state._replace(
            generator={"params": params, "batch_stats": new_stats}, generator_opt=opt_state
        )
        metrics = {
            "generator/loss": ce + self.losses.bns * bns + sum(own.values()),
            "generator/cross_entropy": ce,
            "generator/bns": bns,
            **{f"generator/{name}": value for name, value in own.items()},
        }
        images, logits = jax.lax.stop_gradient((images, logits))
        return state, images.astype(jnp.float32), logits, metrics

    def _student_step(
        self, state, frozen, batch, images, teacher_logits, calibrate, axis_name, gathered
    ):
        targets = self.generator.targets(batch)

        def loss_fn(params):
            with jax.named_scope("student"):
                logits, ranges = self.quantized.apply(
                    gathered(params),
                    frozen.teacher["batch_stats"],
                    images,
                    state.ranges,
                    calibrate=calibrate,
                    axis_name=axis_name,
                )
            kl = losses.kl_divergence(
                logits,
                teacher_logits,
                temperature=self.losses.temperature,
                reduction=self.losses.reduction,
            )
            ce = losses.cross_entropy(logits, targets)
            # A weight of 0 leaves the term out: 0 * inf would be NaN.
            loss = self.losses.kl * kl + (self.losses.ce * ce if self.losses.ce else 0.0)
            outputs = losses.StudentOutputs(images, targets, teacher_logits, logits)
            own = _terms(self.student_losses, outputs)
            return loss + sum(own.values()), (ranges, logits, kl, ce, own)

        (loss, (ranges, logits, kl, ce, own)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.student
        )
        agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher_logits, -1))
        grads, (loss, kl, ce, own, agreement) = _pmean(
            (grads, (loss, kl, ce, own, agreement)), axis_name
        )
        with jax.named_scope("student_update"):
            updates, opt_state = self.student_tx.update(grads, state.student_opt, state.student)
            student = optax.apply_updates(state.student, updates)
        fraction = self.fraction(state.step - self.warmup_steps)
        with jax.named_scope("crossings"):
            totals, crossing_metrics = self._count_crossings(
                state.student, student, state.totals, fraction
            )
        metrics = {
            "student/loss": loss,
            "student/kl": kl,
            "student/cross_entropy": ce,
            "student/agreement": agreement,
            **{f"student/{name}": value for name, value in own.items()},
            "gi/fraction": jnp.asarray(fraction, jnp.float32),
            **crossing_metrics,
            **_alphas(opt_state),
        }
        state = state._replace(student=student, student_opt=opt_state, ranges=ranges, totals=totals)
        return state, metrics

    def _count_crossings(self, before, after, totals: Totals, fraction):
        """Counts changed codes on what is stored, independently of Gradient Inundation.

        Tensors with a single value on each grid have none that can change, and do not count.
        """
        moving, frozen_grid, sizes = [], [], []
        for (path, old), new in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after)):
            coder = self.quantized.policy.weight_codes(leaf_name(path))
            if coder is None or not coder.can_change(old.shape):
                continue
            grid = affine.weight_params(old, coder.bits, coder.channel_axis)
            codes = affine.quantize(old, *grid, coder.bits)
            moving.append(jnp.sum(coder(new) != codes, dtype=jnp.int32))
            on_old_grid = affine.quantize(new, *grid, coder.bits)
            frozen_grid.append(jnp.sum(on_old_grid != codes, dtype=jnp.int32))
            sizes.append(float(old.size))
        changed, changed_frozen = (
            jnp.stack(counts) if counts else jnp.zeros((0,), jnp.int32)
            for counts in (moving, frozen_grid)
        )
        needed = codes_needed(fraction, jnp.asarray(sizes, jnp.float32))
        share = jnp.sum(changed).astype(jnp.float32) / max(sum(sizes), 1.0)
        misses = jnp.sum(changed < needed, dtype=jnp.int32)
        frozen_misses = jnp.sum(changed_frozen < needed, dtype=jnp.int32)
        totals = Totals(
            crossed=totals.crossed + share,
            misses=totals.misses + misses,
            frozen_misses=totals.frozen_misses + frozen_misses,
        )
        return totals, {"gi/crossed": share, "gi/misses": misses, "gi/frozen_misses": frozen_misses}


def cast_floating(tree: Any, dtype: Any = None) -> Any:
    """Floating arrays of a tree in another dtype; None: as they are."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return tree if dtype is None else jax.tree.map(cast, tree)


def repeated(step: Step, count: int, *, unroll: bool = False) -> Step:
    """`count` steps as one program; its metrics have a leading axis, [count] each.

    Args:
        step: of one phase.
        count: how often it runs.
        unroll: no loop, at the price of `count` times the compilation. XLA on CPU has no fast convs
            inside loops.
    """

    def steps(state, frozen, example_ids):
        def body(state, _):
            return step(state, frozen, example_ids)

        return jax.lax.scan(body, state, length=count, unroll=count if unroll else 1)

    return steps


def _terms(terms: Mapping[str, Callable[[Any], jax.Array]], outputs: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(term(outputs), jnp.float32) for name, term in terms.items()}


def _pmean(tree, axis_name):
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def _alphas(opt_state) -> dict[str, jax.Array]:
    """The last alpha of every tensor, as metrics; none where Gradient Inundation is off."""
    found = [
        s
        for s in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, GradientInundationState)
        )
        if isinstance(s, GradientInundationState)
    ]
    return {
        f"gi/alpha/{leaf_name(path)}": alpha
        for s in found
        for path, alpha in jax.tree.leaves_with_path(s.alpha)
    }
