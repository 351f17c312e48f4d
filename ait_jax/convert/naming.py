"""How a PyTorch project names its tensors, and renaming by it."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["COUNTER", "Naming", "rename"]

# The batches that a batch norm of PyTorch has seen: of no use here.
COUNTER = "num_batches_tracked"

_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}
_OTHERS = {"weight": ("params", "kernel"), "bias": ("params", "bias")}
# More than the stages, or the blocks of a stage or of a network, that any naming counts.
_MOST_DIGITS = 64


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
        return f"stage{stage}_block{block}", self._inside(stage)[rest]

    def target(self, name: str) -> str | None:
        """The network's name ("params/stem_conv/kernel") of one in the files; None: there is none.

        Args:
            name: as "conv1.weight".
        """
        module, _, kind = name.rpartition(".")
        try:
            path = self.path(module)
            collection, leaf = _kinds(path)[kind]
        except KeyError:
            return None
        return "/".join((collection, *path, leaf))

    def source_names(self, name: str) -> list[str]:
        """What a tensor may be called in the project's files: the inverse of `path`.

        Args:
            name: a network's name of a tensor, as "params/stage1_block0/bn1/scale".

        Returns:
            Names that mean this tensor, the aliases of one; empty if there are none.
        """
        collection, *path, leaf = name.split("/")
        kinds = {ours: kind for kind, ours in _kinds(path).items()}
        kind = kinds.get((collection, leaf))
        return [f"{module}.{kind}" for module in self._modules(path)] if kind else []

    def _modules(self, path: list[str]) -> list[str]:
        top = [theirs for theirs, ours in self.top.items() if ours == "/".join(path)]
        match = re.fullmatch(r"stage(\d+)_block(\d+)", path[0])
        if top or self.block is None or match is None or len(path) != 2:
            return top
        at = tuple(map(int, match.groups()))
        # The pattern, with blanks for its groups.
        form = self.block.replace(r"(\d+)", "{}").replace("(.+)", "{}").replace("\\.", ".")
        counts = itertools.product(range(_MOST_DIGITS), repeat=form.count("{}") - 1)
        digits = next((digits for digits in counts if self._place(digits) == at), None)
        if digits is None:
            return []
        inside = self._inside(at[0]).items()
        return [form.format(*digits, rest) for rest, ours in inside if ours == path[1]]

    def _inside(self, stage: int) -> Mapping[str, str]:
        if stage == 1 and self.inside_first is not None:
            return self.inside_first
        return self.inside

    def _place(self, digits: tuple[int, ...]) -> tuple[int, int] | None:
        try:
            return self.place(*digits)
        except KeyError:
            return None


def _kinds(path: Sequence[str]) -> dict[str, tuple[str, str]]:
    norm = path[-1].endswith("bn") or path[-1].startswith("bn")
    return _BATCH_NORM if norm else _OTHERS


def rename(
    state_dict: Mapping[str, np.ndarray], naming: Naming
) -> tuple[dict[str, Any], dict[str, str], dict[str, tuple[int, ...]]]:
    """Renames and transposes every tensor; floats become float32. Counters are left out.

    Args:
        state_dict: kernels [out, in / groups, kh, kw], dense [out, in].
        naming: of the tensors.

    Returns:
        `params` and `batch_stats`: kernels [kh, kw, in / groups, out], dense [in, out]; for each of
        their names that in the state dict; and of what could not be renamed, because the naming
        does not know it or for a second tensor of one name, the shapes by name.
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    names: dict[str, str] = {}
    unknown: dict[str, tuple[int, ...]] = {}
    for name, value in state_dict.items():
        if name.rpartition(".")[2] == COUNTER:
            continue
        target = naming.target(name)
        if target is None or target in names:
            unknown[name] = np.shape(value)
            continue
        names[target] = name
        collection, *path, leaf = target.split("/")
        if leaf == "kernel":
            value = _kernel(value, naming.flattened.get(path[-1]))
        node = variables[collection]
        for part in path:
            node = node.setdefault(part, {})
        # Of another kind they are refused by the check, which needs to see that.
        dtype = np.float32 if jnp.issubdtype(value.dtype, np.floating) else None
        with np.errstate(over="ignore"):  # Likewise what float32 cannot hold, and becomes infinite.
            node[leaf] = np.asarray(value, dtype, order="C")
    return variables, names, unknown


def _kernel(value: np.ndarray, channels: int | None) -> np.ndarray:
    if channels is None or value.ndim not in (2, 4):
        return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    out = len(value)
    if value.ndim == 2:
        size = round((value.shape[1] / channels) ** 0.5)
        if channels * size**2 != value.shape[1]:
            return value.T  # Of no square image: the check of shapes says so.
        value = value.reshape(out, channels, size, size)
    return value.transpose(2, 3, 1, 0).reshape(-1, out)
