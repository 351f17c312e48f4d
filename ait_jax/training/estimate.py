"""What the state of a run takes of each device, counted before anything is compiled.

Parameters and bytes of the state are exact. What a step takes beside the state depends on the
compiler, and is not estimated here: `python -m ait_jax.compile_check` compiles the step for a TPU
and reads its memory off, and elsewhere the device's own error tells.
"""

import logging
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.quant.policy import leaf_name
from ait_jax.training.state import AITState, Frozen

__all__ = ["Estimate", "estimate_run", "log_estimate", "memory_limit", "tree_bytes"]

logger = logging.getLogger(__name__)

_GIB = 2**30


class Estimate(NamedTuple):
    """Sizes of a run's state.

    Attributes:
        teacher_parameters: of the teacher, and so of the student.
        generator_parameters: of the generator.
        largest: name and number of elements of the generator's largest tensor.
        state_bytes: of each device, held throughout: teacher, student, generator, and the state of
            both optimizers.
    """

    teacher_parameters: int
    generator_parameters: int
    largest: tuple[str, int]
    state_bytes: int


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree (or of their `jax.ShapeDtypeStruct`s)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def estimate_run(state: AITState, frozen: Frozen, *, held: AITState | None = None) -> Estimate:
    """Counts a run's parameters, and the bytes that one device holds throughout.

    Args:
        state: the run's state, or its shapes.
        frozen: what the step reads, or its shapes.
        held: the shapes that one device holds of the state, if not all of it.

    Returns:
        The counts.
    """
    parameters = jax.tree.leaves_with_path(state.generator["params"])
    nothing: Any = ((), jax.ShapeDtypeStruct((0,), jnp.float32))  # of a mere sampler
    path, largest = max(parameters, key=lambda item: item[1].size, default=nothing)
    return Estimate(
        teacher_parameters=_count(frozen.teacher["params"]),
        generator_parameters=_count(state.generator["params"]),
        largest=(leaf_name(path), largest.size),
        state_bytes=tree_bytes((state if held is None else held, frozen)),
    )


def memory_limit() -> int | None:
    """Bytes that a device may use, where that is known; on CPU, where devices share, a share."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def log_estimate(estimate: Estimate, limit: int | None) -> None:
    """Logs the sizes, and warns if the state alone exceeds a device's memory.

    Args:
        estimate: of the run.
        limit: bytes of each device, see `memory_limit`; None if not known.
    """
    name, size = estimate.largest
    logger.info(
        "teacher %.2f M parameters, generator %.2f M (%s alone %.2f M); state of each device "
        "%.2f GiB",
        *(estimate.teacher_parameters / 1e6, estimate.generator_parameters / 1e6, name, size / 1e6),
        estimate.state_bytes / _GIB,
    )
    if limit is not None and estimate.state_bytes > limit:
        logger.warning(
            "the state alone, %.1f GiB, is more than the %.1f GiB of a device, whatever the batch; "
            "what lowers it: another generator.name, teacher.image_shape, generator.latent_size "
            "(Qimera's with generator.embedding=random), on several devices parallel.mode=jit with "
            "parallel.fsdp=true",
            *(estimate.state_bytes / _GIB, limit / _GIB),
        )
