"""Folders of checkpoints that Orbax saved: the variables in them, and nothing else, as numpy."""

import functools
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ait_jax.convert.errors import WeightsError
from ait_jax.convert.flax_sets import choose_variables

__all__ = ["read_orbax_folder"]

_STEP = re.compile(r"(?:.*_)?(\d+)")  # "800", "checkpoint_00800"; not those that are being written


def read_orbax_folder(folder: Path, *, key: str = "") -> dict[str, Any]:
    """Reads `params` and `batch_stats` of a tree that Orbax saved; the rest of it is not read.

    Args:
        folder: a tree (of a `StandardCheckpointer` or `PyTreeCheckpointer`), a step or an item of a
            `CheckpointManager`, or its folder of steps, whose latest counts. In the tree, both lie
            at the top or one level down (`{"state": {"params": ..., "batch_stats": ...}}`).
        key: a path in the tree, of what holds both or of parameters ("ema_params"), as for
            `choose_variables`; of several items of a step, their names come first. "": see above.

    Returns:
        Both, nested dicts of numpy arrays; not yet checked against a model.

    Raises:
        WeightsError: if there is no such tree, it lacks one of them or, without a key, has them in
            several places; or it cannot be read.
    """
    trees = _trees(folder)
    metadata = {tree: _metadata(tree) for tree in trees}
    # Where a step has several items, paths start with their names.
    tops = {(tree.name,) if len(trees) > 1 else (): tree for tree in trees}
    leaves = [path for top, tree in tops.items() for path in _leaves(metadata[tree], top)]
    source = f"teacher.weights: {folder}"
    chosen = choose_variables(leaves, key=key, source=source, tops=list(tops))
    if chosen is None:
        entries = [tree for tree in metadata.values() if isinstance(tree, Mapping)]
        found = [f"{name!r}" for tree in entries for name in tree]
        raise WeightsError(
            f"teacher.weights: {', '.join(map(str, trees))} has {', '.join(found) or 'nothing'} at "
            "its top, and 'params' and 'batch_stats' are needed there or one level down; or say "
            "with teacher.weights_key where they are"
        )
    read = {}
    for name, path in zip(chosen._fields, chosen):
        top = next(top for top in tops if path[: len(top)] == top)
        read[name] = _read(tops[top], metadata[tops[top]], path[len(top) :])
    return read


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not isinstance(tree, Mapping):
        yield path
        return
    for name, value in tree.items():
        if isinstance(name, str):
            yield from _leaves(value, (*path, name))


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


def _read(tree: Path, metadata: Any, path: tuple[str, ...]) -> Any:
    item: Any = functools.reduce(operator.getitem, path, metadata)
    for name in reversed(path):
        item = {name: item}
    # Arrays of numpy: the devices that saved them need not be here.
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        restored = ocp.PyTreeCheckpointer().restore(
            tree.absolute(),
            args=ocp.args.PyTreeRestore(item, restore_args=wanted, partial_restore=True),
        )
    except Exception as error:
        raise _unreadable(tree, error) from error
    return functools.reduce(operator.getitem, path, restored)


def _unreadable(tree: Path, error: Exception) -> WeightsError:
    # Orbax, tensorstore and JSON raise a dozen types for damaged files.
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    return WeightsError(
        f"teacher.weights: {tree} cannot be read, it is damaged or not of Orbax "
        f"({type(error).__name__}: {reason})"
    )
