"""Trained weights of other frameworks -> variables of `ait_jax.models`."""

from typing import Any

import jax
import numpy as np

from ait_jax.convert.naming import rename
from ait_jax.convert.namings import namings
from ait_jax.errors import UserError
from ait_jax.quant.policy import leaf_name

__all__ = ["WeightsError", "check_variables", "convert_state_dict"]


class WeightsError(UserError):
    """Weights that do not fit; the message names the file, the tensor, and what was expected."""


def convert_state_dict(state_dict: dict[str, np.ndarray], arch: str, source: str) -> dict[str, Any]:
    """Flax variables from a PyTorch state dict; its tensors' names tell whose naming it has.

    Args:
        state_dict: arrays by name, in PyTorch's layouts.
        arch: name of the architecture, a key of `models.ARCHITECTURES`.
        source: the file, for messages.

    Returns:
        `params` and `batch_stats`, nested dicts of numpy arrays; not yet checked against a model.

    Raises:
        WeightsError: if a tensor's name is not known for this architecture.
    """
    known = namings(arch)
    naming = next((naming for naming in known if naming.marker in state_dict), known[0])
    try:
        return rename(state_dict, naming)
    except KeyError as error:
        raise WeightsError(
            f"{source}: tensor {error.args[0]!r} is not known for teacher.arch = {arch!r}; the "
            f"file starts with {', '.join(list(state_dict)[:3])}"
        ) from None


def check_variables(variables: Any, expected: Any, source: str, arch: str) -> None:
    """Checks names and shapes of variables against those of a model.

    Args:
        variables: nested dicts of arrays.
        expected: the same of arrays or `jax.ShapeDtypeStruct`s.
        source: the file, for messages.
        arch: the architecture, for messages.

    Raises:
        WeightsError: names the first tensor that is missing, too many, or of another shape, and
            both shapes.
    """
    found = {leaf_name(p): np.shape(x) for p, x in jax.tree.leaves_with_path(variables)}
    wanted = {leaf_name(p): np.shape(x) for p, x in jax.tree.leaves_with_path(expected)}
    for name, shape in wanted.items():
        if name not in found:
            raise WeightsError(
                f"{source}: does not fit teacher.arch = {arch!r}: tensor {name!r} of shape {shape} "
                "is missing"
            )
        if found[name] != shape:
            raise WeightsError(
                f"{source}: does not fit teacher.arch = {arch!r}: tensor {name!r} has shape "
                f"{found[name]}, expected {shape}"
            )
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise WeightsError(
            f"{source}: does not fit teacher.arch = {arch!r}: it has no tensor {extra[0]!r} (shape "
            f"{found[extra[0]]}); {len(extra)} such tensors"
        )
