"""Results without a run: any model, its weights rounded, with ranges out of the air."""

import numpy as np

from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from ait_jax.quant.ranges import ActivationRanges
from ait_jax.teacher import Preprocess
from ait_jax.zero_shot import ZeroShotResult
from ait_jax.zero_shot.bring import bring
from ait_jax.zero_shot.networks import as_given
from ait_jax.zero_shot.tensors import quantized_tensors
from tests.brought import CLASSES, SHAPE


def rounded_result(model, variables=None, *, bits=4, layer_bits=(), sites="integer"):
    """The result of a model of `tests.brought`, quantized but never trained."""
    brought = bring(model, variables, SHAPE, CLASSES, {}, "")
    policy = QuantPolicy(bits, 4, sites=sites, layer_bits=layer_bits, kernels=brought.kernels)
    quantized = QuantizedModel(brought.model, policy, brought.variables, SHAPE)
    count = len(quantized.sites)
    # As after a few steps: averages that are divided by their weight on read.
    lo, hi = (np.linspace(*ends, count, dtype=np.float32) for ends in ((-0.7, 0), (1, 3)))
    params, batch_stats = brought.variables["params"], brought.variables["batch_stats"]
    return ZeroShotResult(
        quantized=quantized,
        tensors=quantized_tensors(params, policy),
        params=as_given(brought.model, "params", params),
        batch_stats=as_given(brought.model, "batch_stats", batch_stats),
        ranges=ActivationRanges(lo, hi, np.float32(0.651)),
        step=7,
        preprocess=Preprocess((0.5,), (0.25,)),
        summary={"steps": 4, "warmup_steps": 3},
        workdir=None,
    )
