"""Networks of other kinds than Linen, and Linen ones with arguments, as the training step sees one.

To the step a network is `apply(variables, images) -> logits` over `params` and `batch_stats`, in
inference mode, and, unless it is a Linen module, `apply_observed` for what enters its batch norms.
"""

import contextvars
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
from ait_jax.quant.frozen import (
    BatchNormStatistics,
    apply_affine,
    averaged_calls,
    frozen_affine,
    observed_statistics,
)
from ait_jax.quant.policy import leaf_name

__all__ = ["FunctionNetwork", "LinenNetwork", "NNXNetwork", "NetworkError"]

_COLLECTIONS = ("params", "batch_stats")


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
        variables: `params` by the names of the leaves, and `batch_stats`.
    """

    def __init__(self, fn: Callable[..., Any], variables: Mapping[str, Any], kwargs):
        """Takes the function, its variables, and what else it takes."""
        self._fn, self._kwargs = fn, kwargs
        structure: Any
        leaves, structure = jax.tree.flatten_with_path(variables["params"])
        self._structure = structure
        self._names = [leaf_name(path) or "params" for path, _ in leaves]
        named = dict(zip(self._names, (leaf for _, leaf in leaves)))
        self.variables = {
            "params": flax.traverse_util.unflatten_dict(named, sep="/"),
            "batch_stats": variables.get("batch_stats", {}),
        }

    def _call(self, variables, images) -> tuple[Any, Mapping[str, Any]]:
        named = flax.traverse_util.flatten_dict(variables["params"], sep="/")
        params = self._structure.unflatten([named[name] for name in self._names])
        out = self._fn(dict(variables) | {"params": params}, images, **self._kwargs)
        return out if isinstance(out, tuple) else (out, {})

    def apply(self, variables: Any, images: jax.Array) -> Any:
        """Logits [N, classes]."""
        return self._call(variables, images)[0]

    def apply_observed(
        self, variables: Any, images: jax.Array, *, axis_name: str | None = None
    ) -> tuple[jax.Array, dict[str, BatchNormStatistics]]:
        """As `quant.frozen.apply_observed`.

        Args:
            variables: of this network.
            images: [N, H, W, C].
            axis_name: as there.

        Returns:
            As there.

        Raises:
            NetworkError: if the function returns an input without statistics.
        """
        logits, inputs = self._call(variables, images)
        statistics = flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")
        unknown = [name for name in inputs if f"{name}/mean" not in statistics]
        if unknown:
            raise NetworkError(
                f"the function returns what enters {unknown[0]!r}, of which variables has no "
                "statistics: batch_stats must have a mean and a var for it"
            )
        return logits, {
            name: observed_statistics(x, statistics[f"{name}/mean"], axis_name)
            for name, x in inputs.items()
        }


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
                # Its calls are to be seen, and this copy of it is ours alone.
                object.__setattr__(module, "__class__", _seen(type(module)))
        return model

    def apply(self, variables: Any, images: jax.Array) -> Any:
        """Logits [N, classes]."""
        return self._merged(variables)(images, **self._kwargs)  # type: ignore[operator]

    def apply_observed(
        self, variables: Any, images: jax.Array, *, axis_name: str | None = None
    ) -> tuple[jax.Array, dict[str, BatchNormStatistics]]:
        """As `quant.frozen.apply_observed`.

        Args:
            variables: of this network.
            images: [N, H, W, C].
            axis_name: as there.

        Returns:
            As there.
        """
        model = self._merged(variables)
        names = {id(m): "/".join(map(str, path)) for path, m in nnx.iter_modules(model)}
        calls: dict[str, list[BatchNormStatistics]] = {}

        def observe(norm, x):
            x = jnp.moveaxis(x, norm.axis, -1)
            statistics = observed_statistics(x, norm.mean[...], axis_name)
            calls.setdefault(names[id(norm)], []).append(statistics)

        token = _OBSERVER.set(observe)
        try:
            logits: Any = model(images, **self._kwargs)  # type: ignore[operator]
            return logits, averaged_calls(calls)
        finally:
            _OBSERVER.reset(token)


_OBSERVER: contextvars.ContextVar[Callable[[Any, Any], None] | None] = contextvars.ContextVar(
    "observer", default=None
)


@functools.cache
def _seen(norm_class: type) -> type:
    """The class of batch norms whose calls are seen, and computed as `fold_frozen` does Linen's."""

    def call(self, x, use_running_average=None, **kwargs):
        running = self.use_running_average if use_running_average is None else use_running_average
        if not running:
            raise NetworkError(
                "a batch norm is in training mode: let the model leave use_running_average to "
                "model.eval(), or pass the argument that switches it with apply_kwargs"
            )
        observe = _OBSERVER.get()
        if observe is not None:
            observe(self, x)
        if self.axis not in (-1, x.ndim - 1):
            return norm_class.__call__(self, x, True, **kwargs)
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        a, b = frozen_affine(self.mean[...], self.var[...], scale, bias, self.epsilon)
        learned = [p for p in (scale, bias) if p is not None]
        dtype = promoting(nn.dtypes.canonicalize_dtype)(x, *learned, dtype=self.dtype)
        return apply_affine(x, a, b).astype(dtype)

    return type(f"Seen{norm_class.__name__}", (norm_class,), {"__call__": call})
