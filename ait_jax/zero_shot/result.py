"""What comes out of `zero_shot_quantize`: a network of integers, and files of it."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from ait_jax.errors import UserError
from ait_jax.export.packing import pack_codes, unpack_codes
from ait_jax.quant import affine
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.quant.ranges import ActivationRanges, fixed_ranges, range_bounds
from ait_jax.summary_table import summary_table
from ait_jax.teacher import Preprocess
from ait_jax.workdir import write_whole
from ait_jax.zero_shot.bring import network_of

__all__ = ["QuantizedTensor", "ZeroShotResult", "load_result"]

_FORMAT = "ait_jax zero_shot 1"
_MANIFEST, _TENSORS = "manifest.json", "model.safetensors"


class QuantizedTensor(NamedTuple):
    """A tensor of weights as integers; a weight is `(code + zero_point) / scale`.

    Attributes:
        codes: int8, of the tensor's shape.
        scale: float32, codes per unit; of length 1 along every axis that has no grid of its own.
        zero_point: float32 of whole numbers, likewise.
        bits: of the codes.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int

    def dequantized(self) -> np.ndarray:
        """The float32 weights."""
        return np.asarray(affine.dequantize(self.codes, self.scale, self.zero_point))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """A quantized network.

    Attributes:
        quantized: its structure: the network, `policy` and the activation `sites`.
        params: float32 parameters of the student, from which the codes are made.
        batch_stats: running statistics, the teacher's.
        ranges: of the activations.
        step: of the run, warm-up included, after which it was so.
        preprocess: what `mean` and `std` were.
        summary: accuracies in percent, sizes, times (as the program's `summary.json`).
        workdir: the run's folder; None if it was a temporary one.
    """

    quantized: QuantizedModel
    params: Any
    batch_stats: Any
    ranges: ActivationRanges
    step: int
    preprocess: Preprocess
    summary: dict[str, Any]
    workdir: Path | None

    @functools.cached_property
    def tensors(self) -> dict[str, QuantizedTensor]:
        """The quantized tensors by name."""
        found = {}
        for path, w in jax.tree.leaves_with_path(self.params):
            coder = self.quantized.policy.weight_codes(leaf_name(path), w.ndim)
            if coder is not None:
                scale, zero_point = affine.weight_params(w, coder.bits, coder.channel_axis)
                codes = affine.quantize(w, scale, zero_point, coder.bits)
                found[leaf_name(path)] = QuantizedTensor(
                    np.asarray(codes), np.asarray(scale), np.asarray(zero_point), coder.bits
                )
        return found

    @property
    def codes(self) -> dict[str, np.ndarray]:
        """int8 codes of the quantized tensors by name."""
        return {name: tensor.codes for name, tensor in self.tensors.items()}

    @functools.cached_property
    def rounded_params(self) -> Any:
        """All parameters, the quantized ones being what their codes stand for."""

        def leaf(path, w):
            tensor = self.tensors.get(leaf_name(path))
            return np.asarray(w) if tensor is None else tensor.dequantized()

        return jax.tree_util.tree_map_with_path(leaf, self.params)

    @property
    def activations(self) -> list[dict[str, Any]]:
        """The activation sites in the order of execution: kind, module, bits, and range."""
        lo, hi = (bound.tolist() for bound in jax.device_get(range_bounds(self.ranges)))
        return [
            {
                "kind": site.kind,
                "scope": site.scope,
                "bits": self.quantized.policy.site_bits(site.kind),
                "lo": lo[site.index],
                "hi": hi[site.index],
            }
            for site in self.quantized.sites
        ]

    @functools.cached_property
    def _forward(self):
        def forward(params, images):
            return self.quantized.apply(params, self.batch_stats, images, self.ranges)[0]

        return jax.jit(forward)

    def logits(self, images: Any) -> np.ndarray:
        """Logits of the quantized network.

        Args:
            images: [N, H, W, C], float as the model takes them, or uint8, which are normalised.

        Returns:
            float32 [N, classes].
        """
        images = np.asarray(images)
        if images.dtype == np.uint8:
            images = self.preprocess(images)  # type: ignore[arg-type, assignment]
        return np.asarray(self._forward(self.params, images), np.float32)

    def predict(self, images: Any) -> np.ndarray:
        """The likeliest class of each image, int [N]; images as for `logits`."""
        return self.logits(images).argmax(axis=-1)

    def __str__(self) -> str:
        where = {"paper": "after ReLUs", "integer": "at ReLUs and inputs of kernels"}
        reads = self.quantized.kernel_reads
        counts = {"quantized_inputs": reads.quantized, "kernel_calls": reads.total}
        return (
            f"{summary_table(self.summary | counts)}\n"
            f"  {'tensors of weights':<26}{len(self.tensors):6d}\n"
            f"  {'activation sites':<26}{len(self.quantized.sites):6d} "
            f"{where[self.quantized.policy.sites]}"
        )

    def save(self, folder: str | Path) -> None:
        """Writes `model.safetensors`, codes packed at their true width, and `manifest.json`.

        `load_result` reads it; docs/bring_your_model.md says what is in them.

        Args:
            folder: to write; empty, or not there yet.

        Raises:
            UserError: if the folder holds something, or cannot be written.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"folder = '{folder}' is not allowed: it must be empty, or not exist")
        arrays = {}
        for name, tensor in self.tensors.items():
            arrays[f"{name}/codes"] = pack_codes(tensor.codes, tensor.bits)
            arrays[f"{name}/scale"] = np.ascontiguousarray(tensor.scale)
            arrays[f"{name}/zero_point"] = tensor.zero_point.astype(np.int32)
        for leaf_path, w in jax.tree.leaves_with_path(self.params):
            if leaf_name(leaf_path) not in self.tensors:
                arrays[f"params/{leaf_name(leaf_path)}"] = np.ascontiguousarray(w)
        for leaf_path, w in jax.tree.leaves_with_path(self.batch_stats):
            arrays[f"batch_stats/{leaf_name(leaf_path)}"] = np.ascontiguousarray(w)
        lo, hi = range_bounds(self.ranges)
        arrays |= {"sites/lo": np.asarray(lo), "sites/hi": np.asarray(hi)}
        policy = self.quantized.policy
        manifest = {
            "format": _FORMAT,
            "image_shape": list(self.quantized.image_shape),
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
            "weight_bits": policy.weight_bits,
            "activation_bits": policy.activation_bits,
            "sites": policy.sites,
            "layer_bits": policy.layer_bits,
            "gates": policy.gates,
            "tensors": [
                {
                    "name": name,
                    "channel_axis": axis,
                    "bits": tensor.bits,
                    "shape": tensor.codes.shape,
                }
                for name, axis in policy.kernels or ()
                for tensor in (self.tensors[name],)
            ],
            "step": self.step,
            "summary": self.summary,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(arrays, path / _TENSORS)
            write_whole(path / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"folder = '{folder}' cannot be written: {error}") from error


def load_result(
    folder: str | Path, model: Any, *, apply_kwargs: Mapping[str, Any] | None = None
) -> ZeroShotResult:
    """Reads what `ZeroShotResult.save` wrote.

    Args:
        folder: of the files.
        model: as it was given to `zero_shot_quantize`, of whatever weights. (The parameters of a
            function come as nested dicts.)
        apply_kwargs: as they were given there.

    Returns:
        The network; its `params` are what the codes stand for.

    Raises:
        UserError: if the files cannot be read, or are not of such a network.
    """
    path = Path(folder)
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        arrays = safetensors.numpy.load_file(path / _TENSORS)
        if manifest["format"] != _FORMAT:
            found = manifest["format"]
            raise UserError(f"{path} has the format {found!r}, and this version reads {_FORMAT!r}")
        flat: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
        for tensor in manifest["tensors"]:
            name = tensor["name"]
            codes = unpack_codes(arrays[f"{name}/codes"], tensor["bits"], tensor["shape"])
            grid = arrays[f"{name}/scale"], arrays[f"{name}/zero_point"]
            flat["params"][name] = QuantizedTensor(codes, *grid, tensor["bits"]).dequantized()
        for name, array in arrays.items():
            collection, _, rest = name.partition("/")
            if collection in flat and name.rpartition("/")[0] not in flat["params"]:
                flat[collection][rest] = array
        policy = QuantPolicy(
            manifest["weight_bits"],
            manifest["activation_bits"],
            sites=manifest["sites"],
            layer_bits=tuple((layer, bits) for layer, bits in manifest["layer_bits"]),
            kernels=tuple(
                (t["name"], tuple(axis) if isinstance(axis := t["channel_axis"], list) else axis)
                for t in manifest["tensors"]
            ),
            gates=manifest.get("gates", True),  # Once, every ReLU was a site.
        )
        variables = {
            name: flax.traverse_util.unflatten_dict(tree, sep="/") for name, tree in flat.items()
        }
        given = None if isinstance(model, nnx.Module) else variables
        network, _ = network_of(model, given, apply_kwargs or {})
        quantized = QuantizedModel(network, policy, variables, tuple(manifest["image_shape"]))
        ranges = fixed_ranges(arrays["sites/lo"], arrays["sites/hi"])  # type: ignore[arg-type]
        if len(quantized.sites) != ranges.lo.size:
            raise UserError(
                f"{path} holds no network of this model: it has {ranges.lo.size} activation sites, "
                f"and the model {len(quantized.sites)}"
            )
        return ZeroShotResult(
            quantized=quantized,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            ranges=ranges,
            step=manifest["step"],
            preprocess=Preprocess(tuple(manifest["mean"]), tuple(manifest["std"])),
            summary=manifest["summary"],
            workdir=None,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} holds no network of this model: {error}") from error
