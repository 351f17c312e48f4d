"""Reads an artefact of ait_jax with NumPy alone, as docs/format.md describes it.

python examples/read_artefact.py DIR prints the layers and the range of their weights.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

DTYPES = {"U8": "u1", "I32": "<i4", "F32": "<f4"}


def read_tensors(path):
    """The tensors of a safetensors file, by name."""
    file = path.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    tensors = {}
    for name, entry in json.loads(file[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(file[start + begin : start + end], DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_weights(folder):
    """The float32 kernels by layer, bit for bit the fake-quantized ones."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format_version"] != 1:
        raise SystemExit(f"format version {manifest['format_version']} is unknown")
    tensors = read_tensors(folder / "model.safetensors")
    weights = {}
    for layer in manifest["layers"]:
        bits, count = layer["bits"], math.prod(layer["shape"])
        stream = np.unpackbits(tensors[layer["codes"]], bitorder="little")[: bits * count]
        unsigned = stream.reshape(count, bits).astype(np.int32) @ (1 << np.arange(bits))
        codes = (unsigned - (1 << (bits - 1))).reshape(layer["shape"])
        steps = (codes + tensors[layer["zero_point"]]).astype(np.float32)
        weights[layer["name"]] = steps * (1 / tensors[layer["scale"]])
    return weights


if __name__ == "__main__":
    for name, kernel in read_weights(Path(sys.argv[1])).items():
        print(f"{name}: {kernel.shape}, {kernel.min():.4f} to {kernel.max():.4f}")
