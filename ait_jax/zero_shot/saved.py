"""A quantized network in a folder: `manifest.json` and `model.safetensors`.

Codes, scales, zero points and ranges are written and read as they are; nothing is quantized anew.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from ait_jax.errors import UserError
from ait_jax.export.checked_files import (
    TENSORS,
    manifest_bytes,
    read_manifest,
    read_tensors,
    whole_folder,
    write_checked,
)
from ait_jax.export.manifest import (
    ARRAY,
    BITS,
    MANIFEST,
    NAME,
    OBJECT,
    SHAPE,
    ArtefactError,
    Check,
    check_object,
    parse_json,
)
from ait_jax.export.packing import pack_codes, unpack_codes
from ait_jax.quant.affine import grid_shape
from ait_jax.quant.policy import SITES, Kernels, QuantPolicy
from ait_jax.teacher import Preprocess
from ait_jax.zero_shot.structure import describe
from ait_jax.zero_shot.tensors import QuantizedTensor

__all__ = ["SavedNetwork", "read_saved", "write_saved"]

_FORMAT, _FIRST_FORMAT = "ait_jax zero_shot 2", "ait_jax zero_shot 1"
_COLLECTIONS = ("params", "batch_stats")

_NUMBERS: Check = (
    lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v),
    "an array of numbers",
)
_MANIFEST_CHECKS: dict[str, Check] = {
    "image_shape": SHAPE,
    "mean": _NUMBERS,
    "std": _NUMBERS,
    "weight_bits": BITS,
    "activation_bits": BITS,
    "sites": (lambda v: v in SITES, f"one of {', '.join(SITES)}"),
    "layer_bits": (
        lambda v: isinstance(v, list) and all(isinstance(x, list) and len(x) == 2 for x in v),
        "an array of pairs of a layer and its bits",
    ),
    "gates": (lambda v: isinstance(v, bool), "true or false"),
    "quantized": ARRAY,
    "structure": (
        lambda v: isinstance(v, dict) and set(v) == set(_COLLECTIONS),
        "an object with params and batch_stats",
    ),
    "step": (lambda v: type(v) is int, "an integer"),
    "summary": OBJECT,
    "tensors": OBJECT,
}
_QUANTIZED_CHECKS: dict[str, Check] = {
    "name": NAME,
    "channel_axis": (
        lambda v: v is None or type(v) is int or (isinstance(v, list) and {*map(type, v)} == {int}),
        "an axis, an array of axes, or null",
    ),
    "bits": BITS,
    "shape": SHAPE,
}


class SavedNetwork(NamedTuple):
    """What a folder holds.

    Attributes:
        tensors: the quantized tensors by name.
        floats: the other variables by name, for each of `params` and `batch_stats`.
        structures: of `params` and `batch_stats` (see `structure.describe`).
        lo: lower ends of the activation ranges, float32 [sites].
        hi: upper ends, likewise.
        policy: what is quantized.
        image_shape: (H, W, C) of one image.
        preprocess: of images with 8 bits.
        step: of the run that made it.
        summary: of that run.
    """

    tensors: dict[str, QuantizedTensor]
    floats: dict[str, dict[str, np.ndarray]]
    structures: dict[str, Any]
    lo: np.ndarray
    hi: np.ndarray
    policy: QuantPolicy
    image_shape: tuple[int, ...]
    preprocess: Preprocess
    step: int
    summary: dict[str, Any]

    def variables(self) -> dict[str, dict[str, np.ndarray]]:
        """All variables by name, for each collection; weights being what their codes stand for."""
        rounded = {name: tensor.dequantized() for name, tensor in self.tensors.items()}
        return self.floats | {"params": self.floats["params"] | rounded}


def write_saved(folder: Path, network: SavedNetwork) -> None:
    """Writes a folder, whole or not at all.

    Raises:
        UserError: if the folder holds something, or cannot be written.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"folder = '{folder}' is not allowed: it must be empty, or not exist")
    policy = network.policy
    arrays = {"sites/lo": network.lo, "sites/hi": network.hi}
    for name, tensor in network.tensors.items():
        arrays[f"codes/{name}"] = pack_codes(tensor.codes, tensor.bits)
        arrays[f"scale/{name}"] = tensor.scale
        arrays[f"zero_point/{name}"] = tensor.zero_point
    for collection, floats in network.floats.items():
        arrays |= {f"{collection}/{name}": array for name, array in floats.items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    axes = dict(policy.kernels)
    manifest = {
        "format": _FORMAT,
        "image_shape": list(network.image_shape),
        "mean": list(network.preprocess.mean),
        "std": list(network.preprocess.std),
        "weight_bits": policy.weight_bits,
        "activation_bits": policy.activation_bits,
        "sites": policy.sites,
        "layer_bits": policy.layer_bits,
        "gates": policy.gates,
        "quantized": [
            {
                "name": name,
                "channel_axis": axes[name],
                "bits": tensor.bits,
                "shape": tensor.codes.shape,
            }
            for name in axes
            for tensor in (network.tensors[name],)
        ],
        "structure": network.structures,
        "step": network.step,
        "summary": network.summary,
    }
    try:
        with whole_folder(Path(os.path.abspath(folder))) as partial:
            write_checked(partial, manifest_bytes(manifest, arrays), arrays)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"folder = '{folder}' cannot be written: {error}") from error


