"""How a PyTorch project names its tensors, and renaming by it."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Naming", "rename"]

_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_OTHERS = {"weight": ("params", "kernel"), "bias": ("params", "bias")}


@dataclasses.dataclass(frozen=True)
class Naming:
    """Names of the modules of one family of networks in one project's files.

    Attributes:
        project: whose files are named so.
        marker: a tensor that all such files have, and those of the family's other namings lack.
        top: module outside of blocks -> its path in the network, with slashes.
        block: matches a module inside a block: groups of digits that say which block, then one of
            what follows. None if `top` has all modules.
        place: those digits, as ints -> (stage from 1, block of the stage from 0).
        inside: what follows -> the block's name for it.
        inside_first: the same for blocks of stage 1, where they are named otherwise.
        flattened: dense layers on flattened images -> channels of the image. PyTorch flattens
            channels first.
    """

    project: str
    marker: str
    top: Mapping[str, str]
    block: str | None = None
    place: Callable[..., tuple[int, int]] = lambda stage, block: (stage, block)
    inside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inside_first: Mapping[str, str] | None = None
    flattened: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def path(self, module: str) -> tuple[str, ...]:
        """Path in the network of a PyTorch module.

        Raises:
            KeyError: if there is no such module.
        """
        match = re.fullmatch(self.block, module) if self.block else None
        if match is None:
            return tuple(self.top[module].split("/"))
        *digits, rest = match.groups()
        stage, block = self.place(*map(int, digits))
        inside = self.inside
        if stage == 1 and self.inside_first is not None:
            inside = self.inside_first
        return f"stage{stage}_block{block}", inside[rest]


def rename(state_dict: dict[str, np.ndarray], naming: Naming) -> dict[str, Any]:
    """Renames and transposes every tensor; float32.

    Args:
        state_dict: kernels [out, in / groups, kh, kw], dense [out, in].
        naming: of the tensors.

    Returns:
        `params` and `batch_stats`: kernels [kh, kw, in / groups, out], dense [in, out].

    Raises:
        KeyError: with the name of a tensor that the naming does not know.
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, value in state_dict.items():
        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        try:
            path = naming.path(module)
            norm = path[-1].endswith("bn") or path[-1].startswith("bn")
            collection, leaf = (_BATCH_NORM if norm else _OTHERS)[kind]
        except KeyError:
            raise KeyError(name) from None
        if leaf == "kernel":
            value = _kernel(value, naming.flattened.get(path[-1]))
        node = variables[collection]
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(value, np.float32)
    return variables


def _kernel(value: np.ndarray, channels: int | None) -> np.ndarray:
    if channels is None:
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    out = len(value)
    if value.ndim == 2:
        size = round((value.shape[1] / channels) ** 0.5)
        if channels * size**2 != value.shape[1]:
            return value.T  # Of no square image: the check of shapes says so.
        value = value.reshape(out, channels, size, size)
    return value.transpose(2, 3, 1, 0).reshape(-1, out)
