"""Which of the sets of tensors in a file of PyTorch's names is read: by its key, or by default.

A set lies in nested dicts (`{"state_dict": {...}, "state_dict_ema": {...}}`), or behind a prefix
that its names share ("model.", "ema_model."). A key names either alike, its parts joined by dots or
slashes: "state_dict_ema", "state_dict.ema_model".
"""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ait_jax.convert.errors import WeightsError, WeightsKeyError

__all__ = [
    "TensorSet",
    "choose_set",
    "dicts_in",
    "is_averaged",
    "is_of_an_optimizer",
    "key_parts",
    "listed",
    "sets_in",
    "several_sets",
    "tell_choice",
    "unknown_key",
    "unwrapped",
]

# Dicts that hold the weights of a checkpoint by convention; the first that there is counts.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
_STATE_DEPTH = 3

# What torch.compile, FSDP and checkpointing put into the names of whatever they wrap.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_MOST_LISTED = 10
_MOST_MEANT = 3
_MOST_VISITED = 10_000

logger = logging.getLogger(__name__)


def _words(*words: str) -> re.Pattern:
    return re.compile(rf"(?:.*[^a-z])?(?:{'|'.join(words)})(?:[^a-z].*)?", re.IGNORECASE)


_AVERAGED = _words("ema", "swa", "avg", "average", "averaged", "shadow", "polyak")
_OPTIMIZER = _words("opt", "optim", "optimi[sz]ers?", "mu", "nu", "trace", "exp_avg\\w*", "scaler")


class TensorSet(NamedTuple):
    """Tensors of one dict of a file.

    Attributes:
        path: the parts of the key that leads there.
        tensors: by name.
    """

    path: tuple[str, ...]
    tensors: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """How many tensors it has; counters and the like are none."""
        return sum(np.ndim(value) > 0 for value in self.tensors.values())


def key_parts(key: str) -> tuple[str, ...]:
    """The parts of a key, or of a tensor's name, without the wrappers of PyTorch."""
    return tuple(part for part in re.split(r"[./]", key) if part and part not in _WRAPPERS)


def is_averaged(path: Iterable[str]) -> bool:
    """Whether a path looks like that of weights averaged over training."""
    words = (re.sub("(?<=[a-z])(?=[A-Z])", "_", part) for part in path)  # modelEma
    return any(map(_AVERAGED.fullmatch, words))


def is_of_an_optimizer(path: Iterable[str]) -> bool:
    """Whether a path looks like that of an optimizer's state."""
    return any(_OPTIMIZER.fullmatch(part) for part in path)


def listed(keys: Sequence[str]) -> str:
    """Keys in quotes, the first ten of them."""
    more = [f"and {len(keys) - _MOST_LISTED} more"] if len(keys) > _MOST_LISTED else []
    return ", ".join([*map(repr, keys[:_MOST_LISTED]), *more]) or "none"


def tell_choice(source: str, read: str, others: Sequence[str]) -> None:
    """Logs what was read of a file that holds several sets of weights, and how to choose.

    Args:
        source: the file.
        read: the key of the set that was read.
        others: the keys of the others.
    """
    logger.warning(
        "%s holds several sets of weights: %r is read, and there is also %s; to choose: "
        "--config.teacher.weights_key=%s (--weights_key of ait_jax.convert)",
        source,
        read,
        listed(others),
        others[0],
    )


def unknown_key(source: str, key: str, keys: Sequence[str]) -> WeightsKeyError:
    """The error of a key that leads to no tensors, or to several places.

    Args:
        source: the file.
        key: that was given.
        keys: that there are.
    """
    return WeightsKeyError(
        f"teacher.weights_key = {key!r} is not allowed: {source} has no set of weights of that "
        f"key; there are {listed(keys)}"
    )


# Dicts -------------------------------------------------------------------------------------------


def choose_set(tree: Any, *, key: str, source: str) -> TensorSet | None:
    """The set of tensors in nested dicts that is meant; says so where others are there as well.

    Args:
        tree: nested dicts with arrays in them, and anything else, which is left out.
        key: of the set, see the module; "": by convention the one under "state_dict",
            "model_state_dict", "model", "net" or "weights", in this order, then the one at the top,
            then the only one, averages over training left aside.
        source: the file, for messages.

    Returns:
        The set; None if no key was given and there are no tensors.

    Raises:
        WeightsError: if there is no set of this key, or without one there are several and none is
            there by convention.
    """
    sets = sets_in(tree)
    top: tuple[str, ...] = ()
    if key_parts(key):
        top = _find(sets, key, source)
        sets = _under(sets, top)
    if not sets:
        return None
    ranks = {_rank(found.path[len(top) :]): found for found in sets}
    usual = [rank for rank in ranks if rank]
    chosen = ranks[min(usual)] if usual else _only(sets, top, source)
    others = [
        ".".join(found.path)
        for found in _comparable(sets, chosen.size)
        if found.path and not _same(found, chosen)
    ]
    if others:
        tell_choice(source, ".".join(chosen.path) or "what is at the top", others)
    return chosen


