"""Where the variables of a network lie in a tree of Flax: by a key, or by default.

Keys are paths in the tree, joined by slashes or dots: "ema_params", "state/ema".
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ait_jax.convert.errors import WeightsError
from ait_jax.convert.tensor_sets import (
    is_of_an_optimizer,
    key_parts,
    listed,
    tell_choice,
    unknown_key,
)

__all__ = ["Variables", "choose_variables"]

_PARAMS, _STATS = "params", "batch_stats"

Path = tuple[str, ...]


class Variables(NamedTuple):
    """Where both collections of a network lie.

    Attributes:
        params: path of the parameters.
        batch_stats: path of the running statistics.
    """

    params: Path
    batch_stats: Path


class _Tree:
    """The inner nodes of a tree, with the paths of the leaves below each."""

    def __init__(self, leaves: Iterable[Path]) -> None:
        self.below: dict[Path, dict[Path, None]] = {}
        for leaf in leaves:
            for end in range(len(leaf)):
                self.below.setdefault(leaf[:end], {})[leaf[end:]] = None

    def holds_both(self, node: Path) -> bool:
        return (*node, _PARAMS) in self.below and (*node, _STATS) in self.below

    def children(self, node: Path) -> list[Path]:
        inside = dict.fromkeys(rest[0] for rest in self.below.get(node, ()))
        return [(*node, name) for name in inside if (*node, name) in self.below]

    def places(self, top: Path) -> list[Path]:
        """Nodes that hold both collections: the top of a tree, or else all that are right below."""
        return [
            node
            for node in ([top] if self.holds_both(top) else self.children(top))
            if self.holds_both(node)
        ]

    def sets(self, places: Sequence[Path]) -> list[Path]:
        """All nodes that could be chosen: both collections, or parameters named as those of one."""
        alike = [set(self.below[(*place, _PARAMS)]) for place in places]
        found = []
        for node, leaves in self.below.items():
            inner = node[-1:] == (_PARAMS,)  # Said by what holds them, where that has both.
            if self.holds_both(node) or (
                set(leaves) in alike and not (inner and self.holds_both(node[:-1]))
            ):
                found.append(node)
        return [node for node in found if node and not is_of_an_optimizer(node)]

    def stats_of(self, params: Path, places: Sequence[Path]) -> Path | None:
        """The running statistics that go with parameters: next to them, or farther out."""
        last = params[-1]
        names = [last.replace(_PARAMS, _STATS)] if _PARAMS in last else []
        names += [f"{last}_{_STATS}", f"{_STATS}_{last}", _STATS]
        outwards = [params[:end] for end in range(len(params) - 1, -1, -1)]
        around = [(*node, name) for node in outwards for name in names if name != last]
        around += [(*place, _STATS) for place in places[:1] if len(places) == 1]
        return next((node for node in around if node in self.below), None)


def choose_variables(
    leaves: Iterable[Path], *, key: str, source: str, tops: Sequence[Path] = ((),)
) -> Variables | None:
    """The variables in a tree that are meant; says so where others are there as well.

    Args:
        leaves: paths of the arrays.
        key: path of a node with both collections, or of parameters, the running statistics being
            those that lie next to them or nearest above; of either path, the end is enough where
            it is the only one. "": both collections at the top, or else one level down.
        source: the file or folder, for messages.
        tops: paths of trees that count as one each.

    Returns:
        Where they lie; None if no key was given and they are nowhere.

    Raises:
        WeightsError: if there is nothing of this key, or without one there are several places.
    """
    tree = _Tree(leaves)
    places = [place for top in tops for place in tree.places(top)]
    sets = tree.sets(places)
    if key_parts(key):
        return _of_key(tree, key, source, places, sets)
    if not places:
        return None
    if len(places) > 1:
        names = ["/".join(place) for place in places]
        raise WeightsError(
            f"{source} has 'params' and 'batch_stats' in several places, {listed(names)}: choose "
            f"one, such as --config.teacher.weights_key={names[0]} (--weights_key of "
            "ait_jax.convert), or save those of the teacher in a folder of their own"
        )
    (place,) = places
    others = ["/".join(node) for node in sets if node != place]
    if others:
        tell_choice(source, "/".join(place or (_PARAMS,)), others)
    return Variables((*place, _PARAMS), (*place, _STATS))


def _of_key(
    tree: _Tree, key: str, source: str, places: Sequence[Path], sets: Sequence[Path]
) -> Variables:
    wanted = key_parts(key)
    by_parts = {key_parts("/".join(node)): node for node in tree.below if node}
    node = by_parts.get(wanted)
    if node is None:
        ends = [node for parts, node in by_parts.items() if parts[-len(wanted) :] == wanted]
        ends = [node for node in ends if node in sets or (*node, _PARAMS) in tree.below]
        node = ends[0] if len(ends) == 1 else None
    if node is not None:
        if len(tree.places(node)) == 1:
            (node,) = tree.places(node)
        if (*node, _PARAMS) in tree.below:
            node = (*node, _PARAMS)
        stats = tree.stats_of(node, places)
        if stats is not None and stats != node:
            return Variables(node, stats)
    names = ["/".join(each) for each in sets] or ["/".join(each) for each in tree.children(())]
    raise unknown_key(source, key, names)
