"""Devices and axes: the only room that names them. The same pure functions, mapped over all."""

from ait_jax.parallel.layout import MODES, Layout
from ait_jax.parallel.mapped import (
    BATCH_AXIS,
    check_divisible,
    global_example_ids,
    local_shards,
    parallelize,
)

__all__ = [
    "BATCH_AXIS",
    "MODES",
    "Layout",
    "check_divisible",
    "global_example_ids",
    "local_shards",
    "parallelize",
]