def dicts_in(tree: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All dicts of nested ones, with the parts of the keys that lead there; outer ones first."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    # A damaged or hostile file may refer to a dict within itself, or many times to one.
    for path, node in itertools.islice(waiting, _MOST_VISITED):  # It grows meanwhile.
        if isinstance(node, Mapping):
            yield path, node
            inside = [item for item in node.items() if isinstance(item[0], str)]
            dicts = [(name, value) for name, value in inside if isinstance(value, Mapping)]
            waiting += [((*path, *key_parts(name)), value) for name, value in dicts]


def sets_in(tree: Any) -> list[TensorSet]:
    """All dicts of nested ones that have tensors in them, outer ones first."""
    sets = []
    for path, node in dicts_in(tree):
        entries = [(name, value) for name, value in node.items() if isinstance(name, str)]
        tensors = {name: value for name, value in entries if isinstance(value, np.ndarray)}
        if tensors:
            sets.append(TensorSet(path, tensors))
    return sets


def _same(a: TensorSet, b: TensorSet) -> bool:
    """Whether two keys of a file lead to the same tensors."""
    return a.tensors.keys() == b.tensors.keys() and all(
        value is b.tensors[name] for name, value in a.tensors.items()
    )


def _rank(path: tuple[str, ...]) -> tuple[int, ...]:
    """Where a dict comes in the order of convention; empty if it is not there by convention."""
    if not path or len(path) > _STATE_DEPTH or not set(path) <= set(_STATE_KEYS):
        return ()
    return (*map(_STATE_KEYS.index, path), len(_STATE_KEYS))  # A dict comes behind those in it.


def _comparable(sets: Sequence[TensorSet], size: int) -> list[TensorSet]:
    """Those that may be as whole as a set of this size."""
    trained = [found for found in sets if not is_of_an_optimizer(found.path)]
    return [found for found in trained or sets if 2 * found.size >= size and found.size]


def _only(sets: Sequence[TensorSet], top: tuple[str, ...], source: str) -> TensorSet:
    trained = [found for found in sets if not is_of_an_optimizer(found.path)] or sets
    whole = _comparable(trained, max(found.size for found in trained)) or trained
    raw = [found for found in whole if not is_averaged(found.path[len(top) :])] or whole
    first = next((found for found in raw if found.path == top), raw[0])
    if first.path != top and len(raw) > 1:
        raise several_sets(source, [".".join(found.path) for found in raw])
    return first


def several_sets(source: str, keys: Sequence[str]) -> WeightsError:
    """The error of a file in which no set of weights can be preferred to the others."""
    return WeightsError(
        f"{source} holds several sets of weights, {listed(keys)}: choose one, such as "
        f"--config.teacher.weights_key={keys[0]} (--weights_key of ait_jax.convert)"
    )


def _find(sets: Sequence[TensorSet], key: str, source: str) -> tuple[str, ...]:
    """Where a key leads: from the top on, or else from wherever on it leads to one place alone."""
    wanted = key_parts(key)
    n = len(wanted)
    places = {
        path[: start + n]
        for found in sets
        for name in found.tensors
        for path in [(*found.path, *key_parts(name))]
        for start in range(len(path) - n)
        if path[start : start + n] == wanted
    }
    if wanted in places:
        return wanted
    if len(places) != 1:
        meant = [".".join(place) for place in sorted(places)]
        raise unknown_key(source, key, [*_keys_in(sets), *meant[:_MOST_MEANT]])
    return places.pop()


def _under(sets: Sequence[TensorSet], top: tuple[str, ...]) -> list[TensorSet]:
    """What lies under a path; one that ends within names is taken off these."""
    under = []
    for path, tensors in sets:
        inside = top[len(path) :]
        if (*path[: len(top)], *inside) != top:
            continue
        rest: dict[str, np.ndarray] = {}
        for name, value in tensors.items():
            parts = key_parts(name)
            if parts[: len(inside)] == inside:
                short = ".".join(parts[len(inside) :]) if inside else name
                rest[name if short in rest or not short else short] = value
        if rest:
            under.append(TensorSet((*path, *inside), rest))
    return under


def _keys_in(sets: Sequence[TensorSet]) -> list[str]:
    """Keys of dicts, and of prefixes where the names of one have few."""
    keys = []
    for path, tensors in sets:
        parts = [key_parts(name) for name in tensors]
        first = dict.fromkeys(part[0] for part in parts if len(part) > 1)
        prefixes = (
            first if len(first) <= _MOST_MEANT or not any(found.path for found in sets) else ()
        )
        keys += [".".join(path), *(".".join((*path, prefix)) for prefix in prefixes)]
    return list(filter(None, keys))


def unwrapped(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors, their names without what DataParallel and the other wrappers added."""
    names = {name: key_parts(name) for name in tensors}
    while names and all(len(path) > 1 and path[0] == "module" for path in names.values()):
        names = {name: path[1:] for name, path in names.items()}
    short = {name: ".".join(path) for name, path in names.items()}
    if len(set(short.values())) < len(short):
        return dict(tensors)
    return {short[name]: value for name, value in tensors.items()}
