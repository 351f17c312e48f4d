"""How many operations the step needs, and how fast this machine's convs can be.

Operations are those of convs and matmuls, counted in the jaxprs of the forward passes, so *after*
the algebra that saves some of them. The roofline is the fastest forward conv among the step's own.
"""

import math
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.quant.jaxprs import all_equations, inner_jaxprs

__all__ = ["Conv", "convs_of", "measure_roofline", "step_operations"]


class Conv(NamedTuple):
    """One conv: operand shapes and geometry; `repeats` of it in a step's forward passes."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def run(self, x, kernel):
        """The forward conv."""
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, self.strides, self.padding, dimension_numbers=dims
        )

    @property
    def operations(self) -> int:
        """Two for each multiply-add."""
        out = jax.eval_shape(self.run, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in self[:2]))
        return 2 * math.prod(out.shape) * math.prod(self.rhs[:3])


def _running(eqn):
    """The jaxprs of an equation that run on this platform."""
    inner = list(inner_jaxprs(eqn))
    platforms = eqn.params.get("branches_platforms")
    if not platforms:
        return inner
    # `jax.lax.platform_dependent`: one branch runs; the default has no name.
    here = [jax.default_backend() in (names or ()) for names in platforms]
    return [inner[here.index(True) if any(here) else -1]]


def convs_of(fn, *args) -> tuple[list[Conv], int]:
    """All convs that `fn(*args)` runs (groups of 1), and the operations of its matmuls."""
    convs, matmuls = [], 0
    for eqn in all_equations(jax.make_jaxpr(fn)(*args).jaxpr, _running):
        shapes = [var.aval.shape for var in eqn.invars]
        if eqn.primitive.name == "conv_general_dilated":
            params = eqn.params
            convs.append(Conv(*shapes[:2], params["window_strides"], params["padding"]))
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(shapes[0][axis] for axis in contracted)
            matmuls += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
    return convs, matmuls


def _forwards(run, batch_size: int):
    """(function, arguments) of the generator's and the network's forward pass."""
    ids = jnp.arange(batch_size, dtype=jnp.int32)
    state = jax.eval_shape(run.initial_state)
    batch = jax.eval_shape(run.generator.sample, run.frozen.key, 0, ids)
    images = jax.ShapeDtypeStruct((batch_size, *run.config.teacher.image_shape), jnp.float32)
    return {
        "generator": (lambda v, b: run.generator.apply(v, b)[0], state.generator, batch),
        "network": (run.teacher.model.apply, run.frozen.teacher, images),
    }


def step_operations(run, batch_size: int) -> dict[str, int]:
    """Operations of one student step: by part, and `total`.

    The generator runs forward and backward (three times its forward pass), the teacher forward and
    backward to its input (twice), the student forward and backward but not to its input.
    """
    counts, stem = {}, 0
    for name, (fn, *args) in _forwards(run, batch_size).items():
        convs, matmuls = convs_of(fn, *args)
        counts[name] = sum(conv.operations for conv in convs) + matmuls
        if name == "network":
            stem = convs[0].operations
    generator, network = counts["generator"], counts["network"]
    parts = {"generator": 3 * generator, "teacher": 2 * network, "student": 3 * network - stem}
    return parts | {"total": sum(parts.values())}


def measure_roofline(run, batch_size: int, repeats: int = 7) -> dict[str, float]:
    """GFLOP/s of each of the step's forward convs, median of a few runs; and `fastest`."""
    rates: dict[str, float] = {}
    distinct = {
        c for fn, *args in _forwards(run, batch_size).values() for c in convs_of(fn, *args)[0]
    }
    for conv in sorted(distinct):
        x, kernel = (jnp.ones(shape, jnp.float32) for shape in conv[:2])
        compiled = jax.jit(conv.run).lower(x, kernel).compile()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            compiled(x, kernel).block_until_ready()
            seconds.append(time.perf_counter() - start)
        name = f"{conv.lhs} * {conv.rhs} / {conv.strides[0]}"
        rates[name] = conv.operations / statistics.median(seconds) / 1e9
    return rates | {"fastest": max(rates.values())}
