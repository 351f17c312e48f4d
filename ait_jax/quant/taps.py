"""One observed apply for every kind of network: logits, batch-norm statistics, features by site.

Linen modules, NNX modules and pure functions are all run by their jaxpr. What nobody reads of an
`Outputs` costs nothing: statistics are computed where they are read, and XLA drops what is unused.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ait_jax.quant.batch_norm import (
    BatchNormStatistics,
    averaged_calls,
    observed_statistics,
)
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.sites import map_activations

__all__ = ["InputRecorder", "NormInputs", "Outputs", "apply_tapped", "forward_with_inputs"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["calls", "means"], meta_fields=["axis_name"]
)
@dataclasses.dataclass(frozen=True)
class NormInputs:
    """What enters the batch norms of a network.

    Attributes:
        calls: `[N, ..., features]` of each call, by the name of the batch norm in `batch_stats`
            (`stage1_block0/bn1`), in the order of that tree.
        means: running mean of each, [features].
        axis_name: the axis over which statistics are averaged, if any.
    """

    calls: Mapping[str, Sequence[jax.Array]]
    means: Mapping[str, jax.Array]
    axis_name: str | None

    def statistics(self) -> dict[str, BatchNormStatistics]:
        """Statistics of the global batch, by name; averages where one is called several times."""
        return averaged_calls(
            {
                name: [observed_statistics(x, self.means[name], self.axis_name) for x in inputs]
                for name, inputs in self.calls.items()
            }
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "features", "inputs"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a network makes of images, seen from outside; a pytree.

    Attributes:
        logits: [N, classes].
        features: by the index of the activation site, what leaves it. Teacher and student have the
            same sites; the student's values are quantized.
        inputs: of the batch norms.
    """

    logits: jax.Array
    features: Mapping[int, jax.Array]
    inputs: NormInputs

    @functools.cached_property
    def batch_norms(self) -> dict[str, BatchNormStatistics]:
        """Statistics of what enters each batch norm: those of the global batch, by name."""
        return self.inputs.statistics()


class InputRecorder:
    """Takes what enters batch norms while a network is traced.

    Attributes:
        variables: `(params, batch_stats)`, the arguments of the network before the images.
        means: running means by the name of the batch norm.
    """

    def __init__(self, variables: tuple[Any, Any]):
        """Knows the batch norms of `variables` by the positions of their running means."""
        self.variables = variables
        first = len(jax.tree.leaves(variables[0]))
        self._names: dict[int, str] = {}
        self.means: dict[str, jax.Array] = {}
        for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(variables[1])):
            name, _, kind = leaf_name(path).rpartition("/")
            if kind == "mean":
                self._names[first + i], self.means[name] = name, leaf
        self._calls: dict[str, list[jax.Array]] = {}

    def __call__(self, argument: int, x: jax.Array) -> jax.Array | None:
        """Takes one input, by the position of the running mean (see `map_activations`)."""
        if (name := self.name_of(argument)) is not None:
            self._calls.setdefault(name, []).append(x)
        return None

    def name_of(self, argument: int) -> str | None:
        """The batch norm whose running mean an argument is; None if it is another one.

        Args:
            argument: its position.
        """
        return self._names.get(argument)

    def inputs(self, axis_name: str | None) -> NormInputs:
        """What was taken, in the order of the tree.

        Args:
            axis_name: the axis over which statistics are averaged, if any (equal batches).
        """
        calls = {name: self._calls[name] for name in self.means if name in self._calls}
        return NormInputs(calls, {name: self.means[name] for name in calls}, axis_name)


def forward_with_inputs(model: Any, params: Any, batch_stats: Any, images: jax.Array) -> Any:
    """`(logits, marked)`: the logits, and marks that do not lie on the way to them.

    Args:
        model: a Linen module or a network (see `zero_shot.networks`). One with `apply_marked`
            returns what enters its normalizations beside the logits.
        params: its parameters.
        batch_stats: its running statistics.
        images: [N, H, W, C].
    """
    variables = {"params": params, "batch_stats": batch_stats}
    if hasattr(model, "apply_marked"):
        return model.apply_marked(variables, images)
    return apply_frozen(model, variables, images), ()


def apply_tapped(
    model: Any,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    axis_name: str | None = None,
    site_options: Mapping[str, Any] | None = None,
) -> Outputs:
    """Runs a network in inference mode and observes it.

    Args:
        model: a Linen module or a network (see `zero_shot.networks`).
        variables: its variables, `params` and `batch_stats`.
        images: [N, H, W, C].
        axis_name: the axis over which statistics are averaged, if any (equal batches are assumed).
        site_options: where the sites are (`QuantPolicy.site_options`); None: there are no features.

    Returns:
        What was seen.

    Raises:
        NormError: if a batch norm runs in a loop, a branch, or under vmap.
        SiteError: if an activation does, and the options do not leave loops as they are.
    """
    arguments = variables.get("params", {}), variables.get("batch_stats", {})
    recorder = InputRecorder(arguments)
    features: dict[int, jax.Array] = {}

    def on_site(site, y):
        if site_options is not None:
            features[site.index] = y
        return y

    mapped = map_activations(
        functools.partial(forward_with_inputs, model),
        on_site,
        on_norm=recorder,
        **({"keep_loops": True} if site_options is None else site_options),
    )
    logits, _ = mapped(*arguments, images)
    return Outputs(logits, features, recorder.inputs(axis_name))
