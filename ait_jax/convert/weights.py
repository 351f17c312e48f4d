"""Trained weights: read from any file or folder that is understood, checked, and saved."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from ait_jax.convert import Weights, WeightsError, check_weights, convert_state_dict
from ait_jax.convert.files import READABLE, is_of_flax, read_tensors
from ait_jax.convert.flax_sets import choose_variables
from ait_jax.convert.naming import rename
from ait_jax.convert.orbax_folder import read_orbax_folder
from ait_jax.convert.prefixes import choose_prefix
from ait_jax.convert.tensor_sets import choose_set, key_parts, sets_in
from ait_jax.convert.torch_file import TorchFileError
from ait_jax.run.storage import write_whole

__all__ = ["fingerprint", "load_variables", "read_weights", "save_variables"]

logger = logging.getLogger(__name__)


def read_weights(path: Path, arch: str, *, key: str = "") -> Weights:
    """Reads a file of weights, whatever its ending and naming; not yet checked against a model.

    Args:
        path: a PyTorch checkpoint, or a file of safetensors, NumPy or msgpack with Flax variables
            or a PyTorch state dict; or a folder that Orbax saved, as for `read_orbax_folder`.
        arch: the architecture, which decides what names mean.
        key: which of several sets of weights, see `tensor_sets` and `flax_sets`; "": the one that
            is there by convention.

    Returns:
        Its tensors under the network's names as far as these are known.

    Raises:
        WeightsError: if the file is missing or unreadable, or there is no such set; or there are
            several, and no key.
    """
    if path.is_dir():
        return Weights(read_orbax_folder(path, key=key))
    if not path.exists():
        raise WeightsError(f"teacher.weights = '{path}' is not allowed: there is no such file")
    try:
        tree = read_tensors(path)
    except TorchFileError as error:
        raise WeightsError(f"teacher.weights: {error}") from error
    if is_of_flax(tree):
        return Weights(_variables(tree, key, str(path)))
    found = choose_set(tree, key=key, source=str(path))
    if found is None:
        held = f" (its keys: {list(tree)!r:.200})" if isinstance(tree, Mapping) else ""
        raise WeightsError(
            f"teacher.weights: {path} holds no named tensors{held}; it must be {READABLE}"
        )
    weights = convert_state_dict(found.tensors, arch, source=str(path), place=found.path)
    return _completed(weights, tree, str(path))


def load_variables(path: Path, arch: str, expected: Any, *, key: str = "") -> dict[str, Any]:
    """Reads trained weights and checks them.

    Args:
        path: as for `read_weights`.
        arch: the architecture.
        expected: variables (or their shapes) of the model that they are for.
        key: as for `read_weights`.

    Returns:
        `params` and `batch_stats`, float32 arrays.

    Raises:
        WeightsError: as `read_weights` and `check_weights`.
    """
    return check_weights(read_weights(path, arch, key=key), expected, str(path), arch)


def _completed(weights: Weights, tree: Any, source: str) -> Weights:
    """With the running statistics of the raw network, where an average of parameters has none."""
    params, naming = weights.variables["params"], weights.naming
    if weights.variables["batch_stats"] or not params or naming is None:
        return weights
    statistics = {
        ".".join((*found.path, *key_parts(name))): value
        for found in sets_in(tree)
        for name, value in found.tensors.items()
        if key_parts(name)[-1:] in (("running_mean",), ("running_var",))
    }
    chosen = choose_prefix(statistics, [naming])
    if not statistics or chosen.alike:
        return weights  # The check says what is missing.
    state_dict = {name: statistics[theirs] for name, theirs in chosen.names.items()}
    variables, names, _ = rename(state_dict, naming)
    logger.info("%s: running statistics are those of %r", source, ".".join(chosen.prefixes[0]))
    return dataclasses.replace(
        weights,
        variables={"params": params, "batch_stats": variables["batch_stats"]},
        names={**weights.names, **{ours: chosen.names[name] for ours, name in names.items()}},
        state_dict={**weights.state_dict, **state_dict},
    )


def _variables(tree: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    flat = flax.traverse_util.flatten_dict(dict(tree))
    arrays = {path: value for path, value in flat.items() if isinstance(value, np.ndarray)}
    places = choose_variables(arrays, key=key, source=source)
    if places is None:  # The check says what is missing.
        return flax.traverse_util.unflatten_dict(arrays)
    taken: dict[tuple[str, ...], np.ndarray] = {}
    for name, place in zip(places._fields, places):
        inside = {
            path[len(place) :]: v for path, v in arrays.items() if path[: len(place)] == place
        }
        taken |= {(name, *rest): value for rest, value in inside.items()}
    return flax.traverse_util.unflatten_dict(taken)


def fingerprint(variables: Any) -> str:
    """SHA-256 over names, shapes and bytes of all variables, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(flax.traverse_util.flatten_dict(variables, sep="/").items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_variables(variables: Any, path: Path) -> None:
    """Writes variables as a safetensors file, whole or not at all."""
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    arrays = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    write_whole(path, safetensors.numpy.save(arrays))
