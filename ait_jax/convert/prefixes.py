"""The prefix of the names of a PyTorch state dict: found, whatever it is, and taken off."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ait_jax.convert.naming import COUNTER, Naming
from ait_jax.convert.tensor_sets import is_averaged, key_parts

__all__ = ["NamedSet", "choose_prefix"]

_FEWEST = 32  # tensors of a network


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
    places, networks = _places(parts, known)
    best, alike = _best({prefix: places[prefix] for prefix in networks})
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
        tuple(p for p in networks if p and p in apart and 2 * len(apart[p]) >= most),
        tuple(p for p in alike if p in apart),
    )


def _places(
    parts: Mapping[str, tuple[str, ...]], known: Sequence[Naming]
) -> tuple[dict[tuple[str, ...], dict[str, str]], list[tuple[str, ...]]]:
    """By prefix: names in the network -> names in the file, of the naming that knows most there.

    And those prefixes behind which there may be a whole network: blocks have tensors named as those
    of the stem, and make none.
    """
    under = collections.Counter(
        path[:end] for path in parts.values() if path[-1:] != (COUNTER,) for end in range(len(path))
    )
    paths = set(parts.values())
    places: dict[tuple[str, ...], dict[str, str]] = {}
    networks: dict[tuple[str, ...], None] = {}
    for naming in known:
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for name, path in parts.items():
            for start in range(len(path) - 1):
                target = naming.target(".".join(path[start:]))
                if target is not None:
                    found.setdefault(path[:start], {}).setdefault(target, name)
        for prefix, names in found.items():
            if prefix and 2 * len(names) < under[prefix]:
                continue
            if len(names) > len(places.get(prefix, ())):
                places[prefix] = names
            marked = (*prefix, *key_parts(naming.marker)) in paths
            if marked or not prefix or 2 * len(names) >= max(under[()], _FEWEST):
                networks[prefix] = None
    return places, list(networks)


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
