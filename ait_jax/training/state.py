"""Everything that a run carries from step to step and resumes from, as one pytree."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ait_jax.generators import Generator
from ait_jax.quant.linen import QuantizedModel

__all__ = ["AITState", "Frozen", "Totals", "init_state"]


class Totals(NamedTuple):
    """Sums over the student steps so far, for the summary.

    Attributes:
        crossed: float32 scalar, the sum of the share of quantized weights whose code changed.
        misses: int32 scalar, tensor-steps in which fewer than ceil(T n) codes changed, each code
            on the grid of the weights as they were stored before or after.
        frozen_misses: int32 scalar, the same with both codes on the grid before the step.
    """

    crossed: jax.Array
    misses: jax.Array
    frozen_misses: jax.Array


class AITState(NamedTuple):
    """State of a run.

    Attributes:
        step: int32 scalar, steps done, warm-up included.
        generator: the generator's `params` and `batch_stats`.
        generator_opt: its optimizer's state.
        student: the student's float parameters.
        student_opt: its optimizer's state, Gradient Inundation's last alphas included.
        ranges: the activation quantizer's state.
        totals: sums for the summary.
        grids: the weight quantizers' states, by name of the tensor; empty where they have none.
        learned_opt: state of the optimizer of what quantizers learn; empty where they learn
            nothing.
        own: states of phases with steps of their own, by name.
    """

    step: jax.Array
    generator: Any
    generator_opt: Any
    student: Any
    student_opt: Any
    ranges: Any
    totals: Totals
    grids: Any = None
    learned_opt: Any = None
    own: Any = None

    def saved(self) -> dict[str, Any]:
        """The state as checkpoints hold it: parts that a run has no use for are left out.

        So runs of versions that did not know these parts can be resumed.
        """
        optional = ("grids", "learned_opt", "own")
        return {
            name: part
            for name, part in self._asdict().items()
            if name not in optional or jax.tree.leaves(part)
        }

    def restored(self, saved: Mapping[str, Any]) -> "AITState":
        """The state that was saved; `self` is one of the same structure.

        Args:
            saved: see `saved`.
        """
        return self._replace(**saved)


class Frozen(NamedTuple):
    """What a run reads and never changes; an argument of the step, so that nothing is baked in.

    Attributes:
        teacher: `params` and `batch_stats`.
        key: the key of the run, typed.
    """

    teacher: Any
    key: jax.Array


# The generator's initial weights must not share random numbers with any step's examples.
_INIT_STREAM = 0x1217


def init_state(
    frozen: Frozen,
    generator: Generator,
    quantized: QuantizedModel,
    generator_tx: optax.GradientTransformation,
    student_tx: optax.GradientTransformation,
    *,
    learned_tx: optax.GradientTransformation | None = None,
    own: Mapping[str, Callable[[], Any]] = MappingProxyType({}),
) -> AITState:
    """The state before the first step: the student starts as a copy of the teacher.

    Args:
        frozen: the teacher and the key of the run.
        generator: whose variables are made.
        quantized: the student, whose ranges are made.
        generator_tx: the generator's optimizer.
        student_tx: the student's.
        learned_tx: that of what quantizers learn, if they do.
        own: makes the states of phases with steps of their own, by name.
    """

    # In one program: run one by one, the initialisers are hundreds of small ones to compile.
    @jax.jit
    def made(key, student) -> AITState:
        variables = generator.init(jax.random.fold_in(jax.random.split(key)[1], _INIT_STREAM))
        zero = jnp.zeros((), jnp.int32)
        ranges, grids = quantized.init_ranges(), quantized.init_grids(student)
        learned = quantized.learned(ranges, grids)
        return AITState(
            step=zero,
            generator={"params": variables["params"], "batch_stats": variables["batch_stats"]},
            generator_opt=generator_tx.init(variables["params"]),
            student=None,
            student_opt=student_tx.init(student),
            ranges=ranges,
            totals=Totals(jnp.zeros((), jnp.float32), zero, zero),
            grids=grids,
            learned_opt=learned_tx.init(learned) if learned_tx and jax.tree.leaves(learned) else (),
            own={name: make() for name, make in own.items()},
        )

    teacher = frozen.teacher["params"]
    # A copy: the step gives its state's buffers back to the device, and the teacher's must live.
    student = jax.device_put(teacher, may_alias=False)
    return made(frozen.key, teacher)._replace(student=student)