def read_saved(folder: Path) -> SavedNetwork:
    """Reads a folder, and checks every byte of it.

    Raises:
        UserError: if it cannot be read, is damaged, or of another format.
    """
    where = str(folder / MANIFEST)
    data = read_manifest(folder)
    manifest = parse_json(data, where)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found == _FIRST_FORMAT:
        return _read_first_format(folder, manifest)
    if found != _FORMAT:
        raise ArtefactError(
            f"{folder} has the format {str(found)[:80]!r}, and this version reads {_FORMAT!r} and "
            f"{_FIRST_FORMAT!r}, which ZeroShotResult.save writes"
        )
    check_object(manifest, _MANIFEST_CHECKS, where)
    arrays = read_tensors(folder, manifest["tensors"], data)
    kernels, tensors = [], {}
    for i, entry in enumerate(manifest["quantized"]):
        check_object(entry, _QUANTIZED_CHECKS, f"{where}: quantized[{i}]")
        name, axis = entry["name"], entry["channel_axis"]
        kernels.append((name, tuple(axis) if isinstance(axis, list) else axis))
        try:
            codes = unpack_codes(arrays.pop(f"codes/{name}"), entry["bits"], entry["shape"])
            scale, zero_point = arrays.pop(f"scale/{name}"), arrays.pop(f"zero_point/{name}")
            if {scale.shape, zero_point.shape} != {grid_shape(codes.shape, kernels[-1][1])}:
                raise ValueError("its scales are not of the shape of its grids")
        except KeyError as error:
            raise ArtefactError(f"{folder / TENSORS} has no {error}") from error
        except ValueError as error:
            raise ArtefactError(f"{folder}: the tensor {name!r} is damaged: {error}") from error
        tensors[name] = QuantizedTensor(codes, scale, zero_point, entry["bits"])
    return _network(manifest, arrays, tensors, tuple(kernels), manifest["structure"], folder)


def _network(
    manifest: dict[str, Any],
    arrays: dict[str, np.ndarray],
    tensors: dict[str, QuantizedTensor],
    kernels: Kernels,
    structures: dict[str, Any],
    folder: Path,
) -> SavedNetwork:
    lo, hi = (arrays.get(f"sites/{end}", np.zeros(())) for end in ("lo", "hi"))
    if lo.ndim != 1 or lo.shape != hi.shape:
        raise ArtefactError(f"{folder / TENSORS} has no activation ranges sites/lo and sites/hi")
    floats: dict[str, dict[str, np.ndarray]] = {name: {} for name in _COLLECTIONS}
    for name, array in arrays.items():
        collection, _, rest = name.partition("/")
        if collection in floats:
            floats[collection][rest] = array
    try:
        policy = QuantPolicy(
            manifest["weight_bits"],
            manifest["activation_bits"],
            sites=manifest["sites"],
            layer_bits=tuple((layer, bits) for layer, bits in manifest["layer_bits"]),
            kernels=kernels,
            gates=manifest.get("gates", True),  # In the first format every ReLU was a site.
        )
    except ValueError as error:
        raise ArtefactError(f"{folder / MANIFEST}: {error}") from error
    return SavedNetwork(
        tensors=tensors,
        floats=floats,
        structures=structures,
        lo=lo,
        hi=hi,
        policy=policy,
        image_shape=tuple(manifest["image_shape"]),
        preprocess=Preprocess(tuple(manifest["mean"]), tuple(manifest["std"])),
        step=manifest["step"],
        summary=manifest["summary"],
    )


def _read_first_format(folder: Path, manifest: dict[str, Any]) -> SavedNetwork:
    """What the version before wrote, without checksums and without structures."""
    try:
        arrays = safetensors.numpy.load_file(folder / TENSORS)
        kernels, tensors = [], {}
        for entry in manifest["tensors"]:
            name, axis = entry["name"], entry["channel_axis"]
            kernels.append((name, tuple(axis) if isinstance(axis, list) else axis))
            codes = unpack_codes(arrays.pop(f"{name}/codes"), entry["bits"], entry["shape"])
            scale, zero_point = (arrays.pop(f"{name}/{part}") for part in ("scale", "zero_point"))
            tensors[name] = QuantizedTensor(
                codes, scale, _exact(zero_point, name, folder), entry["bits"]
            )
        structures = {}
        for collection in _COLLECTIONS:
            floats = {name.removeprefix(f"{collection}/") for name in arrays}
            names = {n for n in floats if f"{collection}/{n}" in arrays}
            names |= set(tensors) if collection == "params" else set()
            nested = flax.traverse_util.unflatten_dict({n: np.zeros(()) for n in names}, sep="/")
            structures[collection] = describe(nested)
        return _network(manifest, arrays, tensors, tuple(kernels), structures, folder)
    except UserError:
        raise
    except Exception as error:  # Nothing in these files was checked when they were written.
        raise ArtefactError(
            f"{folder} cannot be read: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _exact(zero_point: np.ndarray, name: str, folder: Path) -> np.ndarray:
    limits = np.iinfo(np.int32)
    if np.isin(zero_point, (limits.min, limits.max)).any():
        raise ArtefactError(
            f"{folder}: a channel of {name!r} holds one value, whose zero point was too large for "
            "the format that wrote it: its weights are lost; quantize and save the network again"
        )
    return zero_point.astype(np.float32)
