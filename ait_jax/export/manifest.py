"""`manifest.json`: what the tensors of an artefact mean, and the checks of it (docs/format.md)."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from ait_jax.errors import UserError
from ait_jax.export.packing import packed_size
from ait_jax.models import ARCHITECTURES
from ait_jax.quant.affine import MAX_BITS, MIN_BITS
from ait_jax.quant.policy import SITES

__all__ = [
    "ARRAY",
    "BITS",
    "FLOAT_INPUT",
    "FORMAT_VERSION",
    "MANIFEST",
    "NAME",
    "OBJECT",
    "SHAPE",
    "TENSOR_ENTRY",
    "ArtefactError",
    "Check",
    "check_object",
    "parse_json",
    "parse_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# What a layer reads whose input is on no grid.
FLOAT_INPUT = "float"


class ArtefactError(UserError):
    """An artefact that cannot be written, or that is none; names the folder or file, and why."""


Check = tuple[Callable[[Any], bool], str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # An integer may be too large to be a float.
    return (_is_int(value) and abs(value) < 2**63) or (
        isinstance(value, float) and math.isfinite(value)
    )


def _list_of(ok: Callable[[Any], bool], allowed: str) -> Check:
    return lambda v: isinstance(v, list) and all(map(ok, v)), allowed


_TEXT: Check = (lambda v: isinstance(v, str), "text")
NAME: Check = (lambda v: isinstance(v, str) and v != "", "a name")
OBJECT: Check = (lambda v: isinstance(v, dict), "an object")
ARRAY: Check = (lambda v: isinstance(v, list), "an array")
_COUNT: Check = (lambda v: _is_int(v) and v > 0, "a positive integer")
BITS: Check = (
    lambda v: _is_int(v) and MIN_BITS <= v <= MAX_BITS,
    f"an integer in {MIN_BITS}..{MAX_BITS}",
)
SHAPE = _list_of(_COUNT[0], "an array of positive integers")

_TOP: dict[str, Check] = {
    "architecture": (
        lambda v: isinstance(v, str) and v in ARCHITECTURES,
        "one of " + ", ".join(ARCHITECTURES),
    ),
    "num_classes": _COUNT,
    "image_shape": (
        lambda v: SHAPE[0](v) and len(v) == 3 and max(v) < 2**16,
        "three positive integers (height, width, channels)",
    ),
    "quantization": OBJECT,
    "preprocessing": OBJECT,
    "layers": ARRAY,
    "sites": ARRAY,
    "batch_norms": ARRAY,
    "parameters": _list_of(NAME[0], "an array of names"),
    "tensors": OBJECT,
    "teacher_fingerprint": _TEXT,
    "accuracy": OBJECT,
    "config": OBJECT,
    "versions": OBJECT,
}
_QUANTIZATION: dict[str, Check] = {
    "weight_bits": BITS,
    "activation_bits": BITS,
    "sites": (lambda v: v in SITES, f"one of {', '.join(SITES)}"),
    "layer_bits": (
        lambda v: isinstance(v, dict) and all(map(BITS[0], v.values())),
        f"an object of bits by layer, each {BITS[1]}",
    ),
}
_LAYER: dict[str, Check] = {
    "name": NAME,
    "kind": (lambda v: v in ("conv", "dense"), "conv or dense"),
    "bits": BITS,
    "shape": (lambda v: SHAPE[0](v) and len(v) >= 2, "an array of two positive integers or more"),
    **dict.fromkeys(("codes", "scale", "zero_point"), NAME),
}
_SITE: dict[str, Check] = {
    "kind": NAME,
    "scope": _TEXT,
    "bits": BITS,
    "scale": (_is_number, "a number"),
    "zero_point": (_is_int, "an integer"),
}
TENSOR_ENTRY: dict[str, Check] = {
    "dtype": (lambda v: v in ("U8", "I32", "F32"), "U8, I32 or F32"),
    "shape": _list_of(lambda n: _is_int(n) and n >= 0, "an array of integers"),
    "sha256": (lambda v: isinstance(v, str) and len(v) == 64, "64 hexadecimal digits"),
}


def check_object(value: Any, checks: dict[str, Check], where: str) -> None:
    """Checks the values of an object of JSON.

    Args:
        value: the object.
        checks: by key, whether a value is allowed, and what is.
        where: it stands, for messages.

    Raises:
        ArtefactError: naming the first key that is missing or whose value is not allowed.
    """
    if not isinstance(value, dict):
        raise ArtefactError(f"{where} is not allowed: it must be an object")
    for key, (ok, allowed) in checks.items():
        if key not in value:
            raise ArtefactError(f"{where}: {key!r} is missing")
        if not ok(value[key]):
            shown = repr(value[key])
            shown = shown if len(shown) <= 80 else shown[:77] + "..."
            raise ArtefactError(f"{where}: {key} = {shown} is not allowed: it must be {allowed}")


def parse_json(data: bytes, path: str) -> Any:
    """What a file of JSON holds.

    Raises:
        ArtefactError: if it is not valid JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not valid JSON: {error}") from error


