"""PyTorch CIFAR ResNets -> `models.resnet_cifar` (the naming of the CIFAR repositories).

`conv1`, `bn1`, `layer1.0.conv1`, ..., `linear` (or `fc`); option B's projection is `shortcut.0/1`
or `downsample.0/1`.
"""

import re
from typing import Any

import numpy as np

__all__ = ["convert"]

_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_MODULES = {
    "conv1": "conv1",
    "bn1": "bn1",
    "conv2": "conv2",
    "bn2": "bn2",
    "shortcut.0": "shortcut_conv",
    "shortcut.1": "shortcut_bn",
    "downsample.0": "shortcut_conv",
    "downsample.1": "shortcut_bn",
}
_TOP = {"conv1": "stem_conv", "bn1": "stem_bn", "linear": "classifier", "fc": "classifier"}
_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _module_path(name: str) -> tuple[str, ...]:
    match = _BLOCK.fullmatch(name)
    if match:
        stage, block, rest = match.groups()
        return f"stage{stage}_block{block}", _MODULES[rest]
    return (_TOP[name],)


def convert(state_dict: dict[str, np.ndarray]) -> dict[str, Any]:
    """Renames and transposes every tensor; float32.

    Args:
        state_dict: kernels [out, in, kh, kw], dense [out, in].

    Returns:
        `params` and `batch_stats`: kernels [kh, kw, in, out], dense [in, out].

    Raises:
        KeyError: with the name of a tensor that is not of this family.
    """
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, value in state_dict.items():
        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            continue
        try:
            path = _module_path(module)
            if path[-1].endswith("bn") or path[-1].startswith("bn"):
                collection, leaf = _BATCH_NORM[kind]
            else:
                collection, leaf = "params", {"weight": "kernel", "bias": "bias"}[kind]
        except KeyError:
            raise KeyError(name) from None
        if leaf == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        node = variables[collection]
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(value, np.float32)
    return variables
