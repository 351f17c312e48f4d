"""Zero-shot quantization as a call: any model, pieces of one's own, and what comes out.

Its names are those of the package as well: `ait_jax.zero_shot_quantize`.
"""

from ait_jax.methods.losses import GeneratorOutputs, StudentOutputs
from ait_jax.zero_shot.api import zero_shot_quantize
from ait_jax.zero_shot.result import ZeroShotResult, load_result
from ait_jax.zero_shot.tensors import QuantizedTensor

__all__ = [
    "GeneratorOutputs",
    "QuantizedTensor",
    "StudentOutputs",
    "ZeroShotResult",
    "load_result",
    "zero_shot_quantize",
]
