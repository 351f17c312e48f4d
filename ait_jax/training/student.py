"""The student: the teacher's network, quantized as the config says, and the best one of a run."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from ait_jax.quant.activations import ACTIVATIONS
from ait_jax.quant.integer import IntegerError, IntegerModel
from ait_jax.quant.layers import resolve_layer_bits
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from ait_jax.quant.weights import WEIGHTS
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.teacher import Teacher

__all__ = ["TrainedStudent", "kept_student", "quantized_model", "restore_best", "to_integers"]

logger = logging.getLogger(__name__)


class TrainedStudent(NamedTuple):
    """A student at some step of a run.

    Attributes:
        params: float parameters.
        ranges: the activation quantizer's state.
        grids: the weight quantizers' states, by name; empty where they have none.
        step: student and warm-up steps behind it.
        top1: its accuracy in percent, fake-quantized; None if it was not measured.
    """

    params: Any
    ranges: Any
    grids: Any
    step: int
    top1: float | None


def quantized_model(config: ml_collections.ConfigDict, teacher: Teacher) -> QuantizedModel:
    """The quantized apply of a teacher's network.

    Raises:
        LayerBitsError: if `quant.layer_bits` does not fit the network.
    """
    quant = config.quant
    layer_bits = resolve_layer_bits(
        teacher.kernels, first_last_bits=quant.first_last_bits, overrides=quant.layer_bits
    )
    policy = QuantPolicy(
        quant.weight_bits,
        quant.activation_bits,
        teacher.kernels,
        sites=quant.sites,
        layer_bits=layer_bits,
        activations=ACTIVATIONS[quant.activations].of_config(quant),
        weights=WEIGHTS[quant.weights].of_config(quant),
    )
    image_shape = tuple(config.teacher.image_shape)
    return QuantizedModel(teacher.model, policy, teacher.variables, image_shape)


def restore_best(
    checkpoints: Checkpoints, quantized: QuantizedModel, teacher: Teacher
) -> TrainedStudent | None:
    """The best student of a run; None if nothing was measured.

    Args:
        checkpoints: of the best students.
        quantized: see `quantized_model`.
        teacher: of the run.

    Raises:
        CheckpointError: if it cannot be read.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    # Arrays of jax, so that the restored ones are too.
    params = jax.tree.map(jnp.asarray, teacher.variables["params"])
    like = kept_student(params, quantized.init_ranges(), quantized.init_grids(params))
    student, record = checkpoints.restore(step, like)
    return TrainedStudent(
        student["student"], student["ranges"], student.get("grids", {}), step, record["top1"]
    )


def kept_student(params: Any, ranges: Any, grids: Any) -> dict[str, Any]:
    """A student as its checkpoint holds it.

    Args:
        params: float parameters.
        ranges: the activation quantizer's state.
        grids: the weight quantizers' states; left out where there are none.
    """
    return {"student": params, "ranges": ranges} | ({"grids": grids} if grids else {})


def to_integers(
    quantized: QuantizedModel, teacher: Teacher, best: TrainedStudent
) -> tuple[IntegerModel, Any] | None:
    """The integer network of a run's best student, and its variables; None if it has no integers.

    Args:
        quantized: see `quantized_model`.
        teacher: of the run.
        best: the student.
    """
    try:
        integer = IntegerModel(quantized, teacher.variables, quantized.image_shape)
        variables = integer.from_student(
            best.params, teacher.variables["batch_stats"], best.ranges, best.grids
        )
    except IntegerError as error:
        logger.warning("the best student has no integers: %s", error)
        return None
    return integer, variables
