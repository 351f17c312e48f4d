"""Trained weights of other frameworks -> variables of `ait_jax.models`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from ait_jax.convert.naming import COUNTER, Naming, rename
from ait_jax.convert.namings import namings
from ait_jax.errors import UserError
from ait_jax.quant.policy import leaf_name

__all__ = ["Weights", "WeightsError", "check_weights", "convert_state_dict"]

# Tensors of a kind that a message lists by name.
_LISTED = 20

logger = logging.getLogger(__name__)


class WeightsError(UserError):
    """Weights that do not fit; the message names the file, the tensors, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file of weights holds; not yet checked against a network.

    Attributes:
        variables: `params` and `batch_stats`, nested dicts of numpy arrays.
        naming: whose names the file has; None: the network's own, and what follows is empty.
        names: the network's name of a tensor ("params/stem_conv/kernel") -> the file's.
        unknown: shapes of the tensors that have no place in `variables`, by the file's names.
        state_dict: the file's tensors as they are.
    """

    variables: dict[str, Any]
    naming: Naming | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    state_dict: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def described(self, name: str) -> str:
        """The file's name of a tensor, with the network's name behind it."""
        theirs = self.names.get(name, "")
        if not theirs and self.naming:
            theirs = " or ".join(self.naming.source_names(name))
        return f"{theirs} ({name})" if theirs else name


def convert_state_dict(state_dict: Mapping[str, np.ndarray], arch: str) -> Weights:
    """Flax variables from a PyTorch state dict; its tensors' names tell whose naming it has.

    Args:
        state_dict: arrays by name, in PyTorch's layouts.
        arch: name of the architecture, a key of `models.ARCHITECTURES`.

    Returns:
        Its tensors under the network's names, in its layouts, and those of unknown names.
    """
    known = namings(arch)
    marked = [naming for naming in known if naming.marker in state_dict] or known
    renamed = [(naming, *rename(state_dict, naming)) for naming in marked]
    naming, variables, names, unknown = min(renamed, key=lambda found: len(found[-1]))
    return Weights(variables, naming, names, unknown, state_dict)


def check_weights(weights: Weights, expected: Any, source: str, arch: str) -> dict[str, Any]:
    """Checks names, shapes and values of weights against the variables of a network.

    Args:
        weights: what a file holds.
        expected: the network's variables, nested dicts of arrays or `jax.ShapeDtypeStruct`s.
        source: the file, for messages.
        arch: the architecture, for messages.

    Returns:
        `params` and `batch_stats`, float32 numpy arrays.

    Raises:
        WeightsError: lists all tensors (20 of each kind and a count) that are missing, unused or of
            another shape, with their shapes in the layouts of the network (kernels [kh, kw, in,
            out], dense [in, out]; in the file's where the name is unknown); or names one that holds
            NaN or infinite values.
    """
    found, wanted = _shapes(weights.variables), _shapes(expected)
    unused = {weights.described(name): found[name] for name in found if name not in wanted}
    missing = [name for name in wanted if name not in found]
    reshaped = [name for name in wanted if name in found and found[name] != wanted[name]]

    def lacks(name: str) -> str:
        return f"{weights.described(name)} of shape {wanted[name]}"

    def differs(name: str) -> str:
        return f"{weights.described(name)} is {found[name]}, expected {wanted[name]}"

    unused = {**weights.unknown, **unused}
    kinds = [
        _listed(missing, "missing", lacks),
        _listed(list(unused), "unused", lambda name: f"{name} of shape {unused[name]}"),
        _listed(reshaped, "of another shape", differs),
    ]
    if any(kinds):
        if weights.unknown:
            projects = "; ".join(naming.project for naming in namings(arch))
            kinds.append(f"names that are known for it: those of {projects}")
        problems = "\n  ".join(filter(None, kinds))
        raise WeightsError(f"{source}: does not fit teacher.arch = {arch!r}: {problems}")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), weights.variables)
    for name, value in flax.traverse_util.flatten_dict(variables, sep="/").items():
        if not np.all(np.isfinite(value)):
            described = weights.described(name)
            raise WeightsError(f"{source}: tensor {described} holds NaN or infinite values")
    counters = sum(name.endswith(COUNTER) for name in weights.state_dict)
    if counters:
        logger.info("%s: %d tensors %s are left out", source, counters, COUNTER)
    return variables


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _listed(names: Sequence[str], kind: str, describe: Callable[[str], str]) -> str:
    if not names:
        return ""
    lines = [describe(name) for name in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"and {len(names) - _LISTED} more")
    tensors = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {tensors} {kind}: " + "\n    ".join(lines)
