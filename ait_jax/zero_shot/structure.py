"""The structure of a pytree as JSON: dicts, lists, tuples and the like, with a name for each leaf.

A leaf is its name. A container is an object of one key, its kind: `{"dict": [[key, node], ...]}`
(`OrderedDict`, `FrozenDict`), `{"list": [node, ...]}` (`tuple`), `{"none": []}`. Any other class
cannot be written down: `{"class": NAME}` stands in its place.
"""

import collections
from collections.abc import Mapping
from typing import Any

import flax.core
import jax

from ait_jax.errors import UserError
from ait_jax.zero_shot.networks import variable_name

__all__ = ["describe", "rebuild"]

_MAPPINGS: dict[str, Any] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "FrozenDict": flax.core.FrozenDict,
}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple}


def describe(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    """The structure of a pytree, its leaves being `networks.variable_name`s.

    Args:
        tree: any pytree.
        path: of `tree` in the whole, for names.
    """
    if tree is None:
        return {"none": []}
    for kind, container in _MAPPINGS.items():
        if type(tree) is container and all(type(key) in (str, int) for key in tree):
            keys = jax.tree_util.DictKey
            return {kind: [[k, describe(v, (*path, keys(k)))] for k, v in tree.items()]}
    for kind, container in _SEQUENCES.items():
        if type(tree) is container:
            keys = jax.tree_util.SequenceKey
            return {kind: [describe(v, (*path, keys(i))) for i, v in enumerate(tree)]}
    if jax.tree_util.all_leaves([tree]):
        return variable_name(path)
    return {"class": type(tree).__qualname__}


def rebuild(node: Any, leaves: Mapping[str, Any]) -> Any:
    """The pytree of a structure.

    Args:
        node: of `describe`.
        leaves: by name.

    Raises:
        UserError: if a class stands in it that cannot be written down; or it is no structure, or
            has leaves that are not there.
    """
    if isinstance(node, str) and node in leaves:
        return leaves[node]
    if not isinstance(node, dict) or len(node) != 1:
        raise UserError(f"{str(node)[:80]} is no part of a structure")
    ((kind, inside),) = node.items()
    if kind == "class":
        raise UserError(
            f"the variables hold a {inside}, a class that a file cannot hold: pass variables of "
            "the same structure, such as those that were quantized"
        )
    if kind == "none":
        return None
    if kind in _SEQUENCES and isinstance(inside, list):
        return _SEQUENCES[kind](rebuild(child, leaves) for child in inside)
    if kind in _MAPPINGS and isinstance(inside, list):
        pairs = [pair for pair in inside if isinstance(pair, list) and len(pair) == 2]
        if len(pairs) == len(inside) and all(type(key) in (str, int) for key, _ in pairs):
            return _MAPPINGS[kind]({key: rebuild(child, leaves) for key, child in pairs})
    raise UserError(f"{str(node)[:80]} is no part of a structure")
