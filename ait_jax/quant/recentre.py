"""Batch norms of a rounded network, re-centred one after the other in the order of execution.

Rounding moves the statistics of what enters a batch norm, and they move further from layer to
layer. On the same images each norm is given back the mean and the variance that it has in the float
network, before the layers behind it are looked at. Nothing is trained.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ait_jax.methods.phases import PHASES, Phase
from ait_jax.methods.registry import Setting, integer
from ait_jax.promotion import of_rank
from ait_jax.quant.batch_norm import BatchNormStatistics, observed_statistics
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name, named_leaves
from ait_jax.quant.taps import InputRecorder

__all__ = ["Recentre", "recentred"]

PHASE = "recentre"
# Channels that vary less are dead: their ratio to anything is noise.
_DEAD = 1e-6
# Of the batch norms. What it adds to a variance matters in channels alone that are nearly dead.
_EPSILON = 1e-5


class _Recentring(InputRecorder):
    """Gives each batch norm the statistics that it has in the float network.

    Attributes:
        wanted: these statistics, by name.
        movable: names of the norms with a scale and a bias of their own.
        maps: `(a, c)` by name: what enters became `a x + c`.
    """

    def __init__(
        self,
        variables: tuple[Any, Any],
        wanted: Mapping[str, BatchNormStatistics],
        movable: set[str],
        axis_name: str | None,
    ):
        super().__init__(variables)
        self.wanted, self.movable, self._axis_name = wanted, movable, axis_name
        self.maps: dict[str, tuple[jax.Array, jax.Array]] = {}

    def __call__(self, argument: int, x: jax.Array) -> jax.Array | None:
        """What enters instead; None: what entered."""
        super().__call__(argument, x)
        name = self.name_of(argument)
        # One that is called a second time has one scale and one bias for both.
        if name not in self.movable or name in self.maps:
            return None
        seen = observed_statistics(x, self.means[name], self._axis_name)
        aim = self.wanted[name]
        alive = (seen.var > _DEAD) & (aim.var > _DEAD)
        a = jnp.where(alive, jnp.sqrt(aim.var / jnp.where(alive, seen.var, 1)), 1.0)
        c = jnp.where(alive, aim.mean - a * seen.mean, 0.0)
        self.maps[name] = a, c
        moved = x.astype(jnp.float32) * of_rank(a, x.ndim) + of_rank(c, x.ndim)
        return moved.astype(x.dtype)


def recentred(
    quantized: QuantizedModel,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    ranges: Any,
    wanted: Mapping[str, BatchNormStatistics],
    *,
    grids: Any = None,
    calibrate: bool = False,
    axis_name: str | None = None,
) -> tuple[Any, Any]:
    """Parameters whose batch norms see in the rounded network what they see in the float one.

    The correction is in the norms' scales and biases; those of norms without, or called more than
    once, stay, and so do channels that do not vary.

    Args:
        quantized: the network.
        params: float parameters.
        batch_stats: running statistics.
        images: [N, H, W, C].
        ranges: the activation quantizer's state.
        wanted: statistics of what enters each norm in the float network, on the same images.
        grids: the weight quantizers' states.
        calibrate: whether each site first updates its range, with what the corrected layers make.
        axis_name: the axis over which the batch is split, if any.

    Returns:
        The parameters, and the (updated) ranges.
    """
    leaves, statistics = named_leaves(params), named_leaves(batch_stats)
    movable = {name for name in wanted if {f"{name}/scale", f"{name}/bias"} <= leaves.keys()}
    made: list[_Recentring] = []

    def recorder(variables):
        made.append(_Recentring(variables, wanted, movable, axis_name))
        return made[0]

    _, ranges = quantized.apply_tapped(
        params,
        batch_stats,
        images,
        ranges,
        grids=grids,
        calibrate=calibrate,
        axis_name=axis_name,
        make_recorder=recorder,
    )
    maps = made[0].maps

    def folded(path, leaf):
        name, _, kind = leaf_name(path).rpartition("/")
        if name not in maps or kind not in ("scale", "bias"):
            return leaf
        a, c = maps[name]
        if kind == "scale":
            return (leaf * a).astype(leaf.dtype)
        mean, var = statistics[f"{name}/mean"], statistics[f"{name}/var"]
        unit = leaves[f"{name}/scale"] * jax.lax.rsqrt(var + _EPSILON)
        return (leaf + unit * (a * mean + c - mean)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(folded, params), ranges


class Recentre:
    """The step of the phase `recentre`: ranges are calibrated and batch norms re-centred."""

    def init(self, builder: Any, frozen: Any) -> Any:
        """See `OwnStep.init`."""
        del builder, frozen
        return ()

    def build(self, builder: Any, *, axis_name: str | None, gathered: Any) -> Any:
        """See `OwnStep.build`."""

        def step(state, frozen, example_ids):
            images = builder.images(state, frozen, example_ids, axis_name, gathered)
            student, ranges = recentred(
                builder.quantized,
                # Always of the teacher's, else each step would correct the one before it.
                frozen.teacher["params"],
                frozen.teacher["batch_stats"],
                images.images,
                state.ranges,
                images.teacher.batch_norms,
                grids=state.grids,
                calibrate=True,
                axis_name=axis_name,
            )
            return state._replace(student=student, ranges=ranges), {}

        return step


@PHASES.register(
    PHASE,
    settings={
        "quant.recentre_steps": Setting(
            10, integer(1), "steps of phase `recentre`, in place of `calibrate`"
        )
    },
)
def _recentre(config: Any) -> Phase:
    return Phase(PHASE, config.quant.recentre_steps, own=Recentre())
