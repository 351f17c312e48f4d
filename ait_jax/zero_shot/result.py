"""What comes out of `zero_shot_quantize`: a network of integers, and files of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ait_jax.errors import UserError
from ait_jax.quant.linen import QuantizedModel
from ait_jax.run.storage import user_path
from ait_jax.run.summary_table import summary_table
from ait_jax.teacher import Preprocess
from ait_jax.zero_shot.bring import network_of
from ait_jax.zero_shot.images import model_inputs
from ait_jax.zero_shot.networks import as_given, by_name, variable_name
from ait_jax.zero_shot.saved import SavedNetwork, read_saved, write_saved
from ait_jax.zero_shot.structure import describe, rebuild
from ait_jax.zero_shot.tensors import QuantizedTensor

__all__ = ["ZeroShotResult", "load_result"]


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """A quantized network.

    Attributes:
        quantized: its structure: the network, `policy` and the activation `sites`.
        tensors: the quantized tensors by name.
        params: float32 parameters of the student, in the structure that was quantized. Of a result
            that was loaded, the quantized ones are what their codes stand for.
        batch_stats: running statistics, the teacher's.
        ranges: the activation quantizer's state.
        step: of the run, warm-up included, after which it was so.
        preprocess: what `mean` and `std` were.
        summary: accuracies in percent, sizes, times (as the program's `summary.json`).
        workdir: the run's folder; None if it was a temporary one.
    """

    quantized: QuantizedModel
    tensors: dict[str, QuantizedTensor]
    params: Any
    batch_stats: Any
    ranges: Any
    step: int
    preprocess: Preprocess
    summary: dict[str, Any]
    workdir: Path | None

    @property
    def codes(self) -> dict[str, np.ndarray]:
        """int8 codes of the quantized tensors by name."""
        return {name: tensor.codes for name, tensor in self.tensors.items()}

    @functools.cached_property
    def rounded_params(self) -> Any:
        """All parameters, the quantized ones being what their codes stand for."""

        def leaf(path, w):
            tensor = self.tensors.get(variable_name(path))
            return np.asarray(w) if tensor is None else tensor.dequantized()

        return jax.tree_util.tree_map_with_path(leaf, self.params)

    def _bounds(self) -> tuple[jax.Array, jax.Array]:
        return self.quantized.bounds(self.ranges)

    @property
    def activations(self) -> list[dict[str, Any]]:
        """The activation sites in the order of execution: kind, module, bits, and range."""
        lo, hi = (bound.tolist() for bound in jax.device_get(self._bounds()))
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
    def _forward(self) -> Callable[[Any], jax.Array]:
        # Numbers are arguments: a program that has them as constants may round differently, and
        # what is saved and loaded has to give the same logits bit for bit.
        @jax.jit
        def forward(rounded, scales, batch_stats, ranges, images):
            return self.quantized.apply_rounded(rounded, scales, batch_stats, images, ranges)

        rounded = by_name(self.quantized.model, self.rounded_params)
        scales = {
            name: tensor.scale
            for name, tensor in self.tensors.items()
            if dict(self.quantized.policy.kernels)[name] == -1
        }
        ranges = self.quantized.policy.activations.fixed(*self._bounds())
        return functools.partial(forward, rounded, scales, self.batch_stats, ranges)

    def logits(self, images: Any) -> np.ndarray:
        """Logits of the quantized network.

        Args:
            images: [N, H, W, C]: floats as the model takes them; or integers in 0..255 of any
                dtype, which are normalised.

        Returns:
            float32 [N, classes].

        Raises:
            UserError: if they are of another shape, or neither finite floats nor such integers.
        """
        images = model_inputs(images, self.quantized.image_shape, self.preprocess, name="images")
        return np.asarray(self._forward(images), np.float32)

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
        lo, hi = self._bounds()
        given = {"params": self.params, "batch_stats": self.batch_stats}
        write_saved(
            user_path(folder),
            SavedNetwork(
                tensors=self.tensors,
                floats={
                    collection: {
                        name: np.asarray(leaf)
                        for path, leaf in jax.tree.leaves_with_path(tree)
                        if (name := variable_name(path)) not in self.tensors
                        or collection != "params"
                    }
                    for collection, tree in given.items()
                },
                structures={collection: describe(tree) for collection, tree in given.items()},
                lo=np.asarray(lo),
                hi=np.asarray(hi),
                policy=self.quantized.policy,
                image_shape=self.quantized.image_shape,
                preprocess=self.preprocess,
                step=self.step,
                summary=self.summary,
            ),
        )


def load_result(
    folder: str | Path,
    model: Any,
    variables: Any = None,
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> ZeroShotResult:
    """Reads what `ZeroShotResult.save` wrote; its logits are those of what was saved, bit for bit.

    Args:
        folder: of the files.
        model: as it was given to `zero_shot_quantize`, of whatever weights.
        variables: as they were given there, of whatever numbers (shapes will do). Only a function
            needs them, and only where its parameters are of classes that a file cannot hold: a
            NamedTuple, a dataclass, an Equinox module; dicts, lists and tuples come back as such.
        apply_kwargs: as they were given there.

    Returns:
        The network; its `params` are what the codes stand for.

    Raises:
        UserError: if the files cannot be read, are damaged, or are not of such a network.
    """
    path = user_path(folder)
    saved = read_saved(path)
    found = saved.variables()
    try:
        if variables is None and not isinstance(model, nnx.Module):
            variables = {
                name: rebuild(structure, found[name])
                for name, structure in saved.structures.items()
            }
        network, own = network_of(model, variables, apply_kwargs or {})
        trees = {name: own.get(name, {}) for name in found}
        for name, tree in trees.items():
            _check_shapes(name, tree, found[name])
        loaded = {
            name: jax.tree_util.tree_map_with_path(
                lambda path, _, named=found[name]: named[variable_name(path)], tree
            )
            for name, tree in trees.items()
        }
        quantized = QuantizedModel(network, saved.policy, loaded, saved.image_shape)
        if len(quantized.sites) != saved.lo.size:
            raise UserError(
                f"it has {saved.lo.size} activation sites, and the model {len(quantized.sites)}"
            )
    except Exception as error:  # A model may raise anything for variables of another one.
        raise UserError(f"{path} holds no network of this model: {error}") from error
    return ZeroShotResult(
        quantized=quantized,
        tensors=saved.tensors,
        params=as_given(network, "params", loaded["params"]),
        batch_stats=as_given(network, "batch_stats", loaded["batch_stats"]),
        ranges=saved.policy.activations.fixed(saved.lo, saved.hi),  # type: ignore[arg-type]
        step=saved.step,
        preprocess=saved.preprocess,
        summary=saved.summary,
        workdir=None,
    )


def _check_shapes(collection: str, tree: Any, found: Mapping[str, np.ndarray]) -> None:
    """Whether the variables of a model have the names and shapes of those that were read."""
    shapes = {variable_name(path): np.shape(x) for path, x in jax.tree.leaves_with_path(tree)}
    for name in sorted({*shapes, *found}):
        if name not in found or name not in shapes:
            where = "the model" if name in shapes else "the file"
            raise UserError(f"only {where} has {collection}/{name}")
        if shapes[name] != found[name].shape:
            raise UserError(
                f"{collection}/{name} has the shape {found[name].shape} there, and the model's "
                f"{shapes[name]}"
            )
