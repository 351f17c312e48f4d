"""Writes trees of weights to files of PyTorch, safetensors, msgpack and Orbax; without torch."""

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from tests.support import torch_writers as tw


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def pickled(tree):
    """Nested dicts of arrays as the writer of PyTorch's files takes them."""
    if isinstance(tree, dict):
        return {name: pickled(value) for name, value in tree.items()}
    if isinstance(tree, (np.ndarray, np.generic)):
        kind = {"f4": "Float", "i8": "Long"}[np.asarray(tree).dtype.str[1:]]
        return tw.simple(kind, np.asarray(tree))
    return tree


def write_torch(path, tree):
    path.write_bytes(tw.zip_bytes(pickled(tree)))
    return path


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def save_flat(path, tree):
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    safetensors.numpy.save_file({name: np.asarray(value) for name, value in flat.items()}, path)
    return path


def save_msgpack(path, tree):
    path.write_bytes(flax.serialization.to_bytes(tree))
    return path
