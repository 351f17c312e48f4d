"""The training step: sample -> generate -> teacher -> generator's update -> student's KL update.

Everything here is pure and unaware of devices, but for the name of the axis over which a batch may
be split: means, statistics and gradients are those of the global batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ait_jax.generators import Generator
from ait_jax.generators.base import example_keys
from ait_jax.methods import losses
from ait_jax.methods.phases import Phase, Plan
from ait_jax.methods.transforms import Transform, transform_images
from ait_jax.promotion import cast_floating, promoting
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.taps import Outputs, apply_tapped
from ait_jax.training.crossings import count_crossings, last_alphas
from ait_jax.training.state import AITState, Frozen

__all__ = ["Step", "StepBuilder", "repeated"]

# Random numbers of transforms are not those of the images.
_TRANSFORM_STREAM = 0x7A25


class Images(NamedTuple):
    """A batch of synthetic images, and what the teacher makes of it.

    Attributes:
        images: [N, H, W, C].
        targets: labels [N] or probabilities [N, classes].
        teacher: what was seen of the teacher; None before it has seen them.
    """

    images: jax.Array
    targets: jax.Array
    teacher: Outputs | None

    def constant(self) -> "Images":
        """The same for the student, which learns from it: float32 images, without a gradient."""
        made = jax.lax.stop_gradient(self)
        return made._replace(images=made.images.astype(jnp.float32))


# step(state, frozen, example_ids) -> (state, metrics); `axis_name` is bound by the builder.
Step = Callable[[AITState, Frozen, jax.Array], tuple[AITState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class StepBuilder:
    """The parts of a run, from which `build` makes the step of each phase.

    Attributes:
        teacher: the model of teacher and student.
        quantized: its quantized apply.
        generator: makes the images.
        generator_tx: the generator's optimizer.
        student_tx: the student's optimizer, Gradient Inundation last.
        learned_tx: the optimizer of what quantizers learn, if they do.
        fraction: the schedule of T, called with the count of student steps.
        plan: the phases.
        generator_losses: the terms of the generator's loss; the paper's if not given.
        student_losses: the terms of the student's; the paper's if not given.
        transforms: what is done to images before the student sees them.
        num_classes: width of the logits; transforms mix targets of that width.
        compute_dtype: in which generator and teacher run. Parameters, statistics and losses are
            float32 throughout, and so is the student, whose codes must not depend on it.
    """

    teacher: Any
    quantized: QuantizedModel
    generator: Generator
    generator_tx: optax.GradientTransformation
    student_tx: optax.GradientTransformation
    fraction: Callable[[jax.Array], Any]
    plan: Plan
    generator_losses: Sequence[losses.Term] = dataclasses.field(
        default_factory=lambda: losses.default_terms(losses.GENERATOR_LOSSES)
    )
    student_losses: Sequence[losses.Term] = dataclasses.field(
        default_factory=lambda: losses.default_terms(losses.STUDENT_LOSSES)
    )
    transforms: Sequence[Transform] = ()
    num_classes: int = 0
    compute_dtype: Any = jnp.float32
    learned_tx: optax.GradientTransformation | None = None

    def build(
        self,
        phase: Phase,
        *,
        calibrate: bool,
        axis_name: str | None,
        gathered: Callable[..., Any] | None = None,
    ) -> Step:
        """The pure step of one phase.

        Args:
            phase: of the plan.
            calibrate: whether activation ranges follow the batch.
            axis_name: the axis over which the batch is split, if any.
            gathered: `gathered(params, dtype=None)` makes parameters whole where they are used, if
                devices hold parts of them, and casts them.

        Returns:
            The step. Its metrics are float32 scalars, equal on all devices, by slash-named key.
        """
        gathered = gathered or cast_floating
        if phase.own is not None:
            own = phase.own.build(self, axis_name=axis_name, gathered=gathered)

            def own_step(state, frozen, example_ids):
                state, metrics = own(state, frozen, example_ids)
                return state._replace(step=state.step + 1), metrics

            return own_step

        transforms = self.transforms if phase.student else ()

        def step(state, frozen, example_ids):
            batch = self.generator.sample(frozen.key, state.step, example_ids)
            metrics: dict[str, jax.Array] = {}
            if phase.generator:
                state, images, metrics = self._train_generator(
                    state, frozen, batch, axis_name, gathered
                )
            else:
                params = state.generator["params"]
                images, _ = self._generated(params, state, batch, axis_name, gathered)
            if transforms:
                keys = jax.random.fold_in(frozen.key, _TRANSFORM_STREAM)
                keys = example_keys(keys, state.step, example_ids)
                images = self._transformed(transforms, keys, images, axis_name)
            if transforms or not phase.generator:
                seen = self.seen(images.images, frozen, axis_name)
                images = images._replace(teacher=seen)
            images = images.constant()
            if phase.student:
                state, student_metrics = self._train_student(
                    state, frozen, images, phase, calibrate, axis_name, gathered
                )
                metrics |= student_metrics
            elif calibrate:
                _, ranges = self._student(
                    (gathered(state.student), state.ranges, state.grids),
                    frozen,
                    images.images,
                    calibrate,
                    axis_name,
                )
                state = state._replace(ranges=ranges)
            return state._replace(step=state.step + 1), metrics

        return step

    def _generated(self, params, state, batch, axis_name, gathered):
        """What the generator makes of a batch, and its new statistics."""
        variables = {
            "params": gathered(params, self.compute_dtype),
            "batch_stats": state.generator["batch_stats"],
        }
        with jax.named_scope("generator"):
            images, new_stats = self.generator.apply(
                variables, cast_floating(batch, self.compute_dtype), axis_name=axis_name
            )
        return Images(images, self.generator.targets(batch), None), new_stats

    def images(
        self,
        state: AITState,
        frozen: Frozen,
        example_ids: jax.Array,
        axis_name: str | None,
        gathered: Callable[..., Any],
    ) -> Images:
        """The images of a step in which the generator does not train, without transforms.

        Args:
            state: before the step.
            frozen: holds teacher and key.
            example_ids: of one device.
            axis_name: the axis over which the batch is split, if any.
            gathered: as for `build`.
        """
        batch = self.generator.sample(frozen.key, state.step, example_ids)
        params = state.generator["params"]
        made, _ = self._generated(params, state, batch, axis_name, gathered)
        return made._replace(teacher=self.seen(made.images, frozen, axis_name)).constant()

    def seen(self, images: jax.Array, frozen: Frozen, axis_name: str | None) -> Outputs:
        """What the teacher makes of images.

        Args:
            images: [N, H, W, C].
            frozen: holds the teacher.
            axis_name: the axis over which the batch is split, if any.
        """
        params = cast_floating(frozen.teacher["params"], self.compute_dtype)
        with jax.named_scope("teacher"):
            # The user's model may not expect to be cast.
            return promoting(apply_tapped)(
                self.teacher,
                frozen.teacher | {"params": params},
                images,
                axis_name=axis_name,
                site_options=self.quantized.policy.site_options,
            )

    def _transformed(self, transforms, keys, made, axis_name):
        """Images as the student is to see them, with the mixture of what was aimed at."""
        made = jax.lax.stop_gradient(made)
        targets = made.targets
        if targets.ndim == 1:
            targets = jax.nn.one_hot(targets, self.num_classes)
        with jax.named_scope("transforms"):
            images, targets = transform_images(transforms, keys, made.images, targets, axis_name)
        return Images(images, targets, None)

    def _train_generator(self, state, frozen, batch, axis_name, gathered):
        def loss_fn(params):
            made, new_stats = self._generated(params, state, batch, axis_name, gathered)
            made = made._replace(teacher=self.seen(made.images, frozen, axis_name))

            def student():
                constant = jax.lax.stop_gradient(
                    (gathered(state.student), state.ranges, state.grids)
                )
                return self._student(constant, frozen, made.images, False, axis_name)[0]

            with jax.named_scope("teacher"):
                outputs = losses.GeneratorOutputs(
                    made.images,
                    made.targets,
                    made.teacher.logits,
                    made.teacher,
                    frozen.teacher["batch_stats"],
                    student,
                )
                values = losses.term_values(self.generator_losses, outputs)
            loss = losses.weighted_sum(self.generator_losses, values)
            return loss, (made, new_stats, values)

        params = state.generator["params"]
        grads, (made, new_stats, values) = jax.grad(loss_fn, has_aux=True)(params)
        own = {t.name: values[t.name] for t in self.generator_losses if not t.of_all_devices}
        grads, own = _pmean((grads, own), axis_name)
        values |= own
        with jax.named_scope("generator_update"):
            updates, opt_state = self.generator_tx.update(grads, state.generator_opt, params)
            params = optax.apply_updates(params, updates)
        state = state._replace(
            generator={"params": params, "batch_stats": new_stats}, generator_opt=opt_state
        )
        metrics = {
            "generator/loss": losses.weighted_sum(self.generator_losses, values),
            **{f"generator/{name}": value for name, value in values.items()},
        }
        return state, made, metrics

    def _student(self, student, frozen, images, calibrate, axis_name):
        """What is seen of a student `(params, ranges, grids)`, and its ranges."""
        params, ranges, grids = student
        return self.quantized.apply_tapped(
            params,
            frozen.teacher["batch_stats"],
            images,
            ranges,
            grids=grids,
            calibrate=calibrate,
            axis_name=axis_name,
        )

    def _train_student(self, state, frozen, images, phase, calibrate, axis_name, gathered):
        def loss_fn(trained):
            params, learned = trained
            quantizers = self.quantized.with_learned(state.ranges, state.grids, learned)
            with jax.named_scope("student"):
                seen, ranges = self._student(
                    (gathered(params), *quantizers), frozen, images.images, calibrate, axis_name
                )
            outputs = losses.StudentOutputs(
                images.images,
                images.targets,
                images.teacher.logits,
                seen.logits,
                images.teacher,
                seen,
                frozen.teacher["batch_stats"],
            )
            values = losses.term_values(self.student_losses, outputs)
            loss = losses.weighted_sum(self.student_losses, values)
            return loss, (ranges, seen.logits, values)

        (loss, (ranges, logits, values)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            (state.student, self.quantized.learned(state.ranges, state.grids))
        )
        teacher_logits = images.teacher.logits
        agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher_logits, -1))
        grads, (loss, values, agreement) = _pmean((grads, (loss, values, agreement)), axis_name)
        # Grids first: Gradient Inundation counts on those that the new weights are put on.
        ranges, grids, learned_opt = self._train_quantizers(state, ranges, grads[1])
        on_grids = {"grids": state.grids, "next_grids": grids} if state.grids else {}
        with jax.named_scope("student_update"):
            updates, opt_state = optax.with_extra_args_support(self.student_tx).update(
                grads[0], state.student_opt, state.student, **on_grids
            )
            student = optax.apply_updates(state.student, updates)
        before = self.plan.start(phase) - self.plan.student_steps_before(phase)
        fraction = self.fraction(state.step - before)
        with jax.named_scope("crossings"):
            totals, crossing_metrics = count_crossings(
                self.quantized.policy,
                (state.student, state.grids),
                (student, grids),
                state.totals,
                fraction,
            )
        metrics = {
            "student/loss": loss,
            **{f"student/{name}": value for name, value in values.items()},
            "student/agreement": agreement,
            "gi/fraction": jnp.asarray(fraction, jnp.float32),
            **crossing_metrics,
            **last_alphas(opt_state),
        }
        state = state._replace(
            student=student,
            student_opt=opt_state,
            ranges=ranges,
            totals=totals,
            grids=grids,
            learned_opt=learned_opt,
        )
        return state, metrics

    def _train_quantizers(self, state, ranges, grads):
        """Ranges and grids with what an optimizer made of what they learn, and its state."""
        # In a step that calibrates, what was just observed is where it goes on from.
        learned = self.quantized.learned(ranges, state.grids)
        if self.learned_tx is None or not jax.tree.leaves(learned):
            return ranges, state.grids, state.learned_opt
        with jax.named_scope("student_update"):
            updates, opt_state = self.learned_tx.update(grads, state.learned_opt, learned)
            learned = optax.apply_updates(learned, updates)
        return *self.quantized.with_learned(ranges, state.grids, learned), opt_state


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


def _pmean(tree, axis_name):
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
