"""Quantized tensors: integer codes, and the grids on which they stand for weights."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ait_jax.quant import affine
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.quant.weights import Grids

__all__ = ["QuantizedTensor", "quantized_tensors"]


class QuantizedTensor(NamedTuple):
    """A tensor of weights as integers; a weight is `(code + zero_point) / scale`.

    Attributes:
        codes: int8, of the tensor's shape.
        scale: float32, codes per unit; of length 1 along every axis that has no grid of its own.
        zero_point: float32 of whole numbers, of the shape of `scale`. (Those of a channel that
            holds one value may lie beyond int32.)
        bits: of the codes.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int

    def dequantized(self) -> np.ndarray:
        """The float32 weights."""
        return np.asarray(affine.dequantize(self.codes, self.scale, self.zero_point))  # type: ignore[arg-type]


def quantized_tensors(
    params: Any, policy: QuantPolicy, grids: Grids | None = None
) -> dict[str, QuantizedTensor]:
    """The tensors that a policy quantizes, by name (see `leaf_name`), each on its own grid.

    Args:
        params: float parameters.
        policy: what is quantized, and how many bits it has.
        grids: states of the tensors' quantizers, by name.
    """
    found = {}
    for path, w in jax.tree.leaves_with_path(params):
        coder = policy.weight_codes(leaf_name(path))
        if coder is not None:
            scale, zero_point = coder.grid(w, (grids or {}).get(leaf_name(path)))
            codes = affine.quantize(w, scale, zero_point, coder.bits)
            found[leaf_name(path)] = QuantizedTensor(
                np.asarray(codes), np.asarray(scale), np.asarray(zero_point), coder.bits
            )
    return found
