"""`zero_shot_quantize`: what the program does, as a function of a model."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from ait_jax.config import ConfigError
from ait_jax.convert.weights import fingerprint
from ait_jax.errors import UserError, did_you_mean
from ait_jax.generators import Bank, Generator, generator_of_config
from ait_jax.generators.bank import bank_size
from ait_jax.parallel import distributed
from ait_jax.run.interruption import Interrupted
from ait_jax.run.metrics import rows_until
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import Preprocess, Teacher, classifier_weights
from ait_jax.training.loop import Run
from ait_jax.training.state import AITState
from ait_jax.training.student import TrainedStudent, restore_best
from ait_jax.zero_shot.bring import Brought, bring
from ait_jax.zero_shot.networks import as_given
from ait_jax.zero_shot.pieces import check_generator, check_losses, evaluator_of, own_terms
from ait_jax.zero_shot.result import ZeroShotResult
from ait_jax.zero_shot.settings import config_of_call
from ait_jax.zero_shot.tensors import quantized_tensors

__all__ = ["zero_shot_quantize"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
LossTerms = Mapping[str, Callable[[Any], jax.Array]]

# What `sites` may be, and what the config calls it.
_SITES = {"auto": None, "activations": "paper", "kernel_inputs": "integer"}


class _LibraryRun(Run):
    """A run with the user's hooks, whose last state can be had."""

    final: AITState

    def __init__(self, *args: Any, on_metrics: Callable[[Row], Any] | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._on_metrics = on_metrics
        self._stopping = False

    def write_row(self, row: Row) -> None:
        super().write_row(row)
        self._see(row)

    def _see(self, row: Row) -> None:
        if self._on_metrics is not None and self._on_metrics(dict(row)):
            self._stopping = True

    def _stop_at(self, step: int) -> None:
        if self._stopping and step < self.total_steps:
            logger.info("on_metrics ends the run at step %d of %d", step, self.total_steps)
            self.total_steps = step
            self.plan = self.plan.until(step)  # for the summary

    def _resume(self) -> tuple[AITState, int]:
        state, step = super()._resume()
        # So that what the hook counts is as it was, and a run that it ended stays ended.
        for row in rows_until(self.workdir, step):
            self._see(row)
        self._stop_at(step)
        return state, step

    def _due(self, step: int) -> tuple[bool, bool, bool]:
        self._stop_at(step)
        return super()._due(step)

    def _summary(self, state: AITState) -> dict[str, Any]:
        self.final = state
        return super()._summary(state)

    def student(self, top1: float | None) -> TrainedStudent:
        """The student that the run kept if accuracy was measured, else the last."""
        best = restore_best(self.best, self.quantized, self.teacher)
        final = self.final
        last = TrainedStudent(final.student, final.ranges, final.grids, int(final.step), top1)
        return best or last


def zero_shot_quantize(
    model: Any,
    variables: Mapping[str, Any] | None = None,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    weight_bits: int = 4,
    activation_bits: int = 4,
    sites: str = "auto",
    recipe: str = "strong",
    keep_float: str = "",
    apply_kwargs: Mapping[str, Any] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    evaluation: tuple[Any, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    generator: Generator | None = None,
    generator_losses: LossTerms | None = None,
    student_losses: LossTerms | None = None,
    on_metrics: Callable[[Row], Any] | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
) -> ZeroShotResult:
    """Quantizes a trained model without data, by AIT; the step and the loop are the program's.

    Every parameter of two or more axes that enters a conv or a matmul is quantized, and so are
    tables called `embedding`; each index of an output axis has a grid of its own. Biases, norms
    and positions stay float.

    Args:
        model: a Linen module whose `__call__` takes images [N, H, W, C] and returns logits; or an
            NNX module likewise; or a pure function `(variables, images)` that returns logits, or
            `(logits, {name: what enters a normalization})` for those whose running statistics are
            `variables["batch_stats"][name]`, a `mean` and a `var`.
        variables: `params` and, if there are any, `batch_stats`; None for an NNX module. A
            function's `params` may be any pytree.
        image_shape: (H, W, C) of one image.
        num_classes: width of the logits.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        sites: where activations are quantized. "activations": after every ReLU and ReLU6, as in
            the paper, also where they are called as functions; "kernel_inputs": whatever else
            enters a conv or a matmul as well, whatever made it, the image at 8 bits; "auto": the
            former if every kernel then reads a quantized activation, an average of such ones
            (pooling) or the image, else the latter. The choice, and how many kernels read a
            quantized input, is logged, and in the result's summary.
        recipe: "strong", images that are optimised first, learned ranges and transforms (see
            docs/strong.md); or "paper", a generator that trains along, as in AIT. With a generator
            of your own, or `generator.name` among the settings, all images are that one's.
        keep_float: regex that matches the whole names of parameters to leave as they are.
        apply_kwargs: what the model takes beside images in inference, such as `{"train": False}`.
        mean: of images in [0, 1], by channel, where images are normalised by it: for pictures, and
            for `evaluation` with integer pixels.
        std: likewise.
        evaluation: `(images, labels)` to measure accuracy on: float images as the model takes
            them, or integers in 0..255, which are normalised; int labels [N].
        settings: values for keys of the program's config (`ait_jax/config/settings.py`), such as
            `{"train.steps": 2000, "generator.name": "qimera"}`. Without: 256 images in 60 steps
            each, then 800 steps of training at batch 64, learning rate 1e-3, decayed by a cosine:
            minutes for small images. `recipe="paper"`: 200 steps of warm-up, in which activation
            ranges are calibrated, and 800 of training, the rate decayed after a half and three
            quarters of them. The paper itself takes 800 and 79,200 at batch 200.
        generator: makes the images, in place of `generator.name` (see `ait_jax.generators.base`).
        generator_losses: terms added to the generator's loss, by name: each makes a scalar, weight
            included, of `ait_jax.GeneratorOutputs`. Metrics hold it as `generator/NAME`.
        student_losses: the same for the student, of `ait_jax.StudentOutputs`.
        on_metrics: called with each row of metrics (every `log.every` steps, and after each
            evaluation with `eval/top1`); where it returns something true, the run ends with the
            next step. A run that is resumed shows it the rows so far once more, so one that it
            ended stays ended. It must decide alike on all processes.
        workdir: folder of the run, resumed if it holds one; None: a temporary one.
        seed: of all random numbers.

    Returns:
        The student of the last step; with `recipe="paper"` (`train.keep_student="best"`) and where
        accuracy was measured, the best one.

    Raises:
        UserError: on anything that the user has to mend, before anything is compiled.
        Interrupted: after SIGTERM or SIGINT; with a workdir, the same call goes on; without, what
            was done is lost.
    """
    if sites not in _SITES:
        raise ConfigError(
            f"sites = {sites!r} is not allowed: it must be one of {', '.join(_SITES)}"
            f"{did_you_mean(sites, _SITES)}"
        )
    if workdir is None and jax.process_count() > 1:
        raise UserError(
            "workdir = None is not allowed with several processes: name a folder that "
            "all of them share"
        )
    config = config_of_call(
        {
            "image_shape": image_shape,
            "num_classes": num_classes,
            "mean": mean,
            "std": std,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "seed": seed,
        },
        settings or {},
        recipe=recipe,
        own_generator=generator is not None,
    )
    num_classes = config.teacher.num_classes
    brought = bring(
        model,
        variables,
        config.teacher.image_shape,
        num_classes,
        apply_kwargs or {},
        keep_float,
    )
    config.quant.sites = _SITES[sites] or _chosen_sites(brought)
    config.teacher.arch = config.config_name = _name(model)
    _tell(config, brought)
    if generator is None:
        params = brought.variables["params"]
        generator = generator_of_config(config, lambda: classifier_weights(params, num_classes))
    targets = check_generator(generator, config)
    if config.images.count and not isinstance(generator, Bank):
        shape, share = tuple(config.teacher.image_shape), config.images.share
        generator = Bank(shape, num_classes, bank_size(config), share, generator)
    check_losses(config, brought, targets, generator_losses or {}, student_losses or {})
    if on_metrics is not None and not callable(on_metrics):
        raise UserError(
            f"on_metrics = {on_metrics!r} is not allowed: it must be a function of a row"
        )
    preprocess = Preprocess(config.teacher.mean, config.teacher.std)
    teacher = Teacher(
        brought.model,
        brought.variables,
        preprocess,
        fingerprint(brought.variables),
        brought.kernels,
    )
    evaluator = None if evaluation is None else evaluator_of(evaluation, config, preprocess)
    with contextlib.ExitStack() as stack:
        folder = Workdir(stack.enter_context(_folder(workdir)), config)
        stack.enter_context(folder.removed_if_unused())
        distributed.together(lambda: stack.enter_context(folder.locked()))
        folder.bind(teacher.fingerprint)
        run = _LibraryRun(
            config,
            folder,
            teacher,
            evaluator,
            generator,
            on_metrics=on_metrics,
            generator_losses=own_terms(generator_losses),
            student_losses=own_terms(student_losses),
        )
        try:
            summary = run.run()
        except Interrupted as stop:
            if workdir is not None:
                raise
            raise Interrupted(stop.signal, stop.step, saved=False) from None
        student = run.student(summary["final_top1"])
        run.checkpoints.close()
        run.best.close()
    return ZeroShotResult(
        quantized=run.quantized,
        tensors=quantized_tensors(student.params, run.quantized.policy, student.grids),
        params=as_given(brought.model, "params", student.params),
        batch_stats=as_given(brought.model, "batch_stats", brought.variables["batch_stats"]),
        ranges=student.ranges,
        step=student.step,
        preprocess=preprocess,
        summary=summary | {"num_sites": len(run.quantized.sites)},
        workdir=None if workdir is None else folder.path,
    )


def _name(model: Any) -> str:
    return str(getattr(model, "__qualname__", None) or type(model).__name__)


def _chosen_sites(brought: Brought) -> str:
    """The paper's sites, unless more kernels read a quantized input with the others."""
    floats = {sites: reads.floats for sites, reads in brought.reads.items()}
    enough = brought.activations and floats["paper"] <= floats["integer"]
    return "paper" if enough else "integer"


def _tell(config: ml_collections.ConfigDict, brought: Brought) -> None:
    """Says what was chosen for the model, and drops what it has nothing for."""
    if config.quant.sites == "paper":
        where = f"after each of {brought.activations} ReLUs"
    else:
        where = f"at the inputs of kernels as well, {brought.inputs} places"
    logger.info(
        "%s: %d tensors of weights, activations %s, %d batch norms",
        *(config.config_name, len(brought.kernels), where, len(brought.batch_norms)),
    )
    reads = brought.reads[config.quant.sites]
    if reads.floats:
        why = ""
        if reads.loops:
            why += f"; those in a `{'`, a `'.join(reads.loops)}` read floats"
        if reads.floats > brought.reads["integer"].floats:
            why += "; sites='kernel_inputs' quantizes the input of every one outside of loops"
        logger.warning("%s: only %s%s", config.config_name, reads, why)
    if brought.probabilities:
        logger.warning(
            "%s seems to return probabilities: AIT compares logits, so leave out the softmax or "
            "sigmoid at its end",
            config.config_name,
        )
    if not brought.batch_norms and (config.loss.bns or config.loss.bns_std):
        logger.warning(
            "%s has no batch norms: images are made for the teacher's classes alone "
            "(loss.generator_ce), without statistics to match (BNS)",
            config.config_name,
        )
        config.loss.bns = config.loss.bns_std = 0.0


@contextlib.contextmanager
def _folder(workdir: str | Path | None) -> Iterator[str | Path]:
    if workdir is not None:
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="ait_jax_", ignore_cleanup_errors=True) as path:
        yield path
