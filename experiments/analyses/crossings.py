r"""Which integer codes change as a student trains, with Gradient Inundation and without.

    python -m experiments.analyses.crossings \
        --config=configs/cifar10_resnet20.py:gdfq,ait,w4a4,cpu \
        --out=experiments/results/crossings_w4a4 --every=10 --config.teacher.weights=resnet20.th

Both students start from the state after warm-up and see the same synthetic images: the generator
learns from the teacher alone, so it is trained up to there once. Everything else is the config's,
`gi.enabled` aside. An interrupted program starts anew.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from ait_jax import main as program  # Defines --config.
from ait_jax.command_line import USER_ERROR, run_with_flags, tell
from ait_jax.config import validate_config
from ait_jax.errors import UserError
from ait_jax.quant import affine
from ait_jax.quant.params import code_tree
from ait_jax.quant.policy import QuantPolicy, leaf_name, tensor_layer
from ait_jax.run.divergence import DivergedError
from ait_jax.run.metrics import Progress
from ait_jax.teacher import Teacher
from ait_jax.training.loop import Run
from ait_jax.training.state import AITState
from experiments.analyses import crossings_page, figures, runs
from experiments.analyses.crossings_page import Bin, Change, Crossings

VARIANTS = {"on": True, "off": False}  # gi.enabled, by name.

# Distances are below half a step, but for weights beyond the first and the last threshold.
_BINS = 20


class Tally(NamedTuple):
    """How codes and levels (see `code_levels`) have changed: dictionaries by tensor, on the device.

    Attributes:
        first: int8, the codes before training.
        last: int8, those of the step before.
        first_levels: float32.
        last_levels: float32.
        ever: bool, whether a code has differed from the first one at least once.
        ever_levels: bool, likewise of levels.
        changes: int32 scalars, codes changed from one step to the next, since `read_tally`.
        relabelled: int32 scalars, those of them that leave the level as it was.
    """

    first: dict[str, jax.Array]
    last: dict[str, jax.Array]
    first_levels: dict[str, jax.Array]
    last_levels: dict[str, jax.Array]
    ever: dict[str, jax.Array]
    ever_levels: dict[str, jax.Array]
    changes: dict[str, jax.Array]
    relabelled: dict[str, jax.Array]


class Seen(NamedTuple):
    """What `read_tally` has read of one tensor, as shares of it; see `crossings_page.Change`."""

    changed: float  # Since the last reading, and so is the next one.
    relabelled: float
    ever: float
    now: float
    ever_value: float
    now_value: float


# Counting -----------------------------------------------------------------------------------------


def code_levels(params: Any, policy: QuantPolicy) -> dict[str, jax.Array]:
    """`code + zero_point` of every quantized tensor, by name: float32, integral.

    It is the value that a code stands for, in quantization steps. Where the zero point of a channel
    moves by one, all its codes do, and their levels stay.
    """
    levels = {}
    for path, w in jax.tree.leaves_with_path(params):
        coder = policy.weight_codes(leaf_name(path))
        if coder is not None:
            _, zero_point = affine.weight_params(w, coder.bits, coder.channel_axis)
            levels[leaf_name(path)] = coder(w) + zero_point
    return levels


def start_tally(params: Any, policy: QuantPolicy) -> Tally:
    """The tally before the first step."""
    codes, levels = code_tree(params, policy), code_levels(params, policy)
    never = {name: jnp.zeros(c.shape, bool) for name, c in codes.items()}
    none = {name: jnp.zeros((), jnp.int32) for name in codes}
    return Tally(codes, codes, levels, levels, never, never, none, none)


def count(tally: Tally, params: Any, policy: QuantPolicy) -> Tally:
    """The tally after one more step, which has led to `params`; pure."""
    codes, levels = code_tree(params, policy), code_levels(params, policy)
    changed = {name: c != tally.last[name] for name, c in codes.items()}
    only_code = {
        name: changed[name] & (level == tally.last_levels[name]) for name, level in levels.items()
    }

    def differed(ever, now, first):
        return {name: ever[name] | (x != first[name]) for name, x in now.items()}

    def added(numbers, marked):
        return {name: numbers[name] + jnp.sum(m, dtype=jnp.int32) for name, m in marked.items()}

    return tally._replace(
        last=codes,
        last_levels=levels,
        ever=differed(tally.ever, codes, tally.first),
        ever_levels=differed(tally.ever_levels, levels, tally.first_levels),
        changes=added(tally.changes, changed),
        relabelled=added(tally.relabelled, only_code),
    )


def read_tally(tally: Tally) -> tuple[Tally, dict[str, Seen]]:
    """The tally to go on with, and what it holds, by tensor."""
    seen = {}
    for name, first in tally.first.items():
        numbers = (
            tally.changes[name],
            tally.relabelled[name],
            jnp.sum(tally.ever[name]),
            jnp.sum(tally.last[name] != first),
            jnp.sum(tally.ever_levels[name]),
            jnp.sum(tally.last_levels[name] != tally.first_levels[name]),
        )
        seen[name] = Seen(*(int(number) / first.size for number in numbers))
    none = jax.tree.map(jnp.zeros_like, tally.changes)
    return tally._replace(changes=none, relabelled=none), seen


def threshold_distances(w: jax.Array, coder: affine.WeightCodes) -> jax.Array:
    """How far each weight is from the nearest threshold at which its code changes.

    Args:
        w: weights, any shape.
        coder: their codes.

    Returns:
        float32, of the shape of `w`, in quantization steps of w's own grid: at most 0.5 between two
        thresholds, more beyond the first or the last one, where clipping leaves none further out.
    """
    low, high = affine.code_limits(coder.bits)
    scale, zero_point = affine.weight_params(w, coder.bits, coder.channel_axis)
    position = scale * w.astype(jnp.float32) - zero_point
    return jnp.abs(position - jnp.clip(jnp.floor(position) + 0.5, low + 0.5, high - 0.5))


def histograms(params: Any, policy: QuantPolicy) -> dict[str, np.ndarray]:
    """Counts of `threshold_distances` in `_BINS` bins from 0 to 1, by tensor."""
    counts = {}
    for path, w in jax.tree.leaves_with_path(params):
        coder = policy.weight_codes(leaf_name(path))
        if coder is not None:
            distances = np.clip(np.asarray(threshold_distances(jnp.asarray(w), coder)), 0, 1)
            counts[leaf_name(path)] = np.histogram(distances, bins=_BINS, range=(0, 1))[0]
    return counts


# Training -----------------------------------------------------------------------------------------


def _variant(config: ml_collections.ConfigDict, teacher: Teacher, *, gi: bool) -> Run:
    config = config.copy_and_resolve_references()
    config.gi.enabled = gi
    config.train.steps_per_dispatch = 1  # Codes are compared after every step.
    return runs.unkept_run(config, teacher)


def _step(run: Run, state: AITState, step: int) -> tuple[AITState, dict[str, jax.Array]]:
    return run.compiled_step(state, step)(state, run.frozen, run.example_ids)


def _check_finite(metrics: dict[str, jax.Array], step: int, where: str) -> None:
    for name in ("generator/loss", "student/loss"):
        if name in metrics and not math.isfinite(metrics[name]):
            raise DivergedError(f"step {step}, {where}: {name} = {float(metrics[name])}")


def _warmed_up(run: Run) -> AITState:
    """The state before the first student step, on the host."""
    state = run.initial_state()
    progress = Progress("warm-up", total=run.plan.first_student_step, done=0, log_every=100)
    for step in range(run.plan.first_student_step):
        state, metrics = _step(run, state, step)
        progress.update(step + 1)
    progress.close()
    if run.plan.first_student_step:
        _check_finite(metrics, run.plan.first_student_step, "warm-up")
    return jax.device_get(state)


def _trained(
    run: Run, warm: AITState, every: int, gi: str, layers: dict[str, str]
) -> tuple[list[Change], AITState]:
    """Trains the student from `warm` on; the rows, and the last state."""
    state = run.initial_state()  # The optimizer's state depends on Gradient Inundation.
    for_both = {key: getattr(warm, key) for key in ("step", "generator", "generator_opt", "ranges")}
    state = state._replace(**jax.tree.map(jnp.array, for_both))
    policy = run.quantized.policy
    observe = jax.jit(lambda tally, params: count(tally, params, policy))
    tally = start_tally(state.student, policy)
    rows: list[Change] = []
    cumulative, last = dict.fromkeys(layers, 0.0), 0
    steps = run.total_steps - run.plan.first_student_step
    progress = Progress(f"GI {gi}", total=steps, done=0, log_every=100)
    for step in range(1, steps + 1):
        state, metrics = _step(run, state, run.plan.first_student_step + step - 1)
        tally = observe(tally, state.student)
        progress.update(step)
        if step % every and step != steps:
            continue
        _check_finite(metrics, step, f"GI {gi}")
        tally, seen = read_tally(tally)
        for name, layer in layers.items():
            shares, passed = seen[name], step - last
            cumulative[name] += shares.changed
            rows.append(
                Change(
                    gi=gi,
                    step=step,
                    layer=layer,
                    weights=tally.first[name].size,
                    changed=shares.changed / passed,
                    relabelled=shares.relabelled / passed,
                    cumulative=cumulative[name],
                    ever=shares.ever,
                    now=shares.now,
                    ever_value=shares.ever_value,
                    now_value=shares.now_value,
                )
            )
        last = step
    progress.close()
    return rows, state


def _layers(run: Run) -> dict[str, str]:
    """The layers by the names of their kernels, in the order of execution."""
    return {name: tensor_layer(name) for name, _ in run.quantized.policy.kernels}


def measure(config: ml_collections.ConfigDict, teacher: Teacher, every: int) -> Crossings:
    """Trains the student with Gradient Inundation and without, and counts.

    Args:
        config: checked by `config.validate_config`.
        teacher: of the config.
        every: student steps from one row to the next; the last step has one always.

    Raises:
        UserError: if there is no student step, the batch does not divide over the devices, or the
            parts do not fit.
        DivergedError: if a loss is NaN or infinite.
    """
    if config.train.steps < 1:
        raise UserError(f"train.steps = {config.train.steps} is not allowed: no code can change")
    runs.check_papers_grids(config)
    variants = {name: _variant(config, teacher, gi=gi) for name, gi in VARIANTS.items()}
    layers = _layers(variants["on"])
    warm = _warmed_up(variants["on"])
    changes: list[Change] = []
    misses, params = {}, {"before": warm.student}
    for name, run in variants.items():
        rows, state = _trained(run, warm, every, name, layers)
        changes += rows
        misses[name] = int(state.totals.misses)
        params[name] = jax.device_get(state.student)
    edges = np.linspace(0, 1, _BINS + 1)
    distances = []
    for name, tree in params.items():
        counts = histograms(tree, variants["on"].quantized.policy)
        distances += [
            Bin(name, layer, float(edges[i]), float(edges[i + 1]), int(counts[kernel][i]))
            for kernel, layer in layers.items()
            for i in range(_BINS)
        ]
    return Crossings(changes, distances, misses)


def main(argv: list[str]) -> int:
    """Measures and writes; returns the exit code."""
    program.prepare(argv, ("config", "out"))
    values = flags.FLAGS
    config = values.config
    try:
        figures.require_matplotlib()
        validate_config(config)
        out = figures.open_folder(values.out)
        crossings = measure(config, runs.config_teacher(config, out), values.every)
        crossings_page.write(out, config, crossings)
    except UserError as error:
        tell(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same line starts anew", file=sys.stderr, flush=True)
        return 130
    print((out / "crossings.md").read_text())
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder of tables, pictures and the paragraph.")
    flags.DEFINE_integer("every", 10, "Student steps between rows.", lower_bound=1)
    run_with_flags(main, program.parse_flags)
