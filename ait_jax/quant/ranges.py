"""Activation ranges: a bias-corrected moving average of each site's batch minimum and maximum."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ait_jax.quant import affine
from ait_jax.quant.activations import ACTIVATIONS, ActivationQuantizer
from ait_jax.quant.calls import ActivationSite

__all__ = [
    "ActivationRanges",
    "MovingAverage",
    "fixed_ranges",
    "init_ranges",
    "range_bounds",
    "updated_bounds",
]


class ActivationRanges(NamedTuple):
    """Ranges of all quantized activation sites, in the order in which the model runs them.

    Attributes:
        lo: float32 [sites], moving average of the batch minimum, *before* bias correction.
        hi: float32 [sites], the same of the batch maximum.
        weight: float32 scalar, the sum of the averaging weights so far, `1 - decay**t` after t
            updates. The averages are divided by it on read and never in the state (the published
            code divides the state itself at every step, which inflates the ranges by up to
            ~3,900 times before they decay again).
    """

    lo: jax.Array
    hi: jax.Array
    weight: jax.Array


def init_ranges(num_sites: int) -> ActivationRanges:
    """Ranges that have seen nothing; reading them before an update gives NaN."""
    zeros = jnp.zeros((num_sites,), jnp.float32)
    return ActivationRanges(zeros, zeros, jnp.zeros((), jnp.float32))


def fixed_ranges(lo: jax.Array, hi: jax.Array) -> ActivationRanges:
    """Ranges with the given bounds, float [sites] each."""
    return ActivationRanges(
        jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32), jnp.ones((), jnp.float32)
    )


def range_bounds(ranges: ActivationRanges) -> tuple[jax.Array, jax.Array]:
    """The bias-corrected `(lo, hi)`, float32 [sites]; the same bits in every program."""
    unit = affine.reciprocal(ranges.weight)
    # A comparison after each product, which changes nothing: else LLVM fuses products into the
    # `hi - lo` of a scale, or does not, as the program has it, and codes would differ.
    lowest = jnp.finfo(jnp.float32).min
    return jnp.maximum(ranges.lo * unit, lowest), jnp.maximum(ranges.hi * unit, lowest)


def updated_bounds(
    ranges: ActivationRanges, batch_lo: jax.Array, batch_hi: jax.Array, decay: float
) -> ActivationRanges:
    """One step of the moving average; works on one site (scalars) or on all of them.

    Args:
        ranges: so far.
        batch_lo: float32, the smallest values of the batch, shaped like `ranges.lo`.
        batch_hi: float32, the largest ones.
        decay: of the average, in (0, 1).
    """
    return ActivationRanges(
        lo=decay * ranges.lo + (1 - decay) * batch_lo,
        hi=decay * ranges.hi + (1 - decay) * batch_hi,
        weight=decay * ranges.weight + (1 - decay),
    )


def _batch_range(y: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    y = jax.lax.stop_gradient(y).astype(jnp.float32)
    lo, hi = jnp.min(y), jnp.max(y)
    if axis_name is None:
        return lo, hi
    return jax.lax.pmin(lo, axis_name), jax.lax.pmax(hi, axis_name)


@ACTIVATIONS.register("ema")
@dataclasses.dataclass(frozen=True)
class MovingAverage(ActivationQuantizer):
    """Ranges from a bias-corrected moving average of each site's batch minimum and maximum (AIT).

    Attributes:
        decay: of the average, in [0, 1).
    """

    decay: float = 0.9

    def __post_init__(self):
        """Checks `decay`."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay = {self.decay!r} is not allowed: it must be in [0, 1)")

    @classmethod
    def of_config(cls, section: Any) -> "MovingAverage":
        """See `ActivationQuantizer.of_config`."""
        return cls(section.range_decay)

    def init(self, sites: Sequence[ActivationSite], bits: Sequence[int]) -> ActivationRanges:
        """See `ActivationQuantizer.init`."""
        del bits
        return init_ranges(len(sites))

    def observe(self, own: Any, y: jax.Array, axis_name: str | None) -> ActivationRanges:
        """See `ActivationQuantizer.observe`."""
        return updated_bounds(own, *_batch_range(y, axis_name), self.decay)

    def bounds(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """See `ActivationQuantizer.bounds`."""
        return range_bounds(state)

    def fixed(self, lo: jax.Array, hi: jax.Array) -> ActivationRanges:
        """See `ActivationQuantizer.fixed`."""
        return fixed_ranges(lo, hi)
