"""Results without a run: any model, its weights rounded, with ranges out of the air."""

import json

import jax
import numpy as np
import safetensors.numpy

from ait_jax.export.checked_files import TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.export.packing import pack_codes
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy
from ait_jax.quant.ranges import ActivationRanges
from ait_jax.teacher import Preprocess
from ait_jax.zero_shot import ZeroShotResult
from ait_jax.zero_shot.bring import bring
from ait_jax.zero_shot.networks import as_given
from ait_jax.zero_shot.tensors import quantized_tensors
from tests.support.user_models import CLASSES, IMAGES, SHAPE


def rounded_result(model, variables=None, *, bits=4, layer_bits=(), sites="integer", gates=False):
    """The result of a model of `tests.support.user_models`, quantized but never trained."""
    brought = bring(model, variables, SHAPE, CLASSES, {}, "")
    policy = QuantPolicy(
        bits, 4, sites=sites, layer_bits=layer_bits, kernels=brought.kernels, gates=gates
    )
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


def assert_equal(loaded, saved):
    """Every number of two results is the same, and what is computed of them."""
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        for ours, theirs in zip(loaded.tensors[name], tensor):
            assert np.asarray(ours).dtype == np.asarray(theirs).dtype
            np.testing.assert_array_equal(ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, loaded.rounded_params, saved.rounded_params)
    jax.tree.map(np.testing.assert_array_equal, loaded.batch_stats, saved.batch_stats)
    assert loaded.activations == saved.activations
    np.testing.assert_array_equal(loaded.logits(IMAGES), saved.logits(IMAGES))


def write_first_format(result, folder):
    """As the version before wrote a folder."""
    arrays, policy = {}, result.quantized.policy
    for name, tensor in result.tensors.items():
        arrays[f"{name}/codes"] = pack_codes(tensor.codes, tensor.bits)
        arrays[f"{name}/scale"] = tensor.scale
        whole = np.clip(tensor.zero_point.astype(np.float64), -(2**31), 2**31 - 1)
        arrays[f"{name}/zero_point"] = whole.astype(np.int32)
    for collection in ("params", "batch_stats"):
        for path, leaf in jax.tree.leaves_with_path(getattr(result, collection)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in result.tensors:
                arrays[f"{collection}/{name}"] = np.asarray(leaf)
    lo, hi = (result.ranges.lo / result.ranges.weight, result.ranges.hi / result.ranges.weight)
    arrays |= {"sites/lo": lo, "sites/hi": hi}
    manifest = {
        "format": "ait_jax zero_shot 1",
        "image_shape": list(result.quantized.image_shape),
        "mean": [0.5],
        "std": [0.25],
        "weight_bits": policy.weight_bits,
        "activation_bits": policy.activation_bits,
        "sites": policy.sites,
        "layer_bits": policy.layer_bits,
        "tensors": [
            {
                "name": name,
                "channel_axis": axis,
                "bits": result.tensors[name].bits,
                "shape": result.tensors[name].codes.shape,
            }
            for name, axis in policy.kernels
        ],
        "step": result.step,
        "summary": result.summary,
    }
    folder.mkdir()
    safetensors.numpy.save_file(arrays, folder / TENSORS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
