"""What a run knows of itself: kept with its checkpoints, told in its summary."""

from typing import Any, NamedTuple

import ml_collections

from ait_jax.environment import machine
from ait_jax.state import Totals

__all__ = ["Record", "summarize"]


class Record(NamedTuple):
    """What a checkpoint carries beside the state: accuracies in percent, durations in seconds."""

    teacher_top1: float | None = None
    ptq_top1: float | None = None
    best_top1: float | None = None
    best_step: int | None = None
    last_top1: float | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    student_seconds: float = 0.0
    timed_student_steps: int = 0


def summarize(config: ml_collections.ConfigDict, record: Record, totals: Totals) -> dict[str, Any]:
    """The summary of a run, as in `summary.json`.

    Args:
        config: of the run.
        record: of the whole run.
        totals: over its student steps.
    """
    rate = config.train.batch_size * record.timed_student_steps
    return {
        "config_name": config.config_name,
        "seed": config.seed,
        "weight_bits": config.quant.weight_bits,
        "activation_bits": config.quant.activation_bits,
        "first_last_bits": config.quant.first_last_bits,
        "layer_bits": config.quant.layer_bits,
        "sites": config.quant.sites,
        "teacher_top1": record.teacher_top1,
        "ptq_top1": record.ptq_top1,
        "final_top1": record.last_top1,
        "best_top1": record.best_top1,
        "best_step": record.best_step,
        "steps": config.train.steps,
        "warmup_steps": config.train.warmup_steps,
        "gi": config.gi.search if config.gi.enabled else "off",
        "crossed_fraction": float(totals.crossed) / max(config.train.steps, 1),
        "guarantee_misses": int(totals.misses),
        "guarantee_misses_frozen_grid": int(totals.frozen_misses),
        "seconds": record.seconds,
        "images_per_second": rate / record.student_seconds if record.student_seconds else None,
        "compile_seconds": record.compile_seconds,
        "environment": machine(),
    }
