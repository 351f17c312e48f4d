"""Which of the sets of tensors in a file of PyTorch's names is read: by its key, or by default.

A set lies in nested dicts (`{"state_dict": {...}, "state_dict_ema": {...}}`), or behind a prefix
that its names share ("model.", "ema_model."). A key names either alike, its parts joined by dots or
slashes: "state_dict_ema", "state_dict.ema_model".
"""

import collections
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ait_jax.convert.errors import WeightsError, WeightsKeyError
from ait_jax.convert.naming import COUNTER, Naming

__all__ = [
    "NamedSet",
    "TensorSet",
    "choose_prefix",
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


class NamedSet(NamedTuple):
    """Tensors behind one prefix, or several that hold different ones, under a network's names.

    Attributes:
        prefixes: the parts of what is in front of the names; the first is that of most of them.
        names: name without its prefix -> the name as it is.
        others: prefixes of sets that might have been meant as well.
        alike: those of them to which the first of `prefixes` cannot be preferred.
    """

    prefixes: tuple[tuple[str, ...], ...]
    names: dict[str, str]
    others: tuple[tuple[str, ...], ...]
    alike: tuple[tuple[str, ...], ...]


def key_parts(key: str) -> tuple[str, ...]:
    """The parts of a key, or of a tensor's name, without the wrappers of PyTorch."""
    return tuple(part for part in re.split(r"[./]", key) if part and part not in _WRAPPERS)


def is_averaged(path: Iterable[str]) -> bool:
    """Whether a path looks like that of weights averaged over training."""
    return any(_AVERAGED.fullmatch(part) for part in path)


def is_of_an_optimizer(path: Iterable[str]) -> bool:
    """Whether a path looks like that of an optimizer's state."""
    return any(_OPTIMIZER.fullmatch(part) for part in path)


def listed(keys: Sequence[str]) -> str:
    """Keys in quotes, the first ten of them."""
    more = [f"and {len(keys) - _MOST_LISTED} more"] if len(keys) > _MOST_LISTED else []
    return ", ".join([*map(repr, keys[:_MOST_LISTED]), *more]) or "none"


def tell_choice(source: str, read: str, others: Sequence[str]) -> None:
    """Logs what was read of a file that holds several sets of weights, and how to choose."""
    logger.warning(
        "%s holds several sets of weights: %r is read, and there is %s; to read that instead: "
        "--config.teacher.weights_key=%s (--weights_key of ait_jax.convert)",
        source,
        read,
        listed(others),
        others[0],
    )


def unknown_key(source: str, key: str, keys: Sequence[str]) -> WeightsKeyError:
    """The error of a key that leads to no tensors, or to several places."""
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


# Prefixes ----------------------------------------------------------------------------------------


def choose_prefix(names: Iterable[str], known: Sequence[Naming]) -> NamedSet:
    """Which names, without a prefix that they share, are those of a network.

    The prefix is not looked up but found: the one behind which most names are known.

    Args:
        names: of tensors.
        known: namings of the network.

    Returns:
        The names of one set, without its prefix; all of them, where none is known.
    """
    parts = {name: key_parts(name) for name in names}
    places = _places(parts, known)
    best, alike = _best(places)
    held = places.get(best, {})
    most = len(held)
    apart = {
        prefix: found
        for prefix, found in places.items()
        if prefix != best and not set(found.values()) & set(held.values())
    }
    merged = _lacking(held, {p: found for p, found in apart.items() if 2 * len(found) < most})
    chosen: dict[str, str] = {}
    for name, path in parts.items():
        if path[: len(best)] == best or name in merged:
            rest = ".".join(path[len(merged.get(name, best)) :])
            # A second tensor of one name stays as it is, and is told of as unknown.
            chosen[name if rest in chosen else rest] = name
    return NamedSet(
        (best, *sorted(set(merged.values()))),
        chosen,
        tuple(p for p, found in apart.items() if p and 2 * len(found) >= most),
        tuple(p for p in alike if p in apart),
    )


def _places(
    parts: Mapping[str, tuple[str, ...]], known: Sequence[Naming]
) -> dict[tuple[str, ...], dict[str, str]]:
    """By prefix: names in the network -> names in the file, of the naming that knows most there."""
    under = collections.Counter(
        path[:end] for path in parts.values() if path[-1:] != (COUNTER,) for end in range(len(path))
    )
    places: dict[tuple[str, ...], dict[str, str]] = {}
    for naming in known:
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for name, path in parts.items():
            for start in range(len(path) - 1):
                target = naming.target(".".join(path[start:]))
                if target is not None:
                    found.setdefault(path[:start], {}).setdefault(target, name)
        for prefix, names in found.items():
            # Blocks have convs named as the stem's; but those are few of a block's tensors.
            network = not prefix or 2 * len(names) >= under[prefix]
            if network and len(names) > len(places.get(prefix, ())):
                places[prefix] = names
    return places


def _best(
    places: Mapping[tuple[str, ...], Mapping[str, str]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The prefix of most names, averages over training left aside; and others that are as good."""
    most = max(map(len, places.values()), default=0)
    whole = [prefix for prefix, found in places.items() if 2 * len(found) >= most]
    whole = [prefix for prefix in whole if not is_averaged(prefix)] or whole
    most = max((len(places[prefix]) for prefix in whole), default=0)
    whole = [prefix for prefix in whole if len(places[prefix]) == most]
    # Names without a prefix are the network's, and of two prefixes one of which holds the other.
    best = min(whole, key=len, default=())
    return best, [prefix for prefix in whole if best and prefix != best]


def _lacking(
    held: Mapping[str, str], apart: Mapping[tuple[str, ...], Mapping[str, str]]
) -> dict[str, tuple[str, ...]]:
    """Names of tensors that a set lacks and one other prefix alone has, with that prefix.

    So are those of a trunk and a classifier that are modules of their own (`encoder.conv1.weight`,
    `fc.weight`).
    """
    offers: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for prefix, found in apart.items():
        if not found.keys() & held.keys():
            for target, name in found.items():
                offers.setdefault(target, []).append((name, prefix))
    return {name: prefix for (name, prefix), *more in offers.values() if not more}
