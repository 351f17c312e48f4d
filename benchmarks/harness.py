"""What the benchmarks share: a run without data, memory, results on disk."""

import json
import resource
import tempfile
from pathlib import Path

import jax
from absl import logging

from ait_jax.convert.weights import fingerprint
from ait_jax.run.environment import machine
from ait_jax.run.workdir import Workdir
from ait_jax.teacher import Teacher, build_teacher_model, load_teacher, teacher_of_config
from ait_jax.training.loop import Run

logging.set_verbosity(logging.ERROR)  # Orbax tells its developers a great deal.

__all__ = [
    "build_run",
    "device_peak_gib",
    "machine",
    "peak_memory_gib",
    "random_teacher",
    "save_json",
]


def random_teacher(config) -> Teacher:
    """A teacher that knows nothing.

    That changes the time of nothing but Gradient Inundation's search, which takes as many doublings
    as the updates are small.
    """
    model, _ = build_teacher_model(config)
    image = jax.numpy.zeros((1, *config.teacher.image_shape))
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0), image))
    return teacher_of_config(config, model, variables, fingerprint(variables))


def build_run(config, weights: str = "") -> Run:
    """A run in a folder of its own; the teacher is random unless a file of weights is named."""
    teacher = load_teacher(config, Path(weights)) if weights else random_teacher(config)
    return Run(config, Workdir(tempfile.mkdtemp(prefix="ait_benchmark_"), config), teacher, None)


def peak_memory_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_peak_gib() -> float | None:
    """Most that this process has had in its first device's own memory; None on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def save_json(path: str | None, record: dict) -> None:
    """Writes a result, if a path was asked for."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
