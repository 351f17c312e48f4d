"""The host loop, the only orchestrator: wire, resume, dispatch, log, save, evaluate."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from ait_jax.config import steps_per_dispatch
from ait_jax.cpu.freed_memory import release_freed_memory
from ait_jax.errors import UserError
from ait_jax.generators import Generator
from ait_jax.methods.losses import Term
from ait_jax.methods.phases import Phase
from ait_jax.quant.frozen import apply_frozen
from ait_jax.run import pictures
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.run.divergence import check_finite
from ait_jax.run.image_bank import save_arrays
from ait_jax.run.interruption import Interrupted, StopSignals, check_stop
from ait_jax.run.metrics import Progress, open_metrics
from ait_jax.run.predictions import Evaluator, Predictions, save_predictions
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import Teacher
from ait_jax.training import wiring
from ait_jax.training.diagnosis import Diagnosis, describe_diagnosis, moment_of
from ait_jax.training.estimate import estimate_run, log_estimate, memory_limit
from ait_jax.training.record import Record, describe_network, summarize
from ait_jax.training.state import AITState, Frozen
from ait_jax.training.student import TrainedStudent, kept_student, restore_best, to_integers
from ait_jax.training.synthetic import SyntheticImages

__all__ = ["Run"]

logger = logging.getLogger(__name__)


class Run:
    """One run of a config: everything wired, and the loop."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Workdir,
        teacher: Teacher,
        evaluator: Evaluator | None,
        generator: Generator | None = None,
        *,
        generator_losses: Sequence[Term] = (),
        student_losses: Sequence[Term] = (),
    ):
        """Wires the parts; nothing is compiled yet.

        Args:
            config: checked by `config.validate_config`.
            workdir: the run's folder, bound to the teacher.
            teacher: the trained network.
            evaluator: measures accuracy on real images; None to go without.
            generator: the config's, if none is given.
            generator_losses: further terms of the generator's loss.
            student_losses: further terms of the student's.

        Raises:
            UserError: if the batch does not divide over the devices, or the parts do not fit.
        """
        self.config, self.workdir = config, workdir
        self.teacher, self.evaluator = teacher, evaluator
        self.layout = wiring.layout_of_config(config)
        self.example_ids = self.layout.example_ids(config.train.batch_size)
        self.dispatched = steps_per_dispatch(config, jax.default_backend())
        self.builder = wiring.builder_of_config(
            config,
            teacher,
            generator,
            generator_losses=generator_losses,
            student_losses=student_losses,
        )
        self.plan = self.builder.plan
        self.total_steps = self.plan.total_steps
        self.quantized, self.generator = self.builder.quantized, self.builder.generator
        self.frozen = self.layout.replicate(Frozen(teacher.variables, jax.random.key(config.seed)))
        self.checkpoints = Checkpoints(workdir.checkpoints, keep=config.train.keep_checkpoints)
        self.best = Checkpoints(workdir.best, keep=1)
        self.record = Record()
        self._compiled: dict[tuple[Phase, bool], Any] = {}
        self._synthetic = SyntheticImages(self.generator, config.seed, config.train.batch_size)
        forwards = self._teacher_forward, self._student_forward
        self._diagnosis = Diagnosis(self.quantized, teacher, evaluator, *forwards)

    def initial_state(self) -> AITState:
        """The state before the first step."""
        return self.layout.init(
            lambda frozen: wiring.first_state(self.builder, frozen), self.frozen
        )

    def compiled_step(self, state: AITState, step: int) -> Any:
        """The compiled `(state, frozen, example_ids) -> (state, metrics)` of the next dispatch.

        Args:
            state: of the right shapes.
            step: steps done.
        """
        (phase, calibrate), layout = self.plan.at(step), self.layout
        if (phase, calibrate) not in self._compiled:
            self._compiled.clear()  # A run never goes back, and each program takes 0.1 GiB.
            logger.info("compiling the %s step%s", phase.name, " with calibration" * calibrate)
            start = time.perf_counter()
            pure = wiring.phase_step(
                self.builder,
                layout,
                phase,
                calibrate=calibrate,
                dispatched=self.dispatched,
                unroll=jax.default_backend() == "cpu",
            )
            compiled = layout.compile(pure, state, self.frozen, self.example_ids)
            self._compiled[phase, calibrate] = compiled
            release_freed_memory()
            seconds = time.perf_counter() - start
            logger.info("compiled in %.1f s", seconds)
            self._add(compile_seconds=seconds)
        return self._compiled[phase, calibrate]

    # Records and events -------------------------------------------------------------------------

    def _add(self, **seconds: float) -> None:
        self.record = self.record._replace(
            **{key: getattr(self.record, key) + value for key, value in seconds.items()}
        )

    @contextlib.contextmanager
    def _timed(self, key: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(**{key: time.perf_counter() - start})

    def _predict(self, forward: Any, variables: Any) -> Predictions:
        assert self.evaluator is not None
        with self._timed("evaluation_seconds"):
            return self.evaluator.predict(forward, variables)

    def _keep(self, name: str, predictions: Predictions) -> None:
        if jax.process_index() == 0:
            save_predictions(self.workdir.predictions, name, predictions)

    def _evaluate_teacher(self) -> None:
        if self.evaluator is None or self.record.teacher_top1 is not None:
            return
        logger.info("evaluating the teacher")
        predictions = self._predict(self._teacher_forward, self.frozen.teacher)
        self._keep("teacher", predictions)
        self.record = self.record._replace(teacher_top1=predictions.top1)
        logger.info("teacher: top-1 %.2f %%", predictions.top1)

    def _teacher_forward(self, variables, images):
        return apply_frozen(self.teacher.model, variables, images)

    def _student_forward(self, variables, images):
        params, batch_stats, ranges, grids = variables
        return self.quantized.apply(params, batch_stats, images, ranges, grids=grids)[0]

    def _student(self, state: AITState) -> Any:
        batch_stats = self.frozen.teacher["batch_stats"]
        return self.layout.gathered((state.student, batch_stats, state.ranges, state.grids))

    def _evaluate_student(self, state: AITState, step: int) -> None:
        if self.evaluator is None:
            return
        predictions = self._predict(self._student_forward, self._student(state))
        top1 = predictions.top1
        if step == self.plan.first_student_step:
            self.record = self.record._replace(ptq_top1=top1)
            logger.info("teacher's weights rounded (PTQ): top-1 %.2f %%", top1)
        else:
            logger.info("student at step %d: top-1 %.2f %%", step, top1)
        self.record = self.record._replace(last_top1=top1)
        self.write_row({"step": step, "eval/top1": top1})
        # PTQ counts as a student too: where training only harms, the best is not to train.
        best = self.record.best_top1
        if best is None or top1 > best or self.config.train.keep_student == "last":
            self.record = self.record._replace(best_top1=top1, best_step=step)
            student = kept_student(state.student, state.ranges, state.grids)
            self.best.save(step, student, {"top1": top1, "step": step})
            self._keep("student", predictions)

    def _evaluate_integers(self, best: TrainedStudent) -> float | None:
        assert self.evaluator is not None
        found = to_integers(self.quantized, self.teacher, best)
        if found is None:
            return None
        integer, variables = found
        predictions = self._predict(integer.apply, self.layout.replicate(variables))
        self._keep("integers", predictions)
        logger.info("integers: top-1 %.2f %%", predictions.top1)
        return predictions.top1

    def _diagnose(self, state: AITState, step: int, moment: str) -> None:
        with self._timed("evaluation_seconds"):
            images, _ = self._synthetic(self.layout.gathered(state.generator), step)
            student, last = self._student(state), step == self.total_steps
            found = self._diagnosis(moment, step, student, images, last=last)
        self.record = self.record._replace(diagnosis=(*self.record.diagnosis, found))

    def _save(self, state: AITState, step: int) -> None:
        self.best.wait()  # The record must not name a student that a kill could still undo.
        record = self.record._replace(seconds=self._seconds())
        self.checkpoints.save(
            step, state.saved(), record.saved() | {"teacher": self.teacher.fingerprint}
        )

    def _seconds(self) -> float:
        return self.record.seconds + time.perf_counter() - self._started

    def _save_pictures(self, state: AITState, step: int) -> None:
        variables = self.layout.gathered(state.generator)
        if jax.process_index() != 0:
            return
        images, classes = self._synthetic(variables, step)
        path = self.workdir.images / f"step_{step:06d}.png"
        pictures.save_class_grid(path, self.teacher.preprocess.invert(images), classes)

    def _due(self, step: int) -> tuple[bool, bool, bool]:
        """Whether to evaluate, save and draw after `step`; all at the end, unless switched off."""
        last = step == self.total_steps
        trained = step - self.plan.first_student_step
        evaluate = last or (trained >= 0 and trained % self.config.train.eval_every == 0)
        saves, pictures_every = self.config.train.checkpoint_every, self.config.log.images_every
        save = last or (saves > 0 and step % saves == 0)
        draw = pictures_every > 0 and (last or step % pictures_every == 0)
        return evaluate, save, draw

    # The loop -----------------------------------------------------------------------------------

    def _resume(self) -> tuple[AITState, int]:
        # The order of what is restored: state (weights, optimizers, ranges, totals), then record.
        state = self.initial_state()
        step = self.checkpoints.latest_step()
        if step is None:
            return wiring.with_given_images(state, self.config, self.layout), 0
        saved, record = self.checkpoints.restore(step, state.saved())
        state = state.restored(saved)
        if record.pop("teacher", None) != self.teacher.fingerprint:
            raise UserError(
                f"{self.checkpoints.path(step)}: the checkpoint belongs to a run with another "
                "teacher; choose another --workdir, or the same teacher.weights"
            )
        self.record = Record.of_saved(record)
        # A run that was stopped elsewhere may stand between two dispatches of this platform.
        self.dispatched = math.gcd(self.dispatched, step)
        logger.info("resuming at step %d of %d", step, self.total_steps)
        return state, step

    def write_row(self, row: dict[str, Any]) -> None:
        """Takes a row of metrics, `step` among them; on all processes alike."""
        self.metrics.write(row)

    def run(self) -> dict[str, Any]:
        """Runs, or resumes what the workdir holds, to the end.

        Returns:
            The summary, also in `summary.json`: accuracies in percent, None without an evaluator.

        Raises:
            CheckpointError: if a checkpoint cannot be read or written.
            DivergedError: if a loss is NaN or infinite.
            Interrupted: after SIGTERM or SIGINT, the state being saved.
        """
        self._started = time.perf_counter()
        logger.info("%s (quant.sites = %r)", self.quantized.kernel_reads, self.config.quant.sites)
        if self.teacher.preprocess.warning:
            logger.warning("%s", self.teacher.preprocess.warning)
        self._log_estimate()
        state, step = self._resume()
        self.metrics = open_metrics(self.workdir, resume_step=step)
        progress = Progress(
            self.plan.at(step)[0].name,
            total=self.total_steps,
            done=step,
            log_every=self.config.log.every,
            batch_size=self.config.train.batch_size,
        )
        try:
            check_stop()
            with StopSignals() as signals:
                self._evaluate_teacher()
                state = self._loop(state, step, signals, progress)
            self.checkpoints.wait()
            self.best.wait()
        finally:
            progress.close()
            self.metrics.close()
        return self._summary(state)

    def _log_estimate(self) -> None:
        # The warning must come before the state is made.
        state = jax.eval_shape(self.initial_state)
        estimate = estimate_run(state, self.frozen, held=self.layout.device_shapes(state))
        log_estimate(estimate, memory_limit())

    def _loop(
        self, state: AITState, start: int, signals: StopSignals, progress: Progress
    ) -> AITState:
        """Steps from `start` on; a state that was resumed has had its step's events already."""
        pending, step = None, start
        while step < self.total_steps:  # Which may change on the way.
            dispatch = self.compiled_step(state, step)
            step += self.dispatched
            began = time.perf_counter()
            state, metrics = dispatch(state, self.frozen, self.example_ids)
            # The dispatch before has ended by now, or nearly so: its metrics cost no waiting, and
            # the device has work while the host looks at them.
            self._report(pending, progress)
            pending = (step, metrics)
            evaluate, save, draw = self._due(step)
            moment = moment_of(self.plan, step) if self.config.log.diagnosis else None
            stop = signals.due()
            ended = self.plan.ended(step)
            if evaluate or save or draw or moment or ended or stop is not None:
                # Events see a state whose losses are known to be finite.
                self._report(pending, progress)
                pending = None
            elapsed = time.perf_counter() - began
            phase, _ = self.plan.at(step - 1)
            self.record = self.record.after_steps(phase, self.dispatched, elapsed)
            if evaluate:
                self._evaluate_student(state, step)
            if moment:
                self._diagnose(state, step, moment)
            with self._timed("saving_seconds"):
                if ended and ended.results:
                    save_arrays(self.workdir.path, self.layout.gathered(ended.results(state)))
                if draw:
                    self._save_pictures(state, step)
                if save or stop is not None:
                    self._save(state, step)
            if stop is not None and step < self.total_steps:
                self.checkpoints.wait()
                raise Interrupted(stop, step)
        return state

    def _report(self, pending: tuple[int, dict[str, jax.Array]] | None, progress: Progress) -> None:
        if pending is None:
            return
        last, metrics = pending
        steps = range(last - self.dispatched + 1, last + 1)
        shown = [name for name in metrics if name.endswith("/loss") or name == "gi/crossed"]
        fetched = jax.device_get({name: metrics[name] for name in shown})
        watched = {name: np.atleast_1d(column) for name, column in fetched.items()}
        values: dict[str, Any] = {}
        for i, step in enumerate(steps):
            values = {name: float(column[i]) for name, column in watched.items()}
            check_finite(step, values, self.checkpoints)
        if "gi/crossed" in values:
            values["crossed"] = f"{100 * values.pop('gi/crossed'):.3g} %"
        progress.update(last, values, label=self.plan.at(last - 1)[0].name)
        due = [s for s in steps if s % self.config.log.every == 0 or s == self.total_steps]
        if due:
            columns = {name: np.atleast_1d(x) for name, x in jax.device_get(metrics).items()}
            for step in due:
                row = {name: float(column[step - steps[0]]) for name, column in columns.items()}
                self.write_row({"step": step, **row})

    def _summary(self, state: AITState) -> dict[str, Any]:
        integer_top1 = None
        best = restore_best(self.best, self.quantized, self.teacher)
        if self.evaluator is not None and best is not None:
            # A run that went back to an earlier checkpoint, and on with other devices, may find
            # there a better student than it makes itself.
            self.record = self.record._replace(best_top1=best.top1, best_step=best.step)
            integer_top1 = self._evaluate_integers(best)
        record = self.record._replace(seconds=self._seconds())
        network = describe_network(self.quantized, self.teacher.variables, state.ranges)
        diagnosis = describe_diagnosis(record.diagnosis, network)
        totals = jax.device_get(state.totals)
        summary = summarize(self.config, self.plan, record, totals, network, diagnosis) | {
            "integer_top1": integer_top1
        }
        self.workdir.write_results(summary, network, diagnosis)
        return summary
