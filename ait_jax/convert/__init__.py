"""Trained weights of other frameworks -> variables of `ait_jax.models`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ait_jax.convert.errors import WeightsError
from ait_jax.convert.naming import COUNTER, Naming, rename
from ait_jax.convert.namings import namings
from ait_jax.convert.prefixes import choose_prefix
from ait_jax.convert.tensor_sets import listed, several_sets, tell_choice
from ait_jax.convert.values import negative_variance
from ait_jax.quant.policy import leaf_name

__all__ = ["Weights", "WeightsError", "check_weights", "convert_state_dict"]

# Tensors of a kind that a message lists by name, unless asked for all.
_LISTED = 2

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file of weights holds; not yet checked against a network.

    Attributes:
        variables: `params` and `batch_stats`, nested dicts of numpy arrays.
        naming: whose names the file has; None: the network's own, and what follows is empty.
        names: the network's name of a tensor ("params/stem_conv/kernel") -> the file's.
        unknown: shapes of the tensors that have no place in `variables`, by the file's names.
        outside: the same of those that lack the prefix of the others, and may belong to another
            network, or to a loss.
        state_dict: the file's tensors as they are, by their names without `prefix`.
        prefix: what is in front of the names in the file, "model.".
    """

    variables: dict[str, Any]
    naming: Naming | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    outside: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    state_dict: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prefix: str = ""

    def described(self, name: str) -> str:
        """The file's name of a tensor, with the network's name behind it."""
        theirs = self.names.get(name, "")
        if not theirs and self.naming:
            theirs = " or ".join(self.prefix + each for each in self.naming.source_names(name))
        return f"{theirs} ({name})" if theirs else name


def convert_state_dict(
    state_dict: Mapping[str, np.ndarray],
    arch: str,
    *,
    source: str = "the state dict",
    place: Sequence[str] = (),
) -> Weights:
    """Flax variables from a PyTorch state dict; its tensors' names tell whose naming it has.

    A prefix of the names is taken off, whatever it is. Where tensors of several prefixes fit, those
    that do not look averaged over training are taken, and the log says so.

    Args:
        state_dict: arrays by name, in PyTorch's layouts.
        arch: name of the architecture, a key of `models.ARCHITECTURES`.
        source: where it comes from, for messages.
        place: the parts of the key under which it was there.

    Returns:
        Its tensors under the network's names, in its layouts, and those of unknown names.

    Raises:
        WeightsError: if tensors of several prefixes fit alike.
    """
    known = namings(arch)
    chosen = choose_prefix(state_dict, known)
    prefix, *more = (".".join(parts) for parts in chosen.prefixes)
    keys = [".".join((*place, *parts)) for parts in (chosen.prefixes[0], *chosen.alike)]
    if chosen.alike:
        raise several_sets(source, keys)
    others = [".".join((*place, *parts)) for parts in chosen.others]
    if others:
        tell_choice(source, keys[0] or "what has no prefix", others)
    elif prefix or more:
        logger.info(
            "%s: names are taken without %s in front",
            source,
            listed(list(filter(None, (prefix, *more)))),
        )
    stripped = {name: state_dict[theirs] for name, theirs in chosen.names.items()}
    marked = [naming for naming in known if naming.marker in stripped] or known
    renamed = [(naming, *rename(stripped, naming)) for naming in marked]
    naming, variables, names, unknown = min(renamed, key=lambda found: len(found[-1]))
    taken = set(chosen.names.values())
    return Weights(
        variables,
        naming,
        names={ours: chosen.names[theirs] for ours, theirs in names.items()},
        unknown={chosen.names[theirs]: shape for theirs, shape in unknown.items()},
        outside={name: np.shape(value) for name, value in state_dict.items() if name not in taken},
        state_dict=stripped,
        prefix=f"{prefix}." if prefix else "",
    )


