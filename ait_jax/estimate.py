"""What a run will need of each device, told before anything is compiled.

Parameters and state are counted exactly. The working memory of a step is an estimate from the
step's jaxpr: its equations run in the order in which they were traced, every result is kept until
its last use, and the most that is kept at once is what the step takes. What XLA really
takes differs: its temporaries, of three generators' steps compiled for CPU and for TPU v5e without
`generator.remat`, were between 0.8 and 1.5 times as much; of a step in which the student trains on
CPU, with small images, 1.6 times. With `generator.remat` the estimate is too low there.
"""

import collections
import logging
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core

from ait_jax.quant.jaxprs import INLINED, inner_jaxprs
from ait_jax.quant.policy import leaf_name
from ait_jax.state import AITState, Frozen
from ait_jax.step import StepBuilder

__all__ = [
    "Estimate",
    "estimate_run",
    "log_estimate",
    "memory_limit",
    "tree_bytes",
    "working_bytes",
]

logger = logging.getLogger(__name__)

# Calls that run once, with the outer operands.
_INLINED = (*INLINED, "custom_jvp_call", "custom_vjp_call")
# Results that are never made: the same numbers in another shape.
_VIEWS = ("broadcast_in_dim", "expand_dims", "optimization_barrier", "reshape", "squeeze")
# What needs its operands and its result in memory, both whole.
_WHOLE = ("conv_general_dilated", "dot_general")

_GIB = 2**30


class Estimate(NamedTuple):
    """What a run needs.

    Attributes:
        teacher_parameters: of the teacher, and so of the student.
        generator_parameters: of the generator.
        largest: name and size of the generator's largest tensor.
        state_bytes: of each device, held throughout: teacher, student, generator, and the state of
            both optimizers.
        generator_bytes: what the generator's part of a step takes of each device beside the state:
            activations and gradients of generator and teacher, about.
        student_bytes: the same of the student's part, which comes after it.
    """

    teacher_parameters: int
    generator_parameters: int
    largest: tuple[str, int]
    state_bytes: int
    generator_bytes: int
    student_bytes: int

    @property
    def step_bytes(self) -> int:
        """Of a whole step."""
        return max(self.generator_bytes, self.student_bytes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree (or of their `jax.ShapeDtypeStruct`s)."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def estimate_run(
    builder: StepBuilder,
    state: AITState,
    frozen: Frozen,
    image_shape: tuple[int, int, int],
    batch_size: int,
    *,
    held: AITState | None = None,
) -> Estimate:
    """What a run needs; traces, but compiles nothing.

    Args:
        builder: of the step.
        state: the run's state, or its shapes.
        frozen: what the step reads, or its shapes.
        image_shape: (H, W, C) of one image.
        batch_size: of one device.
        held: the shapes that one device holds of the state, if not all of it.
    """
    parameters = jax.tree.leaves_with_path(state.generator["params"])
    nothing: Any = ((), jax.ShapeDtypeStruct((0,), jnp.float32))  # of a mere sampler
    path, largest = max(parameters, key=lambda item: item[1].size, default=nothing)
    step = builder.build(builder.plan.phases[0], calibrate=False, axis_name=None)
    example_ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)

    # The student's optimizer works tensor by tensor, and to trace it takes longer than all else.
    def student_gradient(params, batch_stats, images, ranges):
        def loss(params):
            return jnp.sum(builder.quantized.apply(params, batch_stats, images, ranges)[0])

        return jax.grad(loss)(params)

    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    batch_stats = frozen.teacher["batch_stats"]
    held = state if held is None else held
    return Estimate(
        teacher_parameters=_count(frozen.teacher["params"]),
        generator_parameters=_count(state.generator["params"]),
        largest=(leaf_name(path), largest.size),
        state_bytes=tree_bytes((held, frozen)),
        generator_bytes=_gathered_bytes(state.generator, held.generator)
        + working_bytes(step, state, frozen, example_ids, donate_first=True),
        student_bytes=_gathered_bytes(state.student, held.student)
        + tree_bytes(images)
        + working_bytes(student_gradient, state.student, batch_stats, images, state.ranges),
    )


def _gathered_bytes(whole: Any, held: Any) -> int:
    """Of the arrays that a device holds in part, and gathers to work with."""
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(held), strict=True)
    return sum(_bytes(array) for array, part in pairs if array.shape != part.shape)


