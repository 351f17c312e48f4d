r"""The angle between the student's gradients of cross entropy and KL distance, as it trains.

    python -m experiments.analyses.gradient_angle \
        --config=configs/cifar10_resnet20.py:gdfq,w4a4,cpu \
        --out=experiments/results/gradient_angle --every=20 \
        --config.teacher.weights=resnet20.th --config.data.dir=$HOME/tensorflow_datasets

The student trains as the config's run would. Every `--every` steps both gradients are taken on the
synthetic images of the next step, and on as many real ones, drawn from the evaluation data with
their labels. (They are looked at, never trained on.) An interrupted program starts anew.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from ait_jax import main as program  # Defines --config.
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.config import validate_config
from ait_jax.data import sources
from ait_jax.errors import UserError
from ait_jax.methods import losses
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.policy import leaf_name, tensor_layer
from ait_jax.run.divergence import DivergedError
from ait_jax.run.metrics import Progress
from ait_jax.teacher import Teacher
from ait_jax.training.loop import Run
from ait_jax.training.state import AITState
from experiments.analyses import figures, geometry, gradient_angle_page, runs
from experiments.analyses.gradient_angle_page import ALL, Angle

__all__ = ["angles", "measure"]


def angles(
    forward: Callable[[Any], jax.Array],
    params: Any,
    targets: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    reduction: str,
) -> dict[str, Any]:
    """Both losses, and the inner products of their gradients; pure.

    Args:
        forward: params -> logits [N, classes].
        params: the student's.
        targets: labels [N] or probabilities [N, classes].
        teacher_logits: [N, classes].
        temperature: of the KL distance.
        reduction: of the KL distance.

    Returns:
        `ce` and `kl`, float32 scalars, and `products`: float32 [3] by name of each tensor, the
        products CE·KL, CE·CE and KL·KL.
    """
    logits, backward = jax.vjp(forward, params)
    ce, to_ce = jax.value_and_grad(losses.cross_entropy)(logits, targets)
    kl, to_kl = jax.value_and_grad(losses.kl_divergence)(
        logits, teacher_logits, temperature=temperature, reduction=reduction
    )
    (ce_gradient,), (kl_gradient,) = backward(to_ce), backward(to_kl)
    products = {
        leaf_name(path): jnp.stack([jnp.vdot(a, b), jnp.vdot(a, a), jnp.vdot(b, b)])
        for (path, a), b in zip(
            jax.tree.leaves_with_path(ce_gradient), jax.tree.leaves(kl_gradient)
        )
    }
    return {"ce": ce, "kl": kl, "products": products}


def _rows(step: int, kind: str, seen: dict[str, Any]) -> list[Angle]:
    by_layer: dict[str, np.ndarray] = {}
    for name, products in seen["products"].items():
        layer = name.rpartition("/")[0]
        by_layer[layer] = by_layer.get(layer, 0) + np.asarray(products, np.float64)
    whole = sum(by_layer.values())

    def row(layer: str, products: Any, *found: float) -> Angle:
        both, ce, kl = map(float, products)
        cosine = geometry.cosine(both, ce, kl)
        return Angle(step, kind, layer, cosine, math.sqrt(ce), math.sqrt(kl), *found)

    found = (float(seen["ce"]), float(seen["kl"]))
    return [row(ALL, whole, *found), *(row(*item) for item in by_layer.items())]


class _Probe:
    """Takes both gradients at a state of a run."""

    def __init__(self, run: Run, images: sources.Images):
        self._run, self._images = run, images
        self._random = np.random.default_rng(run.config.seed)
        self._measured = jax.jit(self._measure)
        self._batch = jax.jit(self._synthetic)
        self._teach = jax.jit(lambda variables, x: apply_frozen(run.teacher.model, variables, x))

    def _synthetic(self, frozen, state: AITState, example_ids):
        generator = self._run.generator
        batch = generator.sample(frozen.key, state.step, example_ids)
        return generator.apply(state.generator, batch)[0], generator.targets(batch)

    def _measure(self, frozen, state: AITState, images, targets, teacher_logits):
        def forward(params):
            statistics = frozen.teacher["batch_stats"]
            return self._run.quantized.apply(params, statistics, images, state.ranges)[0]

        settings = self._run.config.loss
        return angles(
            forward,
            state.student,
            targets,
            teacher_logits,
            temperature=settings.temperature,
            reduction=settings.reduction,
        )

    def __call__(self, state: AITState, step: int) -> list[Angle]:
        """The rows of a state, `step` student steps done."""
        frozen, size = self._run.frozen, self._run.config.train.batch_size
        ids = jnp.arange(size, dtype=jnp.int32)
        chosen = self._random.permutation(len(self._images.labels))[:size]
        pixels, labels = next(sources.gathered(self._images, [chosen]))
        batches = {
            "synthetic": self._batch(frozen, state, ids),
            "real": (self._run.teacher.preprocess(pixels), jnp.asarray(labels)),
        }
        rows = []
        for kind, (images, targets) in batches.items():
            images = images.astype(jnp.float32)
            taught = self._teach(frozen.teacher, images)
            seen = jax.device_get(self._measured(frozen, state, images, targets, taught))
            if not (math.isfinite(seen["ce"]) and math.isfinite(seen["kl"])):
                raise DivergedError(
                    f"student step {step}, {kind} images: CE = {seen['ce']}, KL = {seen['kl']}"
                )
            rows += _rows(step, kind, seen)
        return rows


def measure(
    config: ml_collections.ConfigDict, teacher: Teacher, images: sources.Images, every: int
) -> list[Angle]:
    """Trains the student and measures on the way.

    Args:
        config: checked by `config.validate_config`.
        teacher: of the config.
        images: real ones.
        every: student steps from one measurement to the next; before the first step and after the
            last there is one always.

    Returns:
        The rows, in the order of step, kind of images and layer.

    Raises:
        UserError: if there is no student step, or the parts do not fit.
        DivergedError: if a loss is NaN or infinite.
    """
    if config.train.steps < 1:
        raise UserError(f"train.steps = {config.train.steps} is not allowed: nothing is trained")
    runs.check_papers_grids(config)
    config = config.copy_and_resolve_references()
    config.train.steps_per_dispatch = 1  # Any step may be one to look at.
    run = runs.unkept_run(config, teacher)
    probe, rows = _Probe(run, images), []
    state = run.initial_state()
    progress = Progress("angles", total=run.total_steps, done=0, log_every=config.log.every)
    for done in range(run.total_steps + 1):
        step = done - run.plan.first_student_step
        if step >= 0 and (step % every == 0 or done == run.total_steps):
            rows += probe(state, step)
        if done < run.total_steps:
            state, _ = run.compiled_step(state, done)(state, run.frozen, run.example_ids)
            progress.update(done + 1)
    progress.close()
    return rows


def main(argv: list[str]) -> int:
    """Measures and writes; returns the exit code."""
    program.prepare(argv, ("config", "out"))
    values = flags.FLAGS
    config = values.config
    try:
        figures.require_matplotlib()
        validate_config(config)
        out = figures.open_folder(values.out)
        images = runs.real_images(config)
        teacher = runs.config_teacher(config, out)
        rows = measure(config, teacher, images, values.every)
        layers = [tensor_layer(name) for name, _ in teacher.kernels]
        gradient_angle_page.write(out, config, rows, layers)
    except UserError as error:
        tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130
    print((out / "gradient_angle.md").read_text())
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of table, picture and paragraph.")
    flags.DEFINE_integer("every", 20, "Student steps between measurements.", lower_bound=1)
    run_with_flags(main, program.parse_flags)