def check_weights(
    weights: Weights, expected: Any, source: str, arch: str, *, list_all: bool = False
) -> dict[str, Any]:
    """Checks names, shapes and values of weights against the variables of a network.

    Args:
        weights: what a file holds.
        expected: the network's variables, nested dicts of arrays or `jax.ShapeDtypeStruct`s.
        source: the file, for messages.
        arch: the architecture, for messages.
        list_all: whether an error names every tensor that does not fit, not a few.

    Returns:
        `params` and `batch_stats`, float32 numpy arrays.

    Raises:
        WeightsError: names the tensors that are missing, unused or of another shape, with their
            shapes in the layouts of the network (kernels [kh, kw, in, out], dense [in, out]; in the
            file's where the name is unknown); or one that holds no floating-point numbers, NaN or
            infinite values, or variances below zero.
    """
    given = weights.variables if weights.naming else _unwrapped(weights.variables, expected)
    found, wanted = _shapes(given), _shapes(expected)
    missing = [name for name in wanted if name not in found]
    reshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    unused = {
        **weights.unknown,
        **{weights.described(name): found[name] for name in found if name not in wanted},
        **(weights.outside if missing else {}),
    }

    def lacks(name: str) -> str:
        return f"{weights.described(name)} of shape {wanted[name]}"

    def differs(name: str) -> str:
        return f"{weights.described(name)} is {found[name]}, expected {wanted[name]}"

    most = None if list_all else _LISTED
    kinds = [
        _listed(missing, "missing", lacks, most),
        _listed(list(unused), "unused", lambda name: f"{name} of shape {unused[name]}", most),
        _listed(reshaped, "of another shape", differs, most),
    ]
    if any(kinds):
        if weights.unknown:
            projects = "; ".join(naming.project for naming in namings(arch))
            kinds.append(f"names that are known for it: those of {projects}")
        if not list_all and max(len(missing), len(unused), len(reshaped)) > _LISTED:
            kinds.append("`python -m ait_jax.convert` lists all of them")
        problems = "\n  ".join(filter(None, kinds))
        raise WeightsError(f"{source}: does not fit teacher.arch = {arch!r}: {problems}")
    _check_dtypes(weights, given, source)
    with np.errstate(over="ignore"):  # What float32 cannot hold is infinite, and said to be.
        variables = jax.tree.map(lambda x: np.asarray(x, np.float32), given)
    for name, value in flax.traverse_util.flatten_dict(variables, sep="/").items():
        problem = negative_variance(name, value)
        if not np.isfinite(value).all():
            problem = "holds NaN or infinite values"
        if problem:
            raise WeightsError(f"{source}: tensor {weights.described(name)} {problem}")
    if weights.outside:
        logger.info(
            "%s: tensors that do not belong to the network are left out: %s",
            source,
            listed(list(weights.outside)),
        )
    counters = sum(name.endswith(COUNTER) for name in weights.state_dict)
    if counters:
        logger.info("%s: %d tensors %s are left out", source, counters, COUNTER)
    return variables


def _unwrapped(variables: Any, expected: Any) -> Any:
    """Variables of a network within other modules, `params/backbone/...`, without these."""
    while True:
        params = variables.get("params")
        if not isinstance(params, Mapping) or len(params) != 1:
            return variables
        (wrapper,) = params
        inside = {
            name: tree.get(wrapper) for name, tree in variables.items() if hasattr(tree, "get")
        }
        if wrapper in expected["params"] or not all(
            isinstance(tree, Mapping) for tree in inside.values()
        ):
            return variables
        variables = inside


def _check_dtypes(weights: Weights, variables: Any, source: str) -> None:
    for name, value in flax.traverse_util.flatten_dict(variables, sep="/").items():
        if not jnp.issubdtype(value.dtype, np.floating):
            raise WeightsError(
                f"{source}: tensor {weights.described(name)} is of {value.dtype}, and weights must "
                "be floating point: take those from before they were quantized, or dequantize them"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_name(path): np.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _listed(
    names: Sequence[str], kind: str, describe: Callable[[str], str], most: int | None
) -> str:
    if not names:
        return ""
    lines = [describe(name) for name in names[:most]]
    if len(names) > len(lines):
        lines.append(f"and {len(names) - len(lines)} more")
    tensors = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {tensors} {kind}: " + "\n    ".join(lines)
