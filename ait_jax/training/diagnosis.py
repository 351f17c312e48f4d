"""Where the accuracy went: to the rounding of weights or of activations, and in which layer.

Measured before the student trains (PTQ), after each phase from there on, and after the last step;
kept in the run's record, so that a run that is resumed tells the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ait_jax.methods.phases import Plan
from ait_jax.quant.bit_budget import suggest_layer_bits, tensor_bytes
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import named_leaves, tensor_layer
from ait_jax.quant.rounding_error import (
    activation_errors,
    activations_alone,
    decibels,
    weight_errors,
    weights_alone,
    widened_errors,
)
from ait_jax.run.predictions import Evaluator
from ait_jax.teacher import Teacher

__all__ = ["IMAGES", "ROUNDED", "Diagnosis", "describe_diagnosis", "moment_of", "suggestion"]

IMAGES = 2_000  # at most; differences of a tenth of a percent are not what one looks for here
# What may be rounded, in the order in which it is told.
ROUNDED = ("neither", "weights", "activations", "both")
_MORE_BYTES = 0.1  # what the suggestion may add to the integers of the weights

logger = logging.getLogger(__name__)

# `(params, batch_stats, ranges, grids)` of a student, as the forward of a run takes them.
Student = tuple[Any, Any, Any, Any]


def moment_of(plan: Plan, step: int) -> str | None:
    """What a diagnosis after a step is called; None if none is due.

    Args:
        plan: the phases of the run.
        step: steps done.
    """
    if step == plan.first_student_step:
        return "PTQ"
    if step == plan.total_steps:
        return "last step"
    for phase in plan.phases:
        if phase.steps and plan.first_student_step < step == plan.start(phase) + phase.steps:
            return f"after {phase.name}"
    return None


class Diagnosis:
    """Measures what rounding costs a student; each of its forwards is compiled once."""

    def __init__(
        self,
        quantized: QuantizedModel,
        teacher: Teacher,
        evaluator: Evaluator | None,
        neither: Callable[[Any, jax.Array], jax.Array],
        both: Callable[[Student, jax.Array], jax.Array],
    ):
        """Takes the forwards that the run has compiled anyway.

        Args:
            quantized: the network.
            teacher: of the run.
            evaluator: of real images; without, there are no accuracies.
            neither: of the variables of the float network.
            both: of a student, all of which is rounded.
        """
        self._quantized, self._teacher, self._evaluator = quantized, teacher, evaluator
        self._neither, self._both = neither, both
        self._errors = jax.jit(self._rounding_errors)

    def _weights_alone(self, student: Student, images: jax.Array) -> jax.Array:
        params, batch_stats, _, grids = student
        return weights_alone(self._quantized, params, batch_stats, images, grids=grids)

    def _activations_alone(self, student: Student, images: jax.Array) -> jax.Array:
        params, batch_stats, ranges, _ = student
        return activations_alone(self._quantized, params, batch_stats, images, ranges)

    def _rounding_errors(self, student: Student, images: jax.Array) -> Any:
        params, batch_stats, ranges, grids = student
        weights = weight_errors(params, self._quantized.policy, grids)
        sites = activation_errors(
            *(self._quantized, params, batch_stats, images, ranges), grids=grids
        )
        return weights, sites

    def accuracies(self, student: Student) -> dict[str, Any]:
        """Top-1 in percent by what is rounded (`ROUNDED`), and of how many images.

        Args:
            student: whole on every device.
        """
        if self._evaluator is None:
            return {"images": 0, "top1": None}
        params, batch_stats, *_ = student
        networks: tuple[tuple[Any, Any], ...] = (
            (self._neither, {"params": params, "batch_stats": batch_stats}),
            (self._weights_alone, student),
            (self._activations_alone, student),
            (self._both, student),
        )
        seen = [self._evaluator.predict(*network, at_most=IMAGES) for network in networks]
        top1 = {name: predictions.top1 for name, predictions in zip(ROUNDED, seen)}
        return {"images": len(seen[0].labels), "top1": top1}

    def rounding(self, student: Student, images: np.ndarray) -> dict[str, Any]:
        """SQNR in dB, `weights` by layer and `activations` by site, measured on this process.

        Args:
            student: whole on every device.
            images: synthetic ones, [N, H, W, C].
        """
        weights, sites = jax.device_get(self._errors(jax.device_get(student), images))
        return {
            "weights": {tensor_layer(name): decibels(error) for name, error in weights.items()},
            "activations": [decibels(error) for error in sites],
        }

    def __call__(
        self, moment: str, step: int, student: Student, images: np.ndarray, *, last: bool
    ) -> dict[str, Any]:
        """One entry of the record: JSON values.

        Args:
            moment: see `moment_of`.
            step: steps done.
            student: whole on every device.
            images: synthetic ones, [N, H, W, C].
            last: whether the run ends, and `suggestion` is made.
        """
        found: dict[str, Any] = {"moment": moment, "step": step} | self.accuracies(student)
        if found["top1"] is not None:
            told = ", ".join(f"{name} {top1:.2f} %" for name, top1 in found["top1"].items())
            logger.info("%s, top-1 by what is rounded: %s", moment, told)
        found |= self.rounding(student, images)
        if last:
            found["suggestion"] = suggestion(self._quantized, self._teacher.variables["params"])
        return found


def suggestion(quantized: QuantizedModel, params: Any) -> dict[str, Any]:
    """The `quant.layer_bits` that lower the weights' error most for a tenth more bytes.

    Args:
        quantized: the network as it is quantized so far.
        params: the teacher's, with which a run that follows the suggestion starts.

    Returns:
        JSON values: `layer_bits`; `bytes` of all layers and `run_bytes` so far; `budget`; `error`,
        the sum over layers of their relative errors, and `run_error` so far.
    """
    policy, shapes = quantized.policy, {k: w.shape for k, w in named_leaves(params).items()}
    names = {tensor_layer(name): name for name, _ in policy.kernels if policy.weight_codes(name)}
    axes, error_of = dict(policy.kernels), widened_errors(params, policy)
    bits = {layer: _bits(policy, name) for layer, name in names.items()}

    def size(layer: str, bits: int) -> int:
        return tensor_bytes(shapes[names[layer]], bits, axes[names[layer]])

    def error(layer: str, bits: int) -> float:
        return error_of(names[layer], bits)

    run_bytes = sum(size(layer, own) for layer, own in bits.items())
    budget = int(run_bytes * (1 + _MORE_BYTES))
    named = dict(policy.layer_bits)
    found = suggest_layer_bits(bits, error=error, size=size, budget=budget, named=named)
    return {
        "layer_bits": found.layer_bits,
        "bytes": found.size,
        "run_bytes": run_bytes,
        "budget": budget,
        "error": found.error,
        "run_error": sum(error(layer, own) for layer, own in bits.items()),
    }


def _bits(policy: Any, name: str) -> int:
    return policy.weight_codes(name).bits


def describe_diagnosis(
    entries: Sequence[Mapping[str, Any]], network: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What `diagnosis.json` holds; None if nothing was measured.

    `accuracies` are those of each moment; `layers` and `sites`, the ones that lose most first, are
    as they were at the last moment.

    Args:
        entries: of the record, in order.
        network: see `record.describe_network`.
    """
    if not entries:
        return None
    last = entries[-1]
    layers = [
        {key: layer[key] for key in ("name", "bits", "bytes")}
        | {"sqnr": last["weights"][layer["name"]]}
        for layer in network["layers"]
    ]
    sites = [
        {"index": i, "sqnr": sqnr} | {key: site[key] for key in ("kind", "scope", "bits")}
        for i, (site, sqnr) in enumerate(zip(network["sites"], last["activations"]))
    ]
    return {
        "accuracies": [
            {key: entry[key] for key in ("moment", "step", "images", "top1")} for entry in entries
        ],
        "layers": sorted(layers, key=lambda layer: layer["sqnr"]),
        "sites": sorted(sites, key=lambda site: site["sqnr"]),
        "suggestion": last.get("suggestion"),
    }