def working_bytes(fn: Callable[..., Any], *args: Any, donate_first: bool = False) -> int:
    """About what `fn(*args)` takes beside its arguments, results included.

    Elementwise operations that are used once count as part of what uses them, as XLA fuses them.
    What a convolution takes within itself is not known here.

    Args:
        fn: any traceable function of arrays.
        *args: its arguments, or their `jax.ShapeDtypeStruct`s.
        donate_first: whether the first argument's arrays may be overwritten.

    Returns:
        Bytes.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return _peak(jaxpr, overwritten=len(jax.tree.leaves(args[0])) if donate_first else 0)


def memory_limit() -> int | None:
    """Bytes that a device may use, where that is known; on CPU, where devices share, a share."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def log_estimate(estimate: Estimate, limit: int | None) -> None:
    """Logs what a run will need, and warns where that is more than there is.

    Args:
        estimate: of the run.
        limit: bytes of each device, see `memory_limit`; None if not known.
    """
    name, size = estimate.largest
    logger.info(
        "teacher %.2f M parameters, generator %.2f M (%s alone %.2f M)",
        *(estimate.teacher_parameters / 1e6, estimate.generator_parameters / 1e6, name, size / 1e6),
    )
    logger.info(
        "each device: state %.2f GiB, a step about %.2f GiB beside it",
        *(estimate.state_bytes / _GIB, estimate.step_bytes / _GIB),
    )
    needed = estimate.state_bytes + estimate.step_bytes
    if limit is None or needed <= limit:
        return
    if estimate.state_bytes > limit:
        logger.warning(
            "the state alone, %.1f GiB, is more than the %.1f GiB of a device, whatever the batch; "
            "what lowers it: another generator.name, teacher.image_shape, generator.latent_size "
            "(Qimera's with generator.embedding=random)",
            *(estimate.state_bytes / _GIB, limit / _GIB),
        )
    else:
        logger.warning(
            "about %.1f GiB are more than the %.1f GiB of a device; what lowers them: "
            "train.batch_size, more devices, teacher.image_shape, generator.remat=true, "
            "train.compute_dtype=bfloat16, another generator.name",
            *(needed / _GIB, limit / _GIB),
        )


class _Line(NamedTuple):
    reads: list[int]
    writes: list[int]
    whole: bool
    elementwise: bool
    inner: int  # bytes that it takes within itself


def _is_elementwise(eqn) -> bool:
    if len(eqn.outvars) != 1:
        return False
    shape = eqn.outvars[0].aval.shape
    return all(var.aval.shape in ((), shape) for var in eqn.invars)


def _flattened(jaxpr, env: dict[Any, int | None], sizes: list[int], lines: list[_Line]) -> None:
    """Appends a jaxpr's equations, those of calls inlined.

    Values are positions in `sizes`; one that takes no room is None.
    """

    def read(var):
        return None if isinstance(var, jex_core.Literal) else env[var]

    env.update(dict.fromkeys(jaxpr.constvars))
    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        name, bodies = eqn.primitive.name, list(inner_jaxprs(eqn))
        if name in _VIEWS:
            env.update(zip(eqn.outvars, operands))
        elif name in _INLINED and len(bodies) == 1:
            inner_env = dict(zip(bodies[0].invars, operands))
            _flattened(bodies[0], inner_env, sizes, lines)
            for outer, inner in zip(eqn.outvars, bodies[0].outvars):
                env[outer] = None if isinstance(inner, jex_core.Literal) else inner_env[inner]
        else:
            writes = list(range(len(sizes), len(sizes) + len(eqn.outvars)))
            sizes.extend(_bytes(var.aval) for var in eqn.outvars)
            env.update(zip(eqn.outvars, writes))
            whole = name in _WHOLE
            lines.append(
                _Line(
                    reads=[value for value in operands if value is not None],
                    writes=writes,
                    whole=whole,
                    elementwise=not (whole or bodies) and _is_elementwise(eqn),
                    inner=max(map(_peak, bodies), default=0),
                )
            )


def _fused(lines: list[_Line], sizes: list[int], kept: set[int | None]) -> list[_Line]:
    """Without the elementwise results that one line alone uses: that line reads their operands."""
    uses = collections.Counter(value for line in lines for value in line.reads)
    needed_whole = {value for line in lines if line.whole or line.inner for value in line.reads}
    operands: dict[int, list[int]] = {}
    fused = []
    for line in lines:
        reads = [origin for value in line.reads for origin in operands.pop(value, [value])]
        value = line.writes[0] if line.elementwise else -1
        # What is smaller than its operands, as masks are, would only keep these for longer.
        alone = uses[value] == 1 and value not in kept | needed_whole
        if alone and sizes[value] >= max((sizes[v] for v in reads), default=0):
            operands[value] = reads
        else:
            fused.append(line._replace(reads=reads))
    return fused


def _peak(jaxpr, overwritten: int = 0) -> int:
    """The most bytes of results that are kept at once.

    Args:
        jaxpr: a program.
        overwritten: how many first operands may be overwritten.
    """
    sizes = [_bytes(var.aval) for var in jaxpr.invars]
    env: dict[Any, int | None] = dict(zip(jaxpr.invars, range(len(sizes))))
    lines: list[_Line] = []
    _flattened(jaxpr, env, sizes, lines)
    kept = {env[var] for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)}
    kept |= set(range(overwritten, len(jaxpr.invars)))
    lines = _fused(lines, sizes, kept)
    last_use = {v: i for i, line in enumerate(lines) for v in (*line.reads, *line.writes)}
    live = peak = 0
    for i, line in enumerate(lines):
        dying = {v for v in (*line.reads, *line.writes) if last_use[v] == i} - kept
        given = sum(sizes[v] for v in dying.difference(line.writes))
        written = sum(sizes[v] for v in line.writes)
        peak = max(peak, live + max(written, line.inner) - (0 if line.whole else given))
        live += written - sum(sizes[v] for v in dying)
    return peak
