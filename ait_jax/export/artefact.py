"""The artefact: a quantized network as integers, and all that running it takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.export.batch_norm import FoldedBatchNorm, folded, shapes_and_epsilons, unfolded
from ait_jax.export.manifest import FLOAT_INPUT, FORMAT_VERSION, MANIFEST, ArtefactError
from ait_jax.export.packing import pack_codes, unpack_codes
from ait_jax.models import build_model
from ait_jax.quant.integer import IntegerModel, IntegerVariables
from ait_jax.quant.integer_kernel import IntegerKernel
from ait_jax.quant.kernels import network_kernels
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import QuantPolicy, leaf_name
from ait_jax.teacher import Preprocess

__all__ = ["Artefact", "Network"]


class Network(NamedTuple):
    """What runs: `model.apply(variables, images)`.

    Attributes:
        model: the structure.
        variables: the integers.
    """

    model: IntegerModel
    variables: IntegerVariables


class Artefact(NamedTuple):
    """What a folder holds (see `files`).

    Attributes:
        manifest: as in `manifest.json`.
        kernels: by layer, of numpy arrays.
        batch_norms: folded, by name.
        params: every other parameter, float32, by name.
        site_scale: float32 [sites], codes per unit.
        site_zero_point: int32 [sites].
    """

    manifest: dict[str, Any]
    kernels: dict[str, IntegerKernel]
    batch_norms: dict[str, FoldedBatchNorm]
    params: dict[str, np.ndarray]
    site_scale: np.ndarray
    site_zero_point: np.ndarray

    @classmethod
    def of(
        cls, model: IntegerModel, variables: IntegerVariables, facts: dict[str, Any]
    ) -> "Artefact":
        """The artefact of a network.

        Args:
            model: the network.
            variables: its integers.
            facts: the manifest's `architecture`, `num_classes`, `image_shape`, `preprocessing`,
                `teacher_fingerprint`, `accuracy`, `config` and `versions`.
        """
        policy = model.quantized.policy
        _, epsilons = shapes_and_epsilons(model.quantized.model, facts["image_shape"])
        norms, params = folded(variables.params, variables.batch_stats, epsilons)
        kernels = {
            name: IntegerKernel(*map(np.asarray, kernel))  # type: ignore[arg-type]
            for name, kernel in variables.kernels.items()
        }
        scale, zero_point = map(np.asarray, (variables.site_scale, variables.site_zero_point))
        manifest = {
            "format_version": FORMAT_VERSION,
            **facts,
            "quantization": {
                "weight_bits": policy.weight_bits,
                "activation_bits": policy.activation_bits,
                "sites": policy.sites,
                "layer_bits": dict(policy.layer_bits),
            },
            "layers": [
                _layer_entry(layer, np.asarray(kernels[layer.name].codes)) for layer in model.layers
            ],
            "sites": [
                {
                    "kind": site.kind,
                    "scope": site.scope,
                    "bits": policy.site_bits(site.kind),
                    "scale": float(scale[site.index]),
                    "zero_point": int(zero_point[site.index]),
                }
                for site in model.sites
            ],
            "batch_norms": [{"name": n, "a": f"{n}/a", "b": f"{n}/b"} for n in norms],
            "parameters": list(params),
        }
        return cls(manifest, kernels, norms, params, scale, zero_point)

    @classmethod
    def from_tensors(cls, manifest: dict[str, Any], tensors: dict[str, np.ndarray]) -> "Artefact":
        """Of a manifest that `manifest.parse_manifest` has checked, and the tensors it lists."""
        kernels = {
            layer["name"]: IntegerKernel(
                unpack_codes(tensors[layer["codes"]], layer["bits"], layer["shape"]),  # type: ignore[arg-type]
                tensors[layer["scale"]],  # type: ignore[arg-type]
                tensors[layer["zero_point"]],  # type: ignore[arg-type]
            )
            for layer in manifest["layers"]
        }
        norms = {
            norm["name"]: FoldedBatchNorm(tensors[norm["a"]], tensors[norm["b"]])
            for norm in manifest["batch_norms"]
        }
        params = {name: tensors[name] for name in manifest["parameters"]}
        sites = tensors["sites/scale"], tensors["sites/zero_point"]
        return cls(manifest, kernels, norms, params, *sites)

    @property
    def preprocess(self) -> Preprocess:
        """What images of the network look like."""
        values = self.manifest["preprocessing"]
        return Preprocess(
            tuple(values["mean"]), tuple(values["std"]), values["resize"], values["interpolation"]
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        height, width, channels = self.manifest["image_shape"]
        return height, width, channels

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors by name, as they are stored."""
        arrays: dict[str, np.ndarray] = {}
        for layer in self.manifest["layers"]:
            kernel = self.kernels[layer["name"]]
            arrays[layer["codes"]] = pack_codes(np.asarray(kernel.codes), layer["bits"])
            arrays[layer["scale"]] = np.asarray(kernel.scale)
            arrays[layer["zero_point"]] = np.asarray(kernel.zero_point)
        for norm in self.manifest["batch_norms"]:
            arrays[norm["a"]], arrays[norm["b"]] = self.batch_norms[norm["name"]]
        arrays |= self.params
        arrays |= {"sites/scale": self.site_scale, "sites/zero_point": self.site_zero_point}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def network(self) -> Network:
        """Builds the network, and checks that the artefact is one of it.

        Raises:
            ArtefactError: if the manifest describes another network than its architecture's.
        """
        manifest = self.manifest
        bits = manifest["quantization"]
        model = build_model(manifest["architecture"], manifest["num_classes"])
        try:
            shapes, epsilons = shapes_and_epsilons(model, self.image_shape)
            policy = QuantPolicy(
                bits["weight_bits"],
                bits["activation_bits"],
                network_kernels(model, shapes, self.image_shape),
                sites=bits["sites"],
                layer_bits=tuple(bits["layer_bits"].items()),
            )
            quantized = QuantizedModel(model, policy, shapes, self.image_shape)
            integer = IntegerModel(quantized, shapes, self.image_shape)
        except Exception as error:  # What a network raises for images too small for it.
            raise ArtefactError(
                f"{MANIFEST}: {manifest['architecture']} cannot be built for image_shape = "
                f"{manifest['image_shape']}: {error}"
            ) from error
        self._check_structure(integer, shapes, epsilons)
        norm_params, batch_stats = unfolded(self.batch_norms, epsilons)
        variables = IntegerVariables(
            kernels=self.kernels,
            params=self.params | norm_params,  # type: ignore[arg-type]
            batch_stats=batch_stats,  # type: ignore[arg-type]
            site_scale=self.site_scale,  # type: ignore[arg-type]
            site_zero_point=self.site_zero_point,  # type: ignore[arg-type]
        )
        return Network(integer, jax.tree.map(jnp.asarray, variables))

    def _check_structure(self, model: IntegerModel, shapes, epsilons) -> None:
        policy = model.quantized.policy
        flat = _flat_shapes(shapes)
        channels = {name: flat[f"batch_stats/{name}/mean"] for name in epsilons}
        learned = {f"{name}/{leaf}" for name in epsilons for leaf in ("scale", "bias")}
        kernels = {f"{layer.name}/kernel" for layer in model.layers}
        params = {
            name.removeprefix("params/"): shape
            for name, shape in flat.items()
            if name.startswith("params/")
        }
        wanted: dict[str, Any] = {
            "layers": [
                (x.name, x.kind, x.bits, FLOAT_INPUT if x.site is None else x.site, x.shape)
                for x in model.layers
            ],
            "sites": [(x.kind, policy.site_bits(x.kind)) for x in model.sites],
            "batch_norms": channels,
            "parameters": {n: s for n, s in params.items() if n not in learned | kernels},
        }
        found: dict[str, Any] = {
            "layers": [
                (x["name"], x["kind"], x["bits"], x["input"], tuple(x["shape"]))
                for x in self.manifest["layers"]
            ],
            "sites": [(x["kind"], x["bits"]) for x in self.manifest["sites"]],
            "batch_norms": {name: norm.a.shape for name, norm in self.batch_norms.items()},
            "parameters": {name: array.shape for name, array in self.params.items()},
        }
        for part, expected in wanted.items():
            if found[part] != expected:
                raise ArtefactError(
                    f"{MANIFEST}: its {part} are not those of {self.manifest['architecture']} with "
                    f"image_shape = {self.manifest['image_shape']} and num_classes = "
                    f"{self.manifest['num_classes']}: {_difference(found[part], expected)}"
                )


def _layer_entry(layer, codes: np.ndarray) -> dict[str, Any]:
    half = 1 << (layer.bits - 1)
    counts = np.bincount(codes.reshape(-1).astype(np.int64) + half, minlength=2 * half)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "bits": layer.bits,
        "input": FLOAT_INPUT if layer.site is None else layer.site,
        "shape": list(layer.shape),
        "macs": layer.macs,
        "histogram": counts.tolist(),
        **{part: f"{layer.name}/{part}" for part in ("codes", "scale", "zero_point")},
    }


def _flat_shapes(shapes) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): like.shape for path, like in jax.tree.leaves_with_path(shapes)}


def _difference(found, expected) -> str:
    if isinstance(found, dict):
        found, expected = sorted(found.items()), sorted(expected.items())
    for ours, theirs in zip(found, expected):
        if ours != theirs:
            return f"{ours} in place of {theirs}"
    return f"{len(found)} of them in place of {len(expected)}"
