"""What a run knows of itself: kept with its checkpoints, told in its summary."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import ml_collections

from ait_jax.methods.phases import Phase, Plan
from ait_jax.quant.bit_budget import tensor_bytes
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name, named_leaves, tensor_layer
from ait_jax.run.environment import machine
from ait_jax.training.state import Totals

__all__ = ["Record", "describe_network", "stored_bytes", "summarize"]


class Record(NamedTuple):
    """What a checkpoint carries beside the state: accuracies in percent, durations in seconds.

    Attributes:
        teacher_top1: of the teacher; None, like all accuracies, where none is measured.
        ptq_top1: of the teacher, rounded.
        best_top1: of the student that is kept (`train.keep_student`), the best so far or the last.
        best_step: its step.
        last_top1: of the student that was measured last.
        seconds: of the run so far, over all its starts.
        compile_seconds: of them, in compiling.
        step_seconds: in the steps of each phase, by name.
        student_seconds: in steps in which the student trains.
        timed_student_steps: how many these were.
        evaluation_seconds: in measuring accuracy.
        saving_seconds: in saving checkpoints.
        diagnosis: where the accuracy went, at each moment so far; see `diagnosis`.
    """

    teacher_top1: float | None = None
    ptq_top1: float | None = None
    best_top1: float | None = None
    best_step: int | None = None
    last_top1: float | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    step_seconds: Mapping[str, float] = MappingProxyType({})
    student_seconds: float = 0.0
    timed_student_steps: int = 0
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0
    diagnosis: Sequence[Mapping[str, Any]] = ()

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Where the time went: each second is in one phase."""
        phases = {
            "compiling": self.compile_seconds,
            **self.step_seconds,
            "evaluation": self.evaluation_seconds,
            "saving": self.saving_seconds,
        }
        return phases | {"other": max(self.seconds - sum(phases.values()), 0.0)}

    def after_steps(self, phase: Phase, steps: int, seconds: float) -> "Record":
        """The record with the time of some steps.

        Args:
            phase: of the steps.
            steps: how many.
            seconds: of all of them.
        """
        known = self.step_seconds.get(phase.name, 0.0)
        record = self._replace(step_seconds={**self.step_seconds, phase.name: known + seconds})
        if not phase.student:
            return record
        return record._replace(
            student_seconds=self.student_seconds + seconds,
            timed_student_steps=self.timed_student_steps + steps,
        )

    def saved(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return self._asdict() | {
            "step_seconds": dict(self.step_seconds),
            "diagnosis": list(self.diagnosis),
        }

    @classmethod
    def of_saved(cls, values: Mapping[str, Any]) -> "Record":
        """The record that was saved, also by versions that knew two phases alone.

        Args:
            values: see `saved`.
        """
        known = dict(values)
        warmup = known.pop("warmup_seconds", None)
        if warmup is not None:
            known["step_seconds"] = {"warm-up": warmup, "student": known["student_seconds"]}
        return cls(**known)


def stored_bytes(quantized: QuantizedModel, variables: Any) -> tuple[int, int]:
    """What a network takes on disk: as float32, and as packed integers with folded batch norms.

    Args:
        quantized: the network.
        variables: its `params` and `batch_stats`, or their shapes.

    Returns:
        Bytes of the tensors, file headers left out.
    """
    statistics = {
        leaf_name(path): math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(variables.get("batch_stats", {}))
    }
    norms = {name.rpartition("/")[0] for name in statistics}
    # A folded batch norm has two numbers for each feature, as its statistics have.
    integers = 4 * sum(statistics.values()) + 8 * len(quantized.sites)
    floats = 4 * sum(statistics.values())
    for path, leaf in jax.tree.leaves_with_path(variables["params"]):
        name, count = leaf_name(path), math.prod(leaf.shape)
        floats += 4 * count
        coder = quantized.policy.weight_codes(name)
        if coder is not None:
            integers += tensor_bytes(leaf.shape, coder.bits, coder.channel_axis)
        elif name.rpartition("/")[0] not in norms:
            integers += 4 * count
    return floats, integers


def describe_network(quantized: QuantizedModel, variables: Any, ranges: Any) -> dict[str, Any]:
    """What `network.json` holds: sizes; layers and activation sites in the order of execution.

    `quantized_inputs` is how many of the `kernel_calls`, convs and matmuls with a parameter, read
    data on a grid.

    Args:
        quantized: the network.
        variables: its variables, or their shapes.
        ranges: the activation quantizer's state.
    """
    floats, integers = stored_bytes(quantized, variables)
    policy = quantized.policy
    params = named_leaves(variables["params"])
    lo, hi = (bound.tolist() for bound in jax.device_get(quantized.bounds(ranges)))
    return {
        "float_bytes": floats,
        "integer_bytes": integers,
        "quantized_inputs": quantized.kernel_reads.quantized,
        "kernel_calls": quantized.kernel_reads.total,
        "layers": [
            {
                "name": tensor_layer(name),
                "bits": coder.bits,
                "shape": list(params[name].shape),
                "bytes": tensor_bytes(params[name].shape, coder.bits, axis),
            }
            for name, axis in policy.kernels
            if (coder := policy.weight_codes(name))
        ],
        "sites": [
            {
                "kind": site.kind,
                "scope": site.scope,
                "bits": quantized.policy.site_bits(site.kind),
                "lo": lo[site.index],
                "hi": hi[site.index],
            }
            for site in quantized.sites
        ],
    }


def summarize(
    config: ml_collections.ConfigDict,
    plan: Plan,
    record: Record,
    totals: Totals,
    network: dict[str, Any],
    diagnosis: dict[str, Any] | None,
) -> dict[str, Any]:
    """The summary of a run, as in `summary.json`, but for the accuracy of its integers.

    Args:
        config: of the run.
        plan: its phases.
        record: of the whole run.
        totals: over its student steps.
        network: see `describe_network`.
        diagnosis: see `diagnosis.describe_diagnosis`, of which the worst layers are told.
    """
    short = (
        None
        if diagnosis is None
        else {
            "accuracies": diagnosis["accuracies"],
            "worst_layers": diagnosis["layers"][:3],
            "suggestion": diagnosis["suggestion"],
        }
    )
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
        "keep_student": config.train.keep_student,
        "steps": plan.student_steps,
        "warmup_steps": plan.first_student_step,
        "gi": config.gi.search if config.gi.enabled else "off",
        "crossed_fraction": float(totals.crossed) / max(plan.student_steps, 1),
        "guarantee_misses": int(totals.misses),
        "guarantee_misses_frozen_grid": int(totals.frozen_misses),
        "seconds": record.seconds,
        "images_per_second": rate / record.student_seconds if record.student_seconds else None,
        "compile_seconds": record.compile_seconds,
        "phase_seconds": record.phase_seconds,
        "float_bytes": network["float_bytes"],
        "integer_bytes": network["integer_bytes"],
        "quantized_inputs": network["quantized_inputs"],
        "kernel_calls": network["kernel_calls"],
        "diagnosis": short,
        "environment": machine(),
    }
