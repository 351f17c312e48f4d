"""Folders of checkpoints that Orbax saved: the variables in them, and nothing else, as numpy."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ait_jax.convert import WeightsError

__all__ = ["read_orbax_folder"]

_NEEDED = ("params", "batch_stats")
_STEP = re.compile(r"(?:.*_)?(\d+)")  # "800", "checkpoint_00800"; not those that are being written


class _Place(NamedTuple):
    """Where variables lie: under a key of a tree (None: at its top), whose metadata this is."""

    folder: Path
    key: str | None
    metadata: Mapping[str, Any]

    def __str__(self):
        return str(self.folder) if self.key is None else f"{self.key!r} in {self.folder}"


def read_orbax_folder(folder: Path) -> dict[str, Any]:
    """Reads `params` and `batch_stats` of a tree that Orbax saved; the rest of it is not read.

    Args:
        folder: a tree (of a `StandardCheckpointer` or `PyTreeCheckpointer`), a step or an item of a
            `CheckpointManager`, or its folder of steps, whose latest counts. In the tree, both lie
            at the top or one level down (`{"state": {"params": ..., "batch_stats": ...}}`).

    Returns:
        Both, nested dicts of numpy arrays; not yet checked against a model.

    Raises:
        WeightsError: if there is no such tree, it lacks one of them or has them in several places,
            or it cannot be read.
    """
    trees = _trees(folder)
    found: list[str] = []
    places: list[_Place] = []
    for tree in trees:
        metadata = _metadata(tree)
        entries = metadata if isinstance(metadata, Mapping) else {}
        found += [f"{key!r}" for key in entries]
        candidates = {None: entries} if set(_NEEDED) <= set(entries) else entries
        places += [
            _Place(tree, key, inside)
            for key, inside in candidates.items()
            if isinstance(inside, Mapping) and set(_NEEDED) <= set(inside)
        ]
    if not places:
        raise WeightsError(
            f"teacher.weights: {', '.join(map(str, trees))} has {', '.join(found) or 'nothing'} at "
            f"its top, and 'params' and 'batch_stats' are needed there or one level down"
        )
    if len(places) > 1:
        raise WeightsError(
            f"teacher.weights: {folder} has 'params' and 'batch_stats' in several places: "
            f"{', '.join(map(str, places))}; save those of the teacher in a folder of their own"
        )
    return _read(places[0])


def _is_tree(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


def _trees(folder: Path) -> list[Path]:
    """Folders of the trees of one step."""
    if _is_tree(folder):
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    trees = {path: [path] if _is_tree(path) else _subtrees(path) for path in inside}
    steps = {
        int(match[1]): path
        for path in inside
        if trees[path] and (match := _STEP.fullmatch(path.name))
    }
    found = trees[steps[max(steps)]] if steps else _subtrees(folder)
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise WeightsError(
            f"teacher.weights = '{folder}' is not allowed: that folder holds {names}, and it must "
            "be a checkpoint that Orbax saved, or hold those of several steps"
        )
    return found


def _subtrees(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_tree(path))


def _metadata(tree: Path) -> Any:
    try:
        metadata = ocp.PyTreeCheckpointer().metadata(tree.absolute()).item_metadata
        if metadata is None:  # Orbax has logged why.
            raise ValueError("its _METADATA, or an array that it names, cannot be read")
        return metadata.tree
    except Exception as error:
        raise _unreadable(tree, error) from error


def _read(place: _Place) -> dict[str, Any]:
    item: Any = {name: place.metadata[name] for name in _NEEDED}
    if place.key is not None:
        item = {place.key: item}
    # Arrays of numpy: the devices that saved them need not be here.
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        restored = ocp.PyTreeCheckpointer().restore(
            place.folder.absolute(),
            args=ocp.args.PyTreeRestore(item, restore_args=wanted, partial_restore=True),
        )
    except Exception as error:
        raise _unreadable(place.folder, error) from error
    return restored if place.key is None else restored[place.key]


def _unreadable(tree: Path, error: Exception) -> WeightsError:
    # Orbax, tensorstore and JSON raise a dozen types for damaged files.
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    return WeightsError(
        f"teacher.weights: {tree} cannot be read, it is damaged or not of Orbax "
        f"({type(error).__name__}: {reason})"
    )
