"""Artefacts without training, of random weights and facts of no run; reads and changes them."""

import hashlib
import json

import jax
import numpy as np
import safetensors.numpy

from ait_jax.export import Artefact
from ait_jax.export.files import TENSORS
from ait_jax.export.manifest import MANIFEST
from ait_jax.models import build_model
from ait_jax.quant.integer import IntegerModel
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.ranges import fixed_ranges
from tests.conftest import random_variables
from tests.support.policies import policy_for


def network(arch, image_shape, classes, bits=(4, 4), **options):
    """`(artefact, integer model, its variables, float variables)`; see `policy_for`."""
    model = build_model(arch, classes)
    variables = random_variables(model, image_shape)
    policy = policy_for(model, variables, image_shape, *bits, **options)
    quantized = QuantizedModel(model, policy, variables, image_shape)
    sites = len(quantized.sites)
    ranges = fixed_ranges(np.full(sites, -0.1), np.linspace(2, 3, sites))
    integer = IntegerModel(quantized, variables, image_shape)
    integers = integer.from_student(variables["params"], variables["batch_stats"], ranges)
    artefact = Artefact.of(integer, integers, facts(arch, image_shape, classes))
    return artefact, integer, integers, variables


def facts(arch, image_shape, classes):
    """Of a run that never was."""
    channels = image_shape[-1]
    return {
        "architecture": arch,
        "num_classes": classes,
        "image_shape": list(image_shape),
        "preprocessing": {
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
            "resize": 0,
            "interpolation": "bilinear",
        },
        "teacher_fingerprint": "0" * 64,
        "accuracy": {
            "data": "digits",
            "split": "test",
            "student": "best",
            "step": 3,
            **dict.fromkeys(("teacher_top1", "ptq_top1", "top1", "integer_top1")),
        },
        "config": {"data.name": "digits"},
        "versions": {"ait_jax": "0"},
    }


_LAYERS = ("stem_conv", *(f"stage{s}_block0/conv{c}" for s in (1, 2, 3) for c in (1, 2)))
# Layers of the small ResNet with 2 to 8 bits, an option of `network`.
EVERY_BIT_WIDTH = {"layer_bits": tuple((name, 2 + i) for i, name in enumerate(_LAYERS))}


def integer_logits(artefact, images):
    """Of the integer network that an artefact holds."""
    model, variables = artefact.network()
    return np.asarray(jax.jit(model.apply)(variables, artefact.preprocess(images)))


def manifest_of(folder):
    return json.loads((folder / MANIFEST).read_text())


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / TENSORS)


def changed(manifest, path, value):
    """Puts a value at a path of keys and indices; returns the manifest itself."""
    *parents, last = path
    inside = manifest
    for part in parents:
        inside = inside[part]
    inside[last] = value
    return manifest


def rewrite(folder, manifest=None, tensors=None):
    """Replaces the files of an artefact, their checksum of the manifest being right."""
    stored = safetensors.numpy.load_file(folder / TENSORS) if tensors is None else tensors
    if manifest is not None:
        (folder / MANIFEST).write_text(json.dumps(manifest))
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    safetensors.numpy.save_file(stored, folder / TENSORS, {"manifest_sha256": digest})