def parse_manifest(data: bytes, path: str) -> dict[str, Any]:
    """Reads a manifest and checks it for itself: types, ranges, and that its parts agree.

    Args:
        data: the file.
        path: for messages.

    Returns:
        The manifest.

    Raises:
        ArtefactError: if it is no manifest, of another version, or contradicts itself.
    """
    manifest = parse_json(data, path)
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ArtefactError(f"{path} is no manifest of an artefact: it has no format_version")
    version = manifest["format_version"]
    if not _is_int(version) or version != FORMAT_VERSION:
        raise ArtefactError(
            f"{path}: format_version = {str(version)[:80]} is unknown: this program reads "
            f"{FORMAT_VERSION}"
        )
    check_object(manifest, _TOP, path)
    check_object(manifest["quantization"], _QUANTIZATION, f"{path}: quantization")
    check_object(manifest["preprocessing"], _preprocessing(manifest), f"{path}: preprocessing")
    for i, site in enumerate(manifest["sites"]):
        check_object(site, _SITE, f"{path}: sites[{i}]")
    inputs: Check = (
        lambda v: v == FLOAT_INPUT or (_is_int(v) and 0 <= v < len(manifest["sites"])),
        f"{FLOAT_INPUT!r}, or the index of a site",
    )
    for i, layer in enumerate(manifest["layers"]):
        check_object(layer, _LAYER | {"input": inputs}, f"{path}: layers[{i}]")
    for i, norm in enumerate(manifest["batch_norms"]):
        check_object(norm, dict.fromkeys(("name", "a", "b"), NAME), f"{path}: batch_norms[{i}]")
    for name, tensor in manifest["tensors"].items():
        check_object(tensor, TENSOR_ENTRY, f"{path}: tensors[{name!r}]")
    _check_layout(manifest, path)
    return manifest


def _preprocessing(manifest: dict[str, Any]) -> dict[str, Check]:
    height, width, channels = manifest["image_shape"]
    crop = min(height, width)
    return {
        "mean": (
            lambda v: isinstance(v, list) and len(v) == channels and all(map(_is_number, v)),
            f"{channels} numbers",
        ),
        "std": (
            lambda v: (
                isinstance(v, list)
                and len(v) == channels
                and all(_is_number(x) and x > 0 for x in v)
            ),
            f"{channels} positive numbers",
        ),
        "resize": (
            lambda v: _is_int(v) and (v == 0 or crop <= v < 2**16),
            f"0, or an integer of at least {crop}",
        ),
        "interpolation": (lambda v: v in ("bilinear", "bicubic"), "bilinear or bicubic"),
    }


def _layout(manifest: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...] | None]]:
    """Name, dtype and shape of each tensor that a manifest speaks of; a shape of None is free."""
    for layer in manifest["layers"]:
        shape, bits = layer["shape"], layer["bits"]
        yield layer["codes"], "U8", (packed_size(math.prod(shape), bits),)
        yield layer["scale"], "F32", (shape[-1],)
        yield layer["zero_point"], "I32", (shape[-1],)
    sites = (len(manifest["sites"]),)
    yield "sites/scale", "F32", sites
    yield "sites/zero_point", "I32", sites
    tensors = manifest["tensors"]
    for norm in manifest["batch_norms"]:
        yield norm["a"], "F32", None
        yield norm["b"], "F32", tuple(tensors[norm["a"]]["shape"]) if norm["a"] in tensors else None
    for name in manifest["parameters"]:
        yield name, "F32", None


def _check_layout(manifest: dict[str, Any], path: str) -> None:
    tensors = manifest["tensors"]
    named = set()
    for name, dtype, shape in _layout(manifest):
        named.add(name)
        if name not in tensors:
            raise ArtefactError(f"{path}: the tensor {name!r} is missing in tensors")
        listed = tensors[name]
        wanted = tuple(listed["shape"]) if shape is None else shape
        if (listed["dtype"], tuple(listed["shape"])) != (dtype, wanted):
            raise ArtefactError(
                f"{path}: tensors[{name!r}] is {listed['dtype']} {listed['shape']}, and what "
                f"reads it wants {dtype} {list(wanted)}"
            )
    extra = sorted(set(tensors) - named)
    if extra:
        raise ArtefactError(f"{path}: no layer, site, batch norm or parameter has {extra[0]!r}")
