"""Networks of other kinds than Linen, and Linen ones with arguments, as the training step sees one.

To the step a network is `apply(variables, images) -> logits` over `params` and `batch_stats`, in
inference mode. What enters its batch norms is marked (see `quant.taps`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from flax import nnx

from ait_jax.errors import UserError
from ait_jax.promotion import promoting
from ait_jax.quant.batch_norm import apply_affine, frozen_affine, mark_input
from ait_jax.quant.policy import leaf_name, named_leaves

__all__ = [
    "FunctionNetwork",
    "LinenNetwork",
    "NNXNetwork",
    "NetworkError",
    "as_given",
    "by_name",
    "variable_name",
]

_COLLECTIONS = ("params", "batch_stats")


def variable_name(path: tuple[Any, ...]) -> str:
    """The name of a variable by its path in `params`: `leaf_name`, or `params` for a bare array."""
    return leaf_name(path) or "params"


class NetworkError(UserError):
    """A model or its variables that cannot be used; says why, and what to do."""


class LinenNetwork(NamedTuple):
    """A Linen module with what its `__call__` takes beside images.

    Attributes:
        model: the module.
        kwargs: of its `__call__`.
    """

    model: nn.Module
    kwargs: Mapping[str, Any]

    def apply(self, variables: Any, images: jax.Array, **of_apply: Any) -> Any:
        """The module's logits [N, classes].

        Args:
            variables: of the module.
            images: [N, H, W, C].
            **of_apply: as for `nn.Module.apply`.

        Returns:
            As `nn.Module.apply`: a pair, if `mutable` is among them.
        """
        return self.model.apply(variables, images, **of_apply, **self.kwargs)


class FunctionNetwork:
    """A pure function `fn(variables, images)` over parameters in any pytree.

    It returns logits, or logits and `{name: [N, ..., features]}`: what enters each normalization
    whose running statistics are `variables["batch_stats"][name]`, as `mean` and `var`.

    Attributes:
        variables: `params` and `batch_stats`, nested dicts by the names of the leaves.
    """

    def __init__(self, fn: Callable[..., Any], variables: Mapping[str, Any], kwargs):
        """Takes the function, its variables (or their shapes), and what else it takes.

        Raises:
            NetworkError: if the names of two variables cannot be told apart.
        """
        self._fn, self._kwargs = fn, kwargs
        given = {name: variables.get(name, {}) for name in _COLLECTIONS}
        self._structures = {name: jax.tree.structure(tree) for name, tree in given.items()}
        try:
            self.variables = {name: _nested(tree) for name, tree in given.items()}
        except UserError as error:
            raise NetworkError(str(error)) from error
        self._names = {
            name: [variable_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
            for name, tree in given.items()
        }

    def as_given(self, collection: str, tree: Any) -> Any:
        """A collection of `variables` in the structure in which the function takes it.

        Args:
            collection: `"params"` or `"batch_stats"`.
            tree: of that collection: nested dicts by name, or what this returns.
        """
        named = {variable_name(path): x for path, x in jax.tree.leaves_with_path(tree)}
        names = self._names[collection]
        return jax.tree.unflatten(self._structures[collection], [named[name] for name in names])

    def _call(self, variables, images) -> tuple[Any, Mapping[str, Any]]:
        given = {name: self.as_given(name, variables.get(name, {})) for name in _COLLECTIONS}
        out = self._fn(given, images, **self._kwargs)
        return out if isinstance(out, tuple) else (out, {})

    def apply(self, variables: Any, images: jax.Array) -> Any:
        """Logits [N, classes]."""
        return self._call(variables, images)[0]

    def apply_marked(self, variables: Any, images: jax.Array) -> tuple[Any, list[jax.Array]]:
        """Logits, and what enters the normalizations, marked (see `quant.batch_norm.mark_input`).

        Args:
            variables: of this network.
            images: [N, H, W, C].

        Raises:
            NetworkError: if the function returns an input without statistics.
        """
        logits, inputs = self._call(variables, images)
        statistics = named_leaves(variables["batch_stats"])
        unknown = [name for name in inputs if f"{name}/mean" not in statistics]
        if unknown:
            raise NetworkError(
                f"the function returns what enters {unknown[0]!r}, of which variables has no "
                "statistics: batch_stats must have a mean and a var for it"
            )
        return logits, [mark_input(x, statistics[f"{name}/mean"]) for name, x in inputs.items()]


def _nested(tree: Any) -> dict[str, Any]:
    """A pytree as nested dicts by the names of its leaves."""
    named = named_leaves(tree)
    if list(named) == [""]:
        return {variable_name(()): named[""]}
    return flax.traverse_util.unflatten_dict(named, sep="/")


def as_given(network: Any, collection: str, tree: Any) -> Any:
    """A collection of a network's variables in the structure that the user's model has them in.

    Args:
        network: one of this module, or a Linen module.
        collection: `"params"` or `"batch_stats"`.
        tree: of that collection, as the network takes it.
    """
    return network.as_given(collection, tree) if isinstance(network, FunctionNetwork) else tree


def by_name(network: Any, tree: Any) -> Any:
    """The reverse of `as_given`."""
    return _nested(tree) if isinstance(network, FunctionNetwork) else tree


class NNXNetwork:
    """An NNX module in inference mode; the module itself is left as it is.

    Attributes:
        variables: `params` and `batch_stats` by name, as a Linen twin would have them.
    """

    def __init__(self, model: nnx.Module, kwargs: Mapping[str, Any]):
        """Takes a module apart.

        Raises:
            NetworkError: if it has state beside parameters, batch statistics and random keys.
        """
        self._kwargs = kwargs
        model = nnx.clone(model)
        model.eval()
        parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
        self._graph, params, statistics, self._rest = parts
        for path, leaf in nnx.to_flat_state(self._rest):
            if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.RngState):
                raise NetworkError(
                    f"the model has {'.'.join(map(str, path))}, a {type(leaf).__name__}: only "
                    "nnx.Param and nnx.BatchStat can be quantized; remove what inference does not "
                    "need, and make constants plain arrays (nnx.data)"
                )
        self._states = {
            "params": nnx.to_flat_state(params),
            "batch_stats": nnx.to_flat_state(statistics),
        }
        self.variables = {
            name: flax.traverse_util.unflatten_dict(
                {tuple(map(str, path)): leaf[...] for path, leaf in state}
            )
            for name, state in self._states.items()
        }

    def _merged(self, variables) -> nnx.Module:
        states = []
        for name, state in self._states.items():
            named = flax.traverse_util.flatten_dict(variables[name])
            states.append(
                nnx.from_flat_state(
                    [(path, leaf.replace(named[tuple(map(str, path))])) for path, leaf in state]
                )
            )
        model = nnx.merge(self._graph, *states, self._rest)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                # This copy of it is ours alone. The class is part of the graph, by which nnx.jit
                # tells what it has traced.
                object.__setattr__(module, "__class__", _frozen_class(type(module)))
        return model

    def apply(self, variables: Any, images: jax.Array) -> Any:
        """Logits [N, classes]."""
        return self._merged(variables)(images, **self._kwargs)  # type: ignore[operator]


@functools.cache
def _frozen_class(norm_class: type) -> type:
    """The class of batch norms that are computed as `fold_frozen` does Linen's, inputs marked."""

    def call(self, x, use_running_average=None, **kwargs):
        running = self.use_running_average if use_running_average is None else use_running_average
        if not running:
            raise NetworkError(
                "a batch norm is in training mode: let the model leave use_running_average to "
                "model.eval(), or pass the argument that switches it with apply_kwargs"
            )
        mean = self.mean[...]
        x = jnp.moveaxis(mark_input(jnp.moveaxis(x, self.axis, -1), mean), -1, self.axis)
        if self.axis not in (-1, x.ndim - 1):
            return norm_class.__call__(self, x, True, **kwargs)
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        a, b = frozen_affine(mean, self.var[...], scale, bias, self.epsilon)
        learned = [p for p in (scale, bias) if p is not None]
        dtype = promoting(nn.dtypes.canonicalize_dtype)(x, *learned, dtype=self.dtype)
        return apply_affine(x, a, b).astype(dtype)

    return type(f"Frozen{norm_class.__name__}", (norm_class,), {"__call__": call})
